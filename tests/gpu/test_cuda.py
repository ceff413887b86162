"""What only a GPU can show: kernels against float64, compiled training, checkpoints, sampling."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from treadle.attention import BACKENDS, AttentionContext, AttentionFacts, attend, choose, flash4
from treadle.attention.chunks import fusible
from treadle.attention.context_parallel import in_rank_order
from treadle.attention.parts import Parts
from treadle.config import resolve
from treadle.data.packing import Batch
from treadle.kernels.linear_cross_entropy import linear_cross_entropy
from treadle.nn.latent_attention import LatentAttention, LatentAttentionConfig
from treadle.nn.position import RopeConfig
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.mesh import Mesh
from treadle.train.adamw import AdamW
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig, TrainingConfig
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CUDA = torch.device("cuda")

CASES = {
    "sdpa": [{}, {"window": 65}, {"alibi": True}, {"sinks": True}, {"alibi": True, "sinks": True, "window": 65}],
    "flash": [{}, {"window": 1}, {"window": 65}, {"scale": 0.3}],
    "flash4": [{}, {"window": 1}, {"window": 65}, {"scale": 0.3}],
    "flex": [
        {},
        {"window": 65},
        {"softcap": 5.0},
        {"softcap": 5.0, "window": 200},
        {"alibi": True},
        {"sinks": True},
        {"alibi": True, "sinks": True, "window": 65},
        {"alibi": True, "sinks": True, "softcap": 5.0, "scale": 0.3},
    ],
}


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Error over the exact norm; over one where that is smaller (a window of one token has no gradient at all)."""
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1.0))


@pytest.mark.parametrize(
    ("heads", "head_dim", "value_dim"),
    [((8, 8), 64, 64), ((8, 2), 64, 64), ((4, 1), 128, 128), ((4, 4), 192, 128), ((8, 2), 64, 96)],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "fact"), [(b, f) for b, facts in CASES.items() for f in facts])
def test_attention_equals_float64(
    backend: str, fact: dict[str, Any], packed: bool, heads: tuple[int, int], head_dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    B, S = 2, 389
    documents_BS = (torch.rand(B, S, device=CUDA) < 0.01).cumsum(1)
    context = AttentionContext.packed(documents_BS) if packed else AttentionContext.causal(B, S, device=CUDA)
    H, G = heads
    shapes = (H, head_dim), (G, head_dim), (G, value_dim), (H, value_dim)
    *narrow, grad = (torch.randn(B, S, *shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes)
    facts = AttentionFacts(**fact)
    if (reason := BACKENDS[backend].unsupported(narrow[0], facts, context, value_dim)) is not None:
        pytest.skip(reason)
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in narrow]
        if facts.sinks:  # a parameter: float32 whatever is computed in
            wide = torch.promote_types(dtype, torch.float32)
            leaves.append(torch.linspace(-2, 3, H, device=CUDA, dtype=wide).requires_grad_())
        seen = AttentionContext(context.positions_BS, context.documents_BS, context.cumulative_lengths_N, S, name)
        out = attend(*leaves[:3], facts, seen, *leaves[3:])
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, exact in zip(*results, strict=True):
        assert relative(got, exact) < 8e-3


def test_adamw_with_clipping_equals_float64() -> None:
    """Tensors that a kernel of their own steps, and small ones."""
    torch.manual_seed(0)
    shapes, (beta1, beta2), lr, eps = ((300, 400), (7,), (513, 129)), (0.9, 0.95), 1e-2, 1e-8
    parameters = [torch.nn.Parameter(torch.randn(*shape, device=CUDA)) for shape in shapes]
    exact = [(p.detach().double(), 0.0, 0.0) for p in parameters]
    optimizer = AdamW(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.1, fused=True)
    for step in (1, 2, 3):
        factor = torch.tensor(0.3 * step, device=CUDA)
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter)
            grad, (p, mean, square) = parameter.grad.double() * factor.double(), exact[index]
            mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
            update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
            exact[index] = (p * (1 - lr * 0.1) - lr * update, mean, square)
        optimizer.factor = factor
        optimizer.step()
        assert optimizer.factor is None
    for parameter, (p, mean, square) in zip(parameters, exact, strict=True):
        state = optimizer.state[parameter]
        assert relative(parameter.detach(), p) < 1e-6
        assert relative(state["exp_avg"], mean) < 1e-6
        assert relative(state["exp_avg_sq"], square) < 1e-6
        assert state["step"].item() == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("fact", [{}, {"window": 65}, {"softcap": 5.0}, {"alibi": 1.0, "sinks": True}])
def test_attention_of_a_part_of_the_rows_equals_float64(fact: dict[str, Any], order: Any, packed: bool) -> None:
    """What each rank of context parallelism computes once keys and values are gathered, one rank after the other."""
    torch.manual_seed(0)
    B, S, H, G, K, ranks = 2, 4 * 170, 8, 2, 64, 2
    documents_BS = (torch.rand(B, S, device=CUDA) < 0.01).cumsum(1)
    whole = AttentionContext.packed(documents_BS) if packed else AttentionContext.causal(B, S, device=CUDA)
    shapes = (H, K), (G, K), (G, K), (H, K)
    *narrow, grad = (torch.randn(B, S, *shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes)
    facts = AttentionFacts(**fact)
    parts = [Parts("gather", order, "none", rank, ranks) for rank in range(ranks)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in narrow]
        sinks = [torch.linspace(-2, 3, H, device=CUDA).requires_grad_()] if facts.sinks else []
        if dtype == torch.float64:
            outs = [attend(*leaves, facts, replace(whole, backend="reference"), *sinks)]
        else:
            q, k, v = leaves[0], parts[0].to_rank_order(leaves[1]), parts[0].to_rank_order(leaves[2])
            contexts = [whole.cut(part) for part in parts]
            fused = fusible(q, facts, contexts[0], K)
            assert fused == (fact == {} and not packed)
            assert fused or choose(q, facts, in_rank_order(contexts[0])) == "flex"
            outs = [attend(part.cut(q), k, v, facts, c, *sinks) for part, c in zip(parts, contexts, strict=True)]
        out = outs[0] if dtype == torch.float64 else parts[0].to_row_order(torch.cat(outs, dim=1))
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in (*leaves, *sinks))])
    for got, exact in zip(*results, strict=True):
        assert relative(got, exact) < 1e-2


def test_the_measured_choice() -> None:
    q = torch.zeros(1, 256, 4, 64, device=CUDA, dtype=torch.bfloat16)
    plain = AttentionContext.causal(1, 256, device=CUDA)
    packed = AttentionContext.packed(torch.zeros(1, 256, device=CUDA, dtype=torch.int32))
    best = flash4.unsupported(q, AttentionFacts(), plain) is None
    assert choose(q, AttentionFacts(), plain) == "flash4" if best else "sdpa"
    assert choose(q, AttentionFacts(), packed) == "flash4" if best else "flash"
    assert choose(q, AttentionFacts(window=9), plain) == "flash4" if best else "flash"
    assert choose(q, AttentionFacts(softcap=5.0), plain) == "flex"
    assert choose(q.float(), AttentionFacts(), packed) == "flex"
    assert choose(q, AttentionFacts(alibi=True), plain) == "flex"
    assert choose(q, AttentionFacts(sinks=True), packed) == "flex"


DEEPSEEK = {"kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}  # V2's and V3's sizes of a head


def latent_blocks(heads: int = 4, dim: int = 256) -> tuple[LatentAttention, LatentAttention]:
    """The same block twice: to be computed in bf16 (its weights are float32), and in float64."""
    torch.manual_seed(0)
    spec = {"heads": heads, "q_rank": 192, **DEEPSEEK, "position": {"kind": "rope", "layout": "interleaved"}}
    block: LatentAttention = LatentAttentionConfig.model_validate(spec).build(dim, 512)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    block = block.to(CUDA)
    return block, copy.deepcopy(block).double()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "flex"])
def test_latent_attention_equals_float64(backend: str, packed: bool) -> None:
    results = []
    documents_BS = (torch.rand(2, 389, generator=torch.Generator().manual_seed(1)) < 0.01).cumsum(1)
    x_BSD, grad_BSD = (t.to(CUDA) for t in torch.randn(2, 2, 389, 256, generator=torch.Generator().manual_seed(2)))
    for block, name in zip(latent_blocks(), (backend, "reference"), strict=True):
        plain = AttentionContext.causal(2, 389, device=CUDA, backend=name)
        context = AttentionContext.packed(documents_BS.to(CUDA), backend=name) if packed else plain
        dtype = torch.bfloat16 if name == backend else torch.float64
        leaf_BSD = x_BSD.bfloat16().to(dtype).requires_grad_()
        out_BSD = block(leaf_BSD, context)
        out_BSD.backward(grad_BSD.to(dtype))
        results.append([out_BSD.detach(), leaf_BSD.grad, *(parameter.grad for parameter in block.parameters())])
    for got, exact in zip(*results, strict=True):
        assert relative(got, exact) < 3e-2


@pytest.mark.parametrize("heads", [4, 16])
def test_latent_attention_decodes_as_float64_computes_the_whole(heads: int) -> None:
    block, exact = latent_blocks(heads)
    x_BSD = torch.randn(2, 300, 256, device=CUDA, dtype=torch.bfloat16)
    cache, start, pieces = block.make_cache(2, 300, torch.bfloat16, CUDA), 0, []
    with torch.no_grad():
        whole_BSD = exact(x_BSD.double(), AttentionContext.causal(2, 300, device=CUDA, backend="reference"))
        for size in (200, 1, 1, 8, 90):
            positions_BS = torch.arange(start, start + size, device=CUDA).expand(2, size)
            pieces.append(block(x_BSD[:, start : start + size], AttentionContext(positions_BS, cache=cache)))
            start += size
    assert relative(torch.cat(pieces, dim=1), whole_BSD) < 3e-2


SCALINGS: list[dict[str, Any]] = [
    {"kind": "linear", "factor": 2.0},
    {"kind": "dynamic_ntk", "factor": 2.0, "original_length": 128},
    {"kind": "llama3", "original_length": 128},
    {"kind": "yarn", "original_length": 128},
    {"kind": "longrope", "original_length": 128, "short_factor": [1.5] * 16, "long_factor": [3.0] * 16},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_equal_the_cpu_and_never_stop_the_host(scaling: dict[str, Any]) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling}).build(32, 256)
    packed = AttentionContext.packed(torch.tensor([[0] * 100 + [1] * 156, [0] * 256]))
    on_device = packed.to(CUDA)
    first = rope.tables(on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = rope.tables(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for once, twice, exact in zip(first, again, rope.tables(packed), strict=True):
        assert torch.equal(once, twice)
        assert (once.cpu() - exact).abs().max() < 1e-6


@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (30.0, 1e-3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_equals_float64(softcap: float | None, z_loss: float, smoothing: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 128, device=CUDA)
    weight = torch.randn(5003, 128, device=CUDA) * 0.1
    targets = torch.randint(0, 5003, (3000,), device=CUDA)
    targets[::5] = -100
    narrow, master = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    options: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "smoothing": smoothing}
    loss, _ = linear_cross_entropy(narrow, master, targets, chunk=1024, **options)
    loss.backward()
    wide, exact = narrow.detach().double().requires_grad_(), weight.double().requires_grad_()
    logits = wide @ exact.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    penalty = z_loss * logits.logsumexp(-1)[targets != -100].square().sum()
    reference = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) + penalty
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-3)
    assert relative(narrow.grad, wide.grad) < 1e-2
    assert relative(master.grad, exact.grad) < 1e-2


SPEC: dict[str, Any] = {
    "dim": 128,
    "vocab_size": 512,
    "max_length": 256,
    "layers": [
        {
            "kind": "pre_norm",
            "repeat": 3,
            "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": "rms"},
            "feedforward": {"kind": "gated", "dim": 256},
        }
    ],
}


def batches(steps: int, packed: bool) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        tokens_BS = torch.randint(0, 512, (4, 257), generator=generator).sort(dim=1).values  # learnable: ever larger
        documents_BS = (torch.rand(4, 256, generator=generator) < 0.02).cumsum(1)
        context = AttentionContext.packed(documents_BS, boundaries=128) if packed else AttentionContext.causal(4, 256)
        rows_B = torch.arange(4)
        made.append([Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], context, 4 * 256, rows_B, rows_B)])
    return made


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, loop: Loop, record: StepRecord) -> None:
        self.values.append(record.loss)


def losses(
    packed: bool, steps: int = 12, optimizer: Any = None, spec: dict[str, Any] = SPEC, **changes: Any
) -> list[float]:
    torch.compiler.reset()
    config = TrainingConfig(steps=steps, sequence_length=256, batch_size=4, **changes)
    model = build_model(resolve(TransformerConfig, spec), config, seed=0, mesh=Mesh(device=CUDA))
    state = build_state(model, optimizer or AdamWConfig(lr=3e-3), config)
    record = Losses()
    Loop(state, config, ConstantConfig(), cross_entropy, [record]).run(batches(steps, packed))
    return record.values


@pytest.mark.parametrize("packed", [False, True])
def test_every_way_to_compute_gives_the_same_losses(packed: bool) -> None:
    exact = losses(packed, precision="fp32", compile=False)
    assert exact[-1] < exact[0] - 0.5
    for precision, compiled, checkpointing in itertools.product(("bf16", "fp16"), (False, True), ("none", "full")):
        got = losses(packed, precision=precision, compile=compiled, activation_checkpointing=checkpointing)
        assert got == pytest.approx(exact, abs=0.05), (precision, compiled, checkpointing)
    got = losses(packed, precision="bf16", compile=True, activation_checkpointing="selective")
    assert got == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("position", ["alibi", {"kind": "rope", "partial": 0.5, "scaling": SCALINGS[1]}])
def test_positions_and_sinks_compile_to_the_same_losses(position: Any) -> None:
    layer = SPEC["layers"][0]
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": position, "sinks": True}
    spec = {**SPEC, "position": "learned", "layers": [{**layer, "mixer": mixer}]}
    exact = losses(True, precision="fp32", compile=False, spec=spec)
    assert exact[-1] < exact[0] - 0.5
    for checkpointing in ("none", "selective", "full"):
        got = losses(True, precision="bf16", compile=True, activation_checkpointing=checkpointing, spec=spec)
        assert got == pytest.approx(exact, abs=0.05), checkpointing


def test_gated_delta_net_compiles_to_the_same_losses() -> None:
    mixer = {"kind": "gated_delta", "heads": 2, "value_heads": 4, "head_dim": 32}
    spec = {**SPEC, "layers": [{**SPEC["layers"][0], "mixer": mixer}]}
    exact = losses(True, steps=8, precision="fp32", compile=False, spec=spec)
    assert exact[-1] < exact[0] - 0.4
    for checkpointing in ("none", "full"):
        got = losses(True, steps=8, precision="bf16", compile=True, activation_checkpointing=checkpointing, spec=spec)
        assert got == pytest.approx(exact, abs=0.05), checkpointing


def test_multi_token_prediction_compiles_to_the_same_losses() -> None:
    spec = {**SPEC, "multi_token": {"kind": "sequential", "depth": 2}}
    exact = losses(True, precision="fp32", compile=False, spec=spec)
    assert exact[-1] < exact[0] - 0.5
    for checkpointing in ("none", "selective", "full"):
        got = losses(True, precision="bf16", compile=True, activation_checkpointing=checkpointing, spec=spec)
        assert got == pytest.approx(exact, abs=0.05), checkpointing


@pytest.mark.parametrize("packed", [False, True])
def test_latent_attention_compiles_to_the_same_losses(packed: bool) -> None:
    sizes = {"heads": 4, "q_rank": 64, "kv_rank": 48, "nope_dim": 32, "rope_dim": 16, "value_dim": 32}
    spec = {**SPEC, "layers": [{**SPEC["layers"][0], "mixer": {"kind": "latent_attention", **sizes}}]}
    # Eight steps: after that, bf16 has drifted 0.06 away from fp32 where rows are not packed (H200).
    exact = losses(packed, steps=8, precision="fp32", compile=False, spec=spec)
    assert exact[-1] < exact[0] - 0.4
    for checkpointing in ("none", "selective"):
        got = losses(packed, steps=8, precision="bf16", compile=True, activation_checkpointing=checkpointing, spec=spec)
        assert got == pytest.approx(exact, abs=0.05), checkpointing


def test_muon_learns_in_bf16() -> None:
    values = losses(True, optimizer=MuonConfig(lr=3e-3), precision="bf16")
    assert values[-1] < values[0] - 0.5


def test_checkpointing_saves_memory() -> None:
    peaks = []
    for mode in ("none", "selective", "full"):
        torch.cuda.reset_peak_memory_stats()
        losses(False, steps=2, precision="bf16", compile=False, activation_checkpointing=mode)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] > peaks[1] > peaks[2]


def test_a_resumed_run_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    config = TrainingConfig(steps=8, sequence_length=256, batch_size=4, compile=False)
    data = batches(8, False)

    def fresh() -> Any:
        return build_state(
            build_model(resolve(TransformerConfig, SPEC), config, seed=0, mesh=Mesh(device=CUDA)), AdamWConfig(), config
        )

    whole, first, second = Losses(), Losses(), Losses()
    Loop(fresh(), config, ConstantConfig(), cross_entropy, [whole]).run(data)
    state = fresh()
    Loop(state, config.model_copy(update={"steps": 5}), ConstantConfig(), cross_entropy, [first]).run(data)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state, {})
    checkpointer.finish(strict=True)
    resumed = fresh()
    checkpointer.load(resumed, 5)
    Loop(resumed, config, ConstantConfig(), cross_entropy, [second]).run(data[5:])
    assert first.values + second.values == pytest.approx(whole.values, abs=1e-4)
