"""The time of a step, by roofline: FLOPs over the rate that matmuls reach, bytes over bandwidth, messages over links.

What is not waited for is kept apart: gathering and reducing of sharded weights run beside the layers, but for the first
and the last of them; parts of keys and values that go round run beside attention. Gathering and scattering of tokens,
which matmuls need at once, and rows that travel to experts are waited for.
"""

import math

from treadle.memory.analytic import MASTER, Rank, Setting, bubble
from treadle.memory.plan import StepTime
from treadle.parallel.activation_checkpointing import offloads
from treadle.train.optimizers import MuonConfig

CASTS = 12  # bytes moved for each weight of a layer: read in fp32, written in bf16; its gradient the other way, added
ADAMW = 40  # bytes for each weight: read and write of weight and moments, and its gradient; its norm; clipping
STREAM = (
    0.67  # of a copy's bandwidth that kernels reach which compute: torch.compile's softmax 2.0 TB/s on an H100 of 3.0
)
FUSED = 0.8  # of what tensor parallelism waits, what is left with asynchronous matmuls: on two GPUs 0.75 and 1
FLEX = 0.54  # of the rate of attention that flex reaches: benchmarks/attention.py, 226 of 416 TFLOP/s
HIDDEN = 0.9  # of the time of layers that messages can run beside: what is sent takes processors and memory too


def step_time(setting: Setting) -> StepTime:
    """Of the rank that takes longest."""
    return max((_rank_time(rank) for rank in setting.ranks), key=lambda time: time.total)


def training_flops(setting: Setting) -> float:
    """Forward and backward, per token, without what is computed again: as `treadle.nn.flops.training_flops`."""
    found = setting.anatomy
    parts = [*(found.kinds[kind][1] for kind in found.layers), *found.further]
    layers = sum(part.flops + part.mixing for part in parts)
    return 3 * (layers + found.head.flops * (1 + len(found.further)))


def _rank_time(rank: Rank) -> StepTime:
    setting = rank.setting
    device, layout, n, T = setting.device, setting.layout, setting.micro_batches, setting.tokens
    bandwidth, mode = STREAM * device.bandwidth_tbs * 1e12, setting.training.activation_checkpointing
    matmul = attention = traffic = 0.0  # seconds, seconds, bytes
    wide = device.matmul_tflops * 1e12
    narrow = (device.fp8_tflops or device.matmul_tflops) * 1e12 if setting.training.fp8 else wide
    sent = {"tensor": 0.0, "context": 0.0, "expert": 0.0}
    counts = dict.fromkeys(sent, 0.0)
    uneven = 2 - 1 / layout.context if layout.context_order == "contiguous" else 1.0
    for layer, unit in zip(rank.layers, rank.units, strict=True):
        part, facts, (again, attends) = layer.part, layer.facts, layer.recomputed(mode)
        once = part.narrow / narrow + (part.flops - part.narrow) / wide
        matmul += (3 + again) * once * T / layout.tensor
        rate = device.attention_tflops if part.head_dim > 64 else device.attention_64_tflops
        if part.flexible or (layout.context > 1 and layout.context_method == "gather"):
            rate *= FLEX
        attention += (3.5 + attends) * part.mixing * T / layout.tensor * uneven / (rate * 1e12)
        traffic += (facts.forward * (1 + (again > 0)) + facts.backward) * T + CASTS * unit
        sent["tensor"] += (2 + again) * facts.tensor * T
        sent["context"] += (2 + (again > 0)) * _context_bytes(rank, facts.context, facts.input) * T
        sent["expert"] += (4 + 2 * (again > 0)) * part.travels * T * (layout.expert > 1)
        counts["tensor"] += 8 + 4 * again
        counts["context"] += 4 + 2 * (again > 0)
        counts["expert"] += (4 + 2 * (again > 0)) * (part.travels > 0)
    if rank.last:
        calls = 1 + len(setting.anatomy.further)
        vocabulary = setting.anatomy.head.cut / setting.model.dim / layout.tensor
        matmul += 3 * calls * setting.anatomy.head.flops * T / layout.tensor / wide
        traffic += calls * (3 * setting.width * vocabulary * T + (CASTS + MASTER) * vocabulary * setting.model.dim)
    if rank.first:
        traffic += 2 * MASTER * setting.model.dim * T + 2 * MASTER * setting.anatomy.embedding.here(layout.tensor)
    compute = matmul + attention
    memory = traffic / bandwidth
    host = sum(layer.facts.launches for layer in rank.layers) * device.launch_us * 1e-6
    waited: dict[str, float] = {}
    hidden: dict[str, float] = {}
    seconds = {
        "tensor": _ring(setting, sent["tensor"], layout.tensor, 1, counts["tensor"]),
        "context": _ring(setting, sent["context"], layout.context, layout.tensor, counts["context"]),
        "expert": _exchange(setting, sent["expert"], layout.expert, layout.tensor, counts["expert"]),
    }
    for name, spent in seconds.items():
        part_waited = FUSED if name == "tensor" and setting.parallel.async_tensor else 1.0
        if name == "context" and layout.context_method == "ring":
            part_waited = max(0.0, spent - attention) / spent if spent else 0.0
        waited[name], hidden[name] = n * spent * part_waited, n * spent * (1 - part_waited)
    each = compute + memory + sum(waited.values()) / n
    if host > each:  # the device waits for it
        waited["launches"], each = n * (host - each), host
    for name, (spent, edges) in _weights(rank).items():
        beyond = max(edges, spent - HIDDEN * n * (compute + memory))
        waited[name], hidden[name] = beyond, spent - beyond
    idle = 0.0
    if layout.pipeline > 1:
        idle = bubble(setting.parallel, layout.pipeline, n) * each
        stride = setting.world // layout.pipeline
        stream = T * setting.model.dim * setting.width / layout.tensor
        hop = stream / _rate(setting, 2, stride) + device.latency_us * 1e-6
        stages = setting.parallel.stages // layout.pipeline
        waited["pipeline"] = 2 * (layout.pipeline - 1) * hop  # as it fills and drains
        hidden["pipeline"] = 2 * n * stages * hop
    optimizer_seconds, offload = _optimizer(rank)
    if offloads(mode):  # out in the forward, in again in the backward, but for the last layer's
        moved = 2 * n * T * sum(layer.kept(mode) for layer in rank.layers[:-1]) / (device.host_gbs * 1e9)
        hidden["host"] = min(moved, HIDDEN * n * (compute + memory))
        offload += moved - hidden["host"]
    if offload:
        waited["host"] = offload
    return StepTime(
        compute=n * compute,
        memory=n * memory + optimizer_seconds,
        communication={name: spent for name, spent in waited.items() if spent},
        bubble=idle,
        hidden={name: spent for name, spent in hidden.items() if spent},
    )


def _context_bytes(rank: Rank, gathered: float, stream: float) -> float:
    """What a rank has to be sent per token in one forward, as all that a gather leaves it with."""
    layout = rank.setting.layout
    if layout.context == 1 or layout.context_method == "gather":
        return gathered
    # Rows go to heads and back (queries and outputs as wide as the stream, and keys and values less), or keys and
    # values go round, no wider than the stream.
    return 3 * stream if layout.context_method == "ulysses" else stream * layout.context / 2


def _weights(rank: Rank) -> dict[str, tuple[float, float]]:
    """Seconds of a step for gathering weights and summing gradients, by dimension; and of those the ones at the ends,
    which nothing can run beside."""
    setting, layout = rank.setting, rank.setting.layout
    if not setting.sharded:
        return {}
    n, w = setting.micro_batches, setting.width
    times = 2 * n if setting.freed else 1
    gathers = reduces = first = 0.0
    for part in (layer.part for layer in rank.layers):
        for elements, size, stride in (
            (part.here(layout.tensor) - part.experts / layout.tensor, setting.shards, layout.tensor),
            (
                part.experts / (layout.tensor * layout.expert),
                setting.shards // layout.expert,
                layout.tensor * layout.expert,
            ),
        ):
            if elements:
                one = _ring(setting, w * elements, size, stride, 1)
                first = first or one
                gathers += times * one
                reduces += _ring(setting, MASTER * elements, size, stride, 1)
    root = _ring(setting, (w + MASTER) * rank.root, setting.shards, layout.tensor, 2)
    found = {"shard": (gathers + reduces + root, first + root)}
    if layout.replicate > 1:
        stride = setting.world // layout.pipeline // layout.replicate
        summed = _ring(setting, 2 * MASTER * rank.own, layout.replicate, stride, 2 * len(rank.layers))
        found["replicate"] = (summed, summed / max(1, len(rank.layers)))
    return found


def _optimizer(rank: Rank) -> tuple[float, float]:
    """Seconds on the device; seconds of the host and its link, where weights live there."""
    setting = rank.setting
    layout, device = setting.layout, setting.device
    seconds = ADAMW * rank.own / (STREAM * device.bandwidth_tbs * 1e12)
    if isinstance(setting.optimizer, MuonConfig):
        flops = sum(layer.part.newton_schulz for layer in rank.layers) / (layout.tensor * setting.shards)
        seconds += flops / (device.matmul_tflops * 1e12)
        seconds += _ring(setting, 4 * rank.matrices * setting.shards, setting.shards, layout.tensor, len(rank.layers))
    if not setting.parallel.cpu_offload:
        return seconds, 0.0
    fetched = MASTER * rank.own * (2 * setting.micro_batches if setting.freed else 1)
    return 0.0, (fetched + MASTER * rank.own + ADAMW * rank.own) / (device.host_gbs * 1e9)


def _rate(setting: Setting, size: int, stride: int) -> float:
    """Bytes a second that each of `size` processes, `stride` apart, gets in a ring: across machines, all those of one
    machine share what they receive."""
    device = setting.device
    if size * stride <= device.per_node:
        return device.link_gbs * 1e9
    members = max(1, device.per_node // stride)
    return min(device.link_gbs, members * device.network_gbs) * 1e9


def _ring(setting: Setting, total: float, size: int, stride: int, count: float) -> float:
    """Seconds for all-gathers or reduce-scatters, `count` of them, whose larger sides add up to `total` bytes."""
    if size == 1 or not total:
        return 0.0
    moved = total * (size - 1) / size
    return moved / _rate(setting, size, stride) + count * setting.device.latency_us * 1e-6 * math.log2(size)


def _exchange(setting: Setting, total: float, size: int, stride: int, count: float) -> float:
    """Seconds for all-to-alls: what leaves a machine leaves through the one link of its process."""
    if size == 1 or not total:
        return 0.0
    device = setting.device
    here = min(size, max(1, device.per_node // stride))
    away = total * (size - here) / size / (device.network_gbs * 1e9)
    near = total * (here - 1) / size / (device.link_gbs * 1e9)
    return max(away, near) + count * device.latency_us * 1e-6 * math.log2(size)
