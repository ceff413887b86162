"""Linear layers in fp8 against bf16, forward and backward, compiled: the matrices of a model of 1.5 B parameters.

    python benchmarks/float8.py [--rows 32768]

Weights are float32, as in training: casting and scaling of them, of activations and of gradients is counted, for both.
Prints a table: inputs, outputs, milliseconds of bf16 and fp8 (median and spread), ratio, TFLOP/s, error of y.
"""

import argparse
import statistics
import time

import torch

from treadle.nn.linear import Linear
from treadle.parallel.float8 import Float8Linear
from treadle.parallel.mesh import find_device
from treadle.train.hardware import device_name

SHAPES = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)]  # qkv, out, gate and up, down


def seconds(form: type[Linear], x: torch.Tensor, outputs: int, repeats: int) -> tuple[list[float], torch.Tensor]:
    """Of each forward and backward; and y."""
    layer = Linear(x.shape[1], outputs).to(x.device)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight, std=0.02)
    layer.__class__ = form
    run = torch.compile(layer, fullgraph=True, dynamic=False)
    dy = torch.randn(x.shape[0], outputs, device=x.device, dtype=x.dtype) * 1e-3
    found = []
    for number in range(repeats + 3):
        layer.weight.grad = x.grad = None
        wait(x.device)
        start = time.perf_counter()
        y = run(x)
        y.backward(dy)
        wait(x.device)
        if number >= 3:
            found.append(time.perf_counter() - start)
    return found, y.detach()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device = find_device("auto")
    print(f"{device_name(device)}, torch {torch.__version__}, {arguments.rows} rows, median of {arguments.repeats}")
    print("| inputs | outputs | bf16 ms | fp8 ms | bf16 / fp8 | bf16 TFLOP/s | fp8 TFLOP/s | error of y |")
    for inputs, outputs in SHAPES:
        torch._dynamo.reset()
        x = torch.randn(arguments.rows, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
        plain, expected = seconds(Linear, x, outputs, arguments.repeats)
        narrow, found = seconds(Float8Linear, x, outputs, arguments.repeats)
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        times = [statistics.median(each) for each in (plain, narrow)]
        spread = [(max(each) - min(each)) / statistics.median(each) for each in (plain, narrow)]
        tflops = [6e-12 * arguments.rows * inputs * outputs / each for each in times]
        shown = [f"{1e3 * t:.3f} ± {50 * s:.0f} %" for t, s in zip(times, spread, strict=True)]
        print(
            f"| {inputs} | {outputs} | {shown[0]} | {shown[1]} | {times[0] / times[1]:.2f} | {tflops[0]:.0f} | "
            f"{tflops[1]:.0f} | {error:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
