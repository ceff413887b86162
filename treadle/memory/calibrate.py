"""What the devices of this machine reach, measured: the constants of `treadle plan` for the machine at hand.

Each rate is that of calls which follow each other for a while, as in training, where the clock falls under load. The
devices should be idle otherwise. B batch, S sequence, H heads, K head dim, N rows, D model dim, F feed-forward dim.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # defines operators below
import torch.multiprocessing

from treadle.attention import AttentionContext, AttentionFacts, attend
from treadle.errors import ConfigError
from treadle.memory.devices import Device
from treadle.memory.plan import GIB
from treadle.parallel.float8 import BACKWARD, FORWARD, not_float8_because
from treadle.train.hardware import device_name, peak_flops

SIZES = {  # N, D, F of matmuls; B, S, width of attention; bytes of a copy; of a message
    "cuda": ((16384, 4096, 14336), (2, 8192, 2048), 1 << 30, 1 << 28),
    "cpu": ((512, 512, 1024), (1, 512, 256), 1 << 25, 1 << 20),
}


def calibrate(device: torch.device, processes: int | None = None, *, seconds: float = 0.8) -> Device:
    """Constants of the device that is here. processes: that send to each other; None: one for each GPU here, on a CPU
    one, which sends nothing: then what links reach stays a guess. seconds: that each rate is measured for.

    Raises ConfigError for a device that is neither a GPU of PyTorch's nor a CPU.
    """
    if device.type not in SIZES:
        raise ConfigError(f"device: '{device}' cannot be calibrated; there are {', '.join(SIZES)}")
    cuda = device.type == "cuda"
    processes = processes or (torch.cuda.device_count() if cuda else 1)
    matmul = _matmul(device, seconds)
    found: dict[str, Any] = {
        "name": device_name(device),
        "matmul_tflops": matmul,
        "peak_tflops": (peak_flops(device) or 0.0) / 1e12 or matmul,
        "attention_tflops": _attention(device, 128, seconds),
        "attention_64_tflops": _attention(device, 64, seconds),
        "bandwidth_tbs": 2 * _copy(device, device, seconds) / 1e12,
        "launch_us": _launch(device, seconds),
        "per_node": processes,
        "link_gbs": 1.0,  # of one device: nobody asks
    }
    if cuda:
        found["host_gbs"] = _copy(device, torch.device("cpu"), seconds) / 1e9
        if not_float8_because(device) is None:
            found["fp8_tflops"] = _float8(device, seconds)
    if processes > 1:
        found |= _messages(device.type, processes)
    if cuda:  # last: by now most kernels have been loaded
        free, total = torch.cuda.mem_get_info(device)
        beside = total - free - torch.cuda.memory_reserved(device)
        found |= {"memory_gib": total / GIB, "context_gib": beside / GIB}
    else:
        found["memory_gib"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Device(**{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()})


def _seconds(call: Callable[[], Any], device: torch.device, lasting: float) -> float:
    """Of one call, when it has been called again and again for about as long as `lasting`."""

    def burst(number: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(number):
            call()
        _wait(device)
        return (time.perf_counter() - start) / number

    burst(3)
    number = max(1, int(lasting / 4 / burst(3)))
    return sorted(burst(number) for _ in range(4))[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul(device: torch.device, seconds: float) -> float:
    """TFLOP/s of a matmul's forward and its two gradients."""
    N, D, F = SIZES[device.type][0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_ND, w_FD, dy_NF = (torch.randn(shape, device=device, dtype=dtype) for shape in ((N, D), (F, D), (N, F)))

    def step() -> None:
        for a, b in ((x_ND, w_FD.t()), (dy_NF, w_FD), (dy_NF.t(), x_ND)):
            torch.mm(a, b)

    return 6 * N * D * F / _seconds(step, device, seconds) / 1e12


def _float8(device: torch.device, seconds: float) -> float:
    """The same of operands in 8 bits; making them takes memory's time, and is planned for as such."""
    N, D, F = SIZES[device.type][0]
    one = torch.ones((), device=device)

    def operand(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16).to(dtype)

    x_ND, w_FD, w_DF = operand(N, D, FORWARD), operand(F, D, FORWARD), operand(D, F, FORWARD)
    dy_NF, dy_FN, x_DN = operand(N, F, BACKWARD), operand(F, N, BACKWARD), operand(D, N, FORWARD)

    def step() -> None:
        torch._scaled_mm(x_ND, w_FD.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        torch._scaled_mm(dy_NF, w_DF.t(), one, one, out_dtype=torch.bfloat16)
        torch._scaled_mm(dy_FN, x_DN.t(), one, one, out_dtype=torch.bfloat16)

    return 6 * N * D * F / _seconds(step, device, seconds) / 1e12


def _attention(device: torch.device, K: int, seconds: float) -> float:
    """TFLOP/s of causal attention, forward and backward, of which the visible half counts."""
    B, S, width = SIZES[device.type][1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    H = width // K
    q, k, v = (torch.randn(B, S, H, K, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    context, dout = AttentionContext.causal(B, S, device=device), torch.randn(B, S, H, K, device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(attend(q, k, v, AttentionFacts(), context), (q, k, v), dout)

    return 3.5 * 2 * B * H * S * S * K / _seconds(step, device, seconds) / 1e12


def _copy(here: torch.device, there: torch.device, seconds: float) -> float:
    """Bytes a second that are copied; to the host and back in turns."""
    size = SIZES[here.type][2]
    away = there.type != here.type
    a = torch.empty(size, dtype=torch.uint8, device=here)
    b = torch.empty(size, dtype=torch.uint8, device=there, pin_memory=away)

    def step() -> None:
        b.copy_(a, non_blocking=True)
        a.copy_(b, non_blocking=True)

    return 2 * size / _seconds(step, here, seconds)


def _launch(device: torch.device, seconds: float) -> float:
    """Microseconds that the host takes for an operation too small for the device to be busy with."""
    x = torch.zeros(1, device=device)
    return 1e6 * _seconds(lambda: x.add_(1), device, seconds / 4)


def _messages(kind: str, processes: int) -> dict[str, float]:
    """What links reach in all-gathers, and what the smallest message takes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (kind, processes, folder)
        torch.multiprocessing.spawn(_sender, arguments, nprocs=processes)  # type: ignore[no-untyped-call]
        return dict(json.loads((Path(folder) / "found.json").read_text()))


def _sender(rank: int, kind: str, processes: int, folder: str) -> None:
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    part = torch.zeros(SIZES[kind][3] // 4, device=device)
    one = torch.zeros(1, device=device)

    def spent(call: Callable[[], Any]) -> float:
        """Of one call; all processes make equally many."""
        for number in (5, 20):
            _wait(device)
            start = time.perf_counter()
            for _ in range(number):
                call()
            _wait(device)
        return (time.perf_counter() - start) / number

    sending, group = torch.ops._c10d_functional, dist.distributed_c10d._get_default_group().group_name
    gathered = spent(lambda: sending.wait_tensor(sending.all_gather_into_tensor(part, processes, group)))
    least = spent(lambda: dist.all_reduce(one))
    if rank == 0:
        moved = part.numel() * 4 * (processes - 1)
        found = {"link_gbs": moved / gathered / 1e9, "latency_us": 1e6 * least / math.log2(processes)}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
