"""Rows cut over ranks: attention by each method, and whole training steps, against one process in fp32."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import meshed, run

from treadle.attention import AttentionContext, AttentionFacts, attend
from treadle.parallel.context import parts_of
from treadle.parallel.mesh import Mesh

T, K = 32, 8
ALL = {"window": 7, "softcap": 3.0, "alibi": 1.0, "sinks": True, "scale": 0.3}
# facts, heads, key-value heads, value dim, where documents end (chunks are 8 and 4 tokens with 2 and 4 ranks)
ATTENTIONS: dict[str, tuple[dict[str, Any], int, int, int, list[int] | None]] = {
    "causal": ({}, 4, 4, K, None),
    "window": ({"window": 5}, 4, 4, K, None),
    "documents": ({}, 4, 4, K, [3, 11, 12, 27]),
    "borders": ({}, 4, 4, K, [8, 16, 24]),
    "alibi": ({"alibi": 0.5}, 4, 4, K, None),
    "sinks": ({"sinks": True}, 4, 4, K, None),
    "softcap": ({"softcap": 2.0}, 4, 4, K, None),
    "gqa": ({}, 8, 4, K, None),
    "mqa": ({}, 4, 1, K, None),
    "latent": ({}, 4, 4, 5, None),
    "all": (ALL, 8, 4, 5, [3, 8, 21]),
}


def attention(name: str, mesh: Mesh, backend: str) -> list[torch.Tensor]:
    """Output and gradients of this rank's part, of one process's whole rows where there is no mesh."""
    changes, H, G, V, ends = ATTENTIONS[name]
    facts, generator = AttentionFacts(**changes), torch.Generator().manual_seed(3)
    shapes = [(2, T, H, K), (2, T, G, K), (2, T, G, V), (2, T, H, V)]
    *whole, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    sinks = [torch.linspace(-2, 3, H)] if facts.sinks else []
    documents_T = torch.zeros(T, dtype=torch.int32)
    for end in ends or []:
        documents_T[end:] += 1
    context = AttentionContext.causal(2, T) if ends is None else AttentionContext.packed(documents_T.expand(2, T))
    parts = parts_of(mesh)
    if parts is not None:
        context, grad, whole = context.cut(parts), parts.cut(grad), [parts.cut(x) for x in whole]
    grad = 0.2 * grad  # so that gradients are of the size of one
    leaves = [x.clone().requires_grad_() for x in (*whole, *sinks)]
    out = attend(*leaves[:3], facts, replace(context, backend=backend), *leaves[3:])
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def attentions(sizes: dict[str, Any], methods: list[str], names: list[str]) -> dict[Any, Any]:
    """Each case by each method and order on this rank: tensors, or the error's text."""
    found: dict[Any, Any] = {}
    with meshed(**sizes) as mesh:
        for method, order, name in itertools.product(methods, ("zigzag", "contiguous"), names):
            cut = replace(mesh, layout=replace(mesh.layout, context_method=method, context_order=order))
            backends = (
                ["reference"] if method == "ring" or ATTENTIONS[name][0].get("softcap") else ["reference", "sdpa"]
            )
            for backend in backends:
                try:
                    found[method, order, name, backend] = parts_of(cut), attention(name, cut, backend)
                except Exception as error:
                    found[method, order, name, backend] = str(error)
    return found


def assert_same_attention(ranks: int, methods: list[str], names: list[str]) -> float:
    results, largest = run(attentions, ranks, {"context": ranks, "shard": 1}, methods, names), 0.0
    for case in results[0]:
        method, _, name, _ = case
        if method == "ulysses" and name == "mqa":
            assert f"deals heads to {ranks} ranks, which does not divide kv_heads=1" in results[0][case]
            continue
        expected = attention(name, Mesh(), "reference")
        each = [result[case] for result in results]
        assert all(not isinstance(found, str) for found in each), (case, each)
        parts = each[0][0]
        for number, whole in enumerate(expected):
            pieces = [found[1][number] for found in each]
            if number == 4:  # sinks: each rank has a share of their gradient
                joined = torch.stack(pieces).sum(0)
            else:
                joined = parts.to_row_order(torch.cat(pieces, dim=1))
            error = (joined - whole).abs().max().item()
            assert error < 1e-6, (case, number, error)
            largest = max(largest, error)
    return largest


def test_attention_on_two_ranks():
    assert_same_attention(2, ["gather", "ring", "ulysses"], list(ATTENTIONS))


def test_attention_on_four_ranks():
    assert_same_attention(4, ["gather", "ring", "ulysses"], ["causal", "documents", "borders", "all", "mqa"])


CP2, CP4 = {"context": 2, "shard": 1}, {"context": 4, "shard": 1}
RING, ULYSSES, CONTIGUOUS = {"context_method": "ring"}, {"context_method": "ulysses"}, {"context_order": "contiguous"}
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
# model, ranks, sizes, rows at a time, changes to the training section
STEPS: dict[str, tuple[str, int, dict[str, Any], int, dict[str, Any]]] = {
    "facts": ("facts", 2, CP2, 4, {}),
    "facts-contiguous": ("facts", 2, CP2 | CONTIGUOUS, 8, {}),
    "facts-ring": ("facts", 2, CP2 | RING, 8, {}),
    "facts-ulysses": ("facts", 2, CP2 | ULYSSES, 8, {}),
    "mqa": ("mqa", 2, CP2, 8, {}),
    "mqa-ring": ("mqa", 2, CP2 | RING | CONTIGUOUS, 8, {}),
    "latent": ("latent", 2, CP2, 8, {}),
    "latent-ring": ("latent", 2, CP2 | RING, 8, {}),
    "latent-ulysses": ("latent", 2, CP2 | ULYSSES, 8, {}),
    "lengths": ("lengths", 2, CP2, 8, {}),
    "further": ("further", 2, CP2, 4, {}),
    "further-contiguous": ("further", 2, CP2 | CONTIGUOUS, 8, {}),
    "moe": ("even", 2, CP2, 4, {}),
    "four": ("facts", 4, CP4, 8, {}),
    "four-ring": ("facts", 4, CP4 | RING, 8, {}),
    "fsdp": ("plain", 4, {"context": 2}, 2, {}),
    "fsdp-latent-ring": ("latent", 4, {"context": 2} | RING, 4, {}),
    "hsdp": ("plain", 4, {"context": 2, "replicate": 2}, 4, {}),
    "recompute": ("facts", 2, CP2, 8, FULL),
    "recompute-ring": ("plain", 2, CP2 | RING, 8, SELECTIVE),
    "recompute-ulysses": ("plain", 2, CP2 | ULYSSES, 8, SELECTIVE),
}


@pytest.mark.parametrize("case", STEPS)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, rows, changes = STEPS[case]
    expected = step_of(model, Mesh(), rows, **changes)
    found = run(step_on_ranks, ranks, model, rows, {}, sizes, seconds=120)
    assert sum(step["here"] for step in found) == expected["tokens"]
    expected["metrics"].pop("balance_loss", None)  # of each rank's part, as it is of each micro-batch
    for step in found:
        assert_same_step(step, expected)
