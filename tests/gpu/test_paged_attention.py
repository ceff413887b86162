"""Attention to pages on a GPU: every case against float64, in CUDA graphs, and through the engine."""

import pytest
import torch

import treadle
from treadle import kernels
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Sampling
from treadle.kernels.measure import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
OPERATION = kernels.PAGED_ATTENTION
GATED = {"kind": "gated", "dim": 32}
MIXERS = {
    "attention": [{"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16}] * 2,
    "options": [
        {"kind": "attention", "heads": 4, "kv_heads": 1, "head_dim": 32, "window": 6, "sinks": True},
        {"kind": "attention", "heads": 6, "kv_heads": 2, "head_dim": 16, "softcap": 5.0, "position": {"kind": "alibi"}},
    ],
    "latent": [
        {"kind": "latent_attention", "heads": 2, "kv_rank": 32, "nope_dim": 16, "rope_dim": 16, "value_dim": 16}
    ],
}


@pytest.mark.parametrize("shape", OPERATION.checked)
def test_every_case_against_float64(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(vars(OPERATION), "checked", (shape,))
    findings = list(check(OPERATION, "triton", "cuda"))
    assert len(findings) == len(OPERATION.dtypes)
    assert [str(finding) for finding in findings if not finding.good] == []


@pytest.mark.parametrize(
    "shape",
    [
        (7, 1, 1600, 16, 8, 128, 128, 64, 0, 0, 0, 0),
        (7, -1, 1600, 32, 8, 128, 128, 64, 300, 0, 0, 1),
        (7, -200, 1600, 16, 8, 128, 128, 64, 0, 30, 0, 0),
        (5, -200, 900, 8, 8, 64, 64, 64, 0, 0, 1, 0),
        (5, -100, 900, 8, 1, 256, 256, 64, 0, 0, 0, 0),
        (3, -1, 1600, 128, 1, 576, 512, 64, 0, 0, 0, 0),
        (3, -50, 700, 16, 1, 576, 512, 64, 0, 0, 0, 0),
    ],
)
def test_sizes_of_real_models(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    args = OPERATION.arguments(shape, torch.bfloat16, "cuda")
    exact = OPERATION.reference(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args))
    found = OPERATION.implementation("triton")(*args)
    error = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 2e-2, error.max()
    assert (found.double() - exact).norm() / exact.norm() < 4e-3


def test_one_graph_for_all_lengths() -> None:
    """Captured once with a wide table, then replayed with other lengths, some of them zero: bitwise as alone."""
    torch.manual_seed(2)
    q, keys, values, tables, lengths, starts, *rest = OPERATION.arguments(
        (8, 1, 4096, 16, 8, 128, 128, 64, 0, 0, 0, 0), torch.bfloat16, "cuda"
    )
    kernel = OPERATION.implementation("triton")
    lengths.fill_(0)
    kernel(q, keys, values, tables, lengths, starts, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, keys, values, tables, lengths, starts, *rest)
    for wanted in ([0, 1, 4096, 513, 512, 511, 64, 2000], [1, 0, 0, 65, 1024, 3000, 4095, 7]):
        lengths.copy_(torch.tensor(wanted))
        graph.replay()
        for row, length in enumerate(wanted):
            here, width = slice(row, row + 1), -(-length // 64)
            alone = kernel(q[here], keys, values, tables[here, :width], lengths[here], starts[:2], *rest)
            assert torch.equal(out[here], alone)
            assert length or not alone.any()


@pytest.mark.parametrize("name", MIXERS)
def test_engine(name: str) -> None:
    """Greedy texts are those of the gathered pages, prompts in chunks and together with what is generated."""
    layers = [{"kind": "pre_norm", "mixer": mixer, "feedforward": GATED} for mixer in MIXERS[name]]
    model = treadle.build({"dim": 32, "vocab_size": 61, "max_length": 256, "layers": layers}, seed=3).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that texts differ
    prompts = [[(7 * i + j) % 61 for j in range(3 + 17 * i)] for i in range(6)]
    texts = []
    for backend in ("auto", "reference"):
        config = EngineConfig(slots=4, budget=24, page=16, cache_tokens=1024, policy="latency", backend=backend)
        done = Engine(model, config).generate(prompts, Sampling(max_tokens=20, temperature=0))
        texts.append([request.outputs for request in done])
    assert texts[0] == texts[1]
