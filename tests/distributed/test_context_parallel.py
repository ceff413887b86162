"""Rows cut over ranks: attention by each method, and whole training steps, against one process in fp32."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as collectives
from distributed_zoo import (
    MODELS,
    Case,
    alone,
    assert_same_step,
    loader,
    step_on_ranks,
    steps,
    training,
    without_balance,
)
from harness import meshed, run

from treadle.attention import AttentionContext, AttentionFacts, attend
from treadle.errors import ConfigError
from treadle.evaluate.accuracy import evaluate_accuracy
from treadle.evaluate.perplexity import evaluate_perplexity
from treadle.kernels.linear_cross_entropy import IGNORED
from treadle.nn.config import MixerConfig
from treadle.parallel import compile as module
from treadle.parallel.context import parts_of
from treadle.parallel.mesh import Mesh
from treadle.train.setup import build_model

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
TP2 = CP2 | {"tensor": 2}
RING, ULYSSES, CONTIGUOUS = {"context_method": "ring"}, {"context_method": "ulysses"}, {"context_order": "contiguous"}
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
COMPILED = {"compile": True}
STEPS = {
    "facts": Case("facts", 2, CP2, 4),
    "facts-contiguous": Case("facts", 2, CP2 | CONTIGUOUS, 8),
    "facts-ring": Case("facts", 2, CP2 | RING, 8),
    "facts-ulysses": Case("facts", 2, CP2 | ULYSSES, 8),
    "mqa": Case("mqa", 2, CP2, 8),
    "mqa-ring": Case("mqa", 2, CP2 | RING | CONTIGUOUS, 8),
    "latent": Case("latent", 2, CP2, 8),
    "latent-ring": Case("latent", 2, CP2 | RING, 8),
    "latent-ulysses": Case("latent", 2, CP2 | ULYSSES, 8),
    "lengths": Case("lengths", 2, CP2, 8),
    "further": Case("further", 2, CP2, 4),
    "further-contiguous": Case("further", 2, CP2 | CONTIGUOUS, 8),
    "moe": Case("even", 2, CP2, 4),
    "four": Case("facts", 4, CP4, 8),
    "four-ring": Case("facts", 4, CP4 | RING, 8),
    "fsdp": Case("plain", 4, {"context": 2}, 2),
    "fsdp-latent-ring": Case("latent", 4, {"context": 2} | RING, 4),
    "hsdp": Case("plain", 4, {"context": 2, "replicate": 2}, 4),
    "recompute": Case("facts", 2, CP2, 8, training=FULL),
    "recompute-ring": Case("plain", 2, CP2 | RING, 8, training=SELECTIVE),
    "compiled": Case("facts", 2, CP2, 8, training=COMPILED),
    "compiled-ring": Case("plain", 2, CP2 | RING, 8, training=COMPILED | SELECTIVE),
    "compiled-ulysses": Case("plain", 2, CP2 | ULYSSES, 8, training=COMPILED | FULL),
    "compiled-latent-fsdp": Case("latent", 4, {"context": 2}, 4, training=COMPILED | FULL),
    "tensor": Case("facts", 4, TP2, 8),
    "tensor-latent": Case("latent", 4, TP2, 8),
    "tensor-further": Case("further", 4, TP2, 8),
    "tensor-ring": Case("facts", 4, TP2 | RING, 8),
    "tensor-ulysses": Case("slopes", 4, TP2 | ULYSSES, 8),
    "tensor-compiled": Case("facts", 4, TP2, 8, training=COMPILED),
    "expert": Case("even", 4, {"context": 2, "shard": 2, "expert": 2}, 4),
    "expert-ring": Case("even", 4, {"context": 2, "shard": 2, "expert": 2} | RING, 4),
    "recompute-ulysses": Case("plain", 2, CP2 | ULYSSES, 8, training=SELECTIVE),
}
found_in = steps({name: case for name, case in STEPS.items() if not case.training.get("compile")})


def compiled(case: Case) -> Any:
    module.compile_layers.__kwdefaults__["backend"] = "aot_eager"
    found = step_on_ranks(case.model, case.rows, {}, case.sizes, **case.training)
    broken = torch._dynamo.utils.counters["graph_break"]
    assert not broken, f"compiled in pieces: {dict(broken)}"
    assert torch._dynamo.utils.counters["frames"]["ok"], "nothing was compiled"
    return found


@pytest.mark.parametrize("name", STEPS)
def test_one_step_is_that_of_one_process(name):
    case = STEPS[name]
    expected = alone(case.model, case.rows)
    found = run(compiled, case.ranks, case, seconds=120) if case.training.get("compile") else found_in(name)
    assert sum(step["here"] for step in found) == expected["tokens"] * case.sizes.get("tensor", 1)
    for step in found:
        assert_same_step(step, without_balance(expected))


def evaluated(model: str, mesh: Mesh) -> tuple[Any, ...]:
    built = build_model(MODELS[model], training(), seed=0, mesh=mesh)
    batches = loader(mesh).micro_batches(0, 3)
    # What it would say by itself is right about a token in 64: each second target becomes what the model says.
    with torch.no_grad():
        for index, batch in enumerate(batches):
            answers_BS = built(batch.tokens_BS, batch.context).argmax(-1)
            asked_BS = batch.targets_BS != IGNORED
            asked_BS[index:, ::2] = False
            batches[index] = replace(batch, targets_BS=torch.where(asked_BS, answers_BS, batch.targets_BS))
    accuracy = evaluate_accuracy(built, batches, mesh=mesh)
    perplexity: Any = evaluate_perplexity(built, batches, 100, mesh=mesh)  # type: ignore[arg-type]
    return accuracy, perplexity.nats, perplexity.tokens


def evaluated_on_ranks(model: str, sizes: dict[str, Any]) -> tuple[Any, ...]:
    with meshed(**sizes) as mesh:
        return evaluated(model, mesh)


def test_evaluations_are_those_of_one_process():
    accuracy, nats, tokens = evaluated("plain", Mesh())
    assert 0 < accuracy.correct < accuracy.answers
    assert 0 < accuracy.rows_correct < accuracy.rows
    for found in run(evaluated_on_ranks, 2, "plain", CP2):
        assert found[0] == accuracy
        assert found[1] == pytest.approx(nats, rel=1e-6)
        assert found[2] == tokens


def refused(model: str) -> str:
    with meshed(context=2) as mesh:
        try:
            build_model(MODELS[model], training(), seed=0, mesh=mesh)
        except ConfigError as error:
            return str(error)
    return "built"


def test_a_mixer_that_needs_whole_rows_is_not_built():
    """It would train without a word, each part of a row as a row of its own."""
    assert run(refused, 2, "delta") == ["parallel.context: 2, but gated_delta needs whole rows; set it to 1"] * 2


def test_mixers_need_whole_rows_unless_they_say_otherwise():
    kinds = {cls.__name__ for cls in MixerConfig.__subclasses__() if cls.in_parts}
    assert MixerConfig.in_parts is False
    assert {"AttentionConfig", "LatentAttentionConfig"} <= kinds


def test_names_of_pytorch_that_are_used():
    """Those of 2.11 or those of 2.13."""
    for names in (
        ("all_gather_single_autograd", "all_gather_tensor_autograd"),
        ("all_gather_single", "all_gather_tensor"),
        ("all_to_all_single_autograd",),
        ("wait_tensor",),
    ):
        assert any(hasattr(collectives, name) for name in names), names
    assert callable(torch.distributed.distributed_c10d._resolve_process_group)
