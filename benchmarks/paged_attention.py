"""Attention to pages: the inference engine's kernels, decode and prefill, beside what memory and tensor cores allow.

    python benchmarks/paged_attention.py

Each row is one layer's attention in bf16 with pages of 64 tokens, in a CUDA graph, caches cold: calls go round among
inputs that are together larger than the L2 cache. Bytes are those of keys, values, queries and outputs, each once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from treadle import kernels
from treadle.kernels.measure import ROTATED, machine, machine_rates, microseconds

PAGE = 64
HEADS = {"16/8 x 128": (16, 8, 128, 128), "32/8 x 128": (32, 8, 128, 128), "latent 128 x 576/512": (128, 1, 576, 512)}
DECODE = [(batch, context) for batch in (1, 32, 128, 256) for context in (512, 1024, 4096)]
PREFILL = [(1, 1024, 1024), (8, 1024, 1024), (8, 1024, 4096)]  # requests, new tokens, all tokens


def graph(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that replays all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


def measured(batch: int, new: int, context: int, heads: str) -> tuple[float, kernels.Floor]:
    """Microseconds of a call, and what it has to move and compute."""
    operation = kernels.PAGED_ATTENTION
    shape = (batch, new, context, *HEADS[heads], PAGE, 0, 0, 0, 0)
    sets = [operation.arguments(shape, torch.bfloat16, "cuda")]
    floor = operation.floor(*sets[0])
    while len(sets) * floor.bytes < ROTATED and len(sets) < 16:
        sets.append(operation.arguments(shape, torch.bfloat16, "cuda"))
    calls = [lambda args=args: torch.ops.treadle.paged_attention(*args) for args in sets]
    repeated = calls * max(1, 8 // len(calls))
    return microseconds([graph(repeated)]) / len(repeated), floor


def table(rates: kernels.Floor) -> Iterator[str]:
    yield "| heads | requests | new tokens | tokens | us | TB/s | of copy | TFLOP/s | of matmul |"
    yield "|---" * 9 + "|"
    for heads in HEADS:
        for batch, new, context in [*((batch, 1, context) for batch, context in DECODE), *PREFILL]:
            time, floor = measured(batch, new, context, heads)
            moved, computed = floor.bytes / time * 1e6, floor.flops / time * 1e6
            shares = f"{moved / rates.bytes:.0%} | {computed / 1e12:.0f} | {computed / rates.flops:.0%}"
            yield f"| {heads} | {batch} | {new} | {context} | {time:.1f} | {moved / 1e12:.2f} | {shares} |"


def main() -> None:
    rates = machine_rates()
    print(f"{machine()}: copies at {rates.bytes / 1e12:.2f} TB/s, matmuls at {rates.flops / 1e12:.0f} TFLOP/s")
    torch.manual_seed(0)
    with torch.inference_mode():
        for line in table(rates):
            print(line, flush=True)


if __name__ == "__main__":
    main()
