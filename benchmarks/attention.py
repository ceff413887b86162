"""Attention backends: error against float64 on a small case, speed on large ones. One table.

python benchmarks/attention.py [--quick]
"""

import argparse
import functools
import statistics

import torch

from treadle.attention import BACKENDS, AttentionContext, AttentionFacts, attend

SHAPES = [  # batch, length, heads, kv heads, head dim
    (4, 8192, 32, 8, 64),
    (2, 8192, 32, 8, 128),
]
CASES = {
    "causal": ({}, None),
    "window 1024": ({"window": 1024}, None),
    "documents of 1024": ({}, 1024),
    "softcap": ({"softcap": 50.0}, None),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    B, S, H, G, K = shape
    return [torch.randn(B, S, heads, K, dtype=dtype, device=device, requires_grad=True) for heads in (H, G, G)]


def context_for(B: int, S: int, document: int | None, backend: str, device: str) -> AttentionContext:
    if document is None:
        return AttentionContext.causal(B, S, device=device, backend=backend)
    starts_BS = torch.rand(B, S, device=device) < 1 / document
    return AttentionContext.packed(starts_BS.cumsum(1).int(), backend=backend)


def visited(context: AttentionContext, facts: AttentionFacts) -> float:
    """Query-key pairs that are visible, exactly."""
    seen = context.positions_BS.double() + 1
    return float((seen if facts.window is None else seen.clamp(max=facts.window)).sum())


def error(name: str, facts: AttentionFacts, document: int | None, device: str) -> float:
    """Relative error of output and gradients against the reference in float64."""
    torch.manual_seed(0)
    narrow = inputs((2, 700, 8, 2, 64), torch.bfloat16, device)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    context = context_for(2, 700, document, name, device)
    grad = torch.randn_like(narrow[0])
    outs = []
    for tensors, backend in ((narrow, name), (wide, "reference")):
        out = attend(
            *tensors,
            facts,
            AttentionContext(
                context.positions_BS, context.documents_BS, context.cumulative_lengths_N, context.max_length, backend
            ),
        )
        out.backward(grad.to(out.dtype))
        outs.append([out.detach().double(), *(t.grad.double() for t in tensors)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*outs, strict=True))


def milliseconds(function, repeats: int) -> float:
    times = []
    for _ in range(3):
        function()
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 5 if parser.parse_args().quick else 20
    device = "cuda"
    print("| shape B,S,H,G,K | case | backend | error vs fp64 | forward TFLOP/s | forward+backward TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        torch.compiler.reset()  # each shape and mask compiles flex anew, within dynamo's limit of recompilations
        B, S, H, _, K = shape
        for case, (fact, document) in CASES.items():
            facts = AttentionFacts(**fact)
            for name, backend in BACKENDS.items():
                context = context_for(B, S, document, name, device)
                tensors = inputs(shape, torch.bfloat16, device)
                reason = backend.unsupported(tensors[0], facts, context)
                # The reference and a dense mask would take tens of GiB here.
                if reason or name == "reference" or (name == "sdpa" and case != "causal"):
                    continue
                pairs = visited(context, facts) * H * K * 4
                grad = torch.randn_like(tensors[0])
                run = functools.partial(attend, *tensors, facts, context)
                forward = milliseconds(run, repeats)
                both = milliseconds(lambda run=run, grad=grad: run().backward(grad), repeats)
                print(
                    f"| {shape} | {case} | {name} | {error(name, facts, document, device):.1e} | "
                    f"{pairs / forward / 1e9:.0f} | {3.5 * pairs / both / 1e9:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
