"""Kernels of every backend: errors against float64, times beside the hardware's floor and PyTorch's compiler; and whole
layers with and without them.

    python benchmarks/kernels.py [--layers] [--ship] [OPERATION ...]

--ship writes the table of this kind of GPU that comes with the package.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from treadle import kernels
from treadle.attention import AttentionContext
from treadle.kernels import tables
from treadle.kernels.measure import bench, check, machine, machine_rates, microseconds, table
from treadle.nn.attention import AttentionConfig
from treadle.nn.block import PreNormConfig
from treadle.nn.feedforward import GatedConfig
from treadle.nn.moe import MoEConfig
from treadle.nn.norm import RMSNormConfig

ATTENTION = AttentionConfig(heads=32, kv_heads=8)
NORMED = AttentionConfig(heads=32, kv_heads=8, qk_norm=RMSNormConfig())
LAYERS = {  # model dim, rows, length, layer
    "dense 2048/8192": (2048, 4, 8192, PreNormConfig(mixer=ATTENTION, feedforward=GatedConfig(dim=8192))),
    "qk_norm 4096/14336": (4096, 1, 8192, PreNormConfig(mixer=NORMED, feedforward=GatedConfig(dim=14336))),
    "moe 2048/1024": (
        2048,
        4,
        4096,
        PreNormConfig(mixer=ATTENTION, feedforward=MoEConfig(experts=32, top_k=4, dim=1024)),
    ),
}
GROUPS = {
    "norms": ("rms_norm", "rms_norm_backward"),
    "rope": ("rope", "rope_backward"),
    "gates": ("gated_activation", "gated_activation_backward"),
    "expert rows": ("spread_rows", "combine_rows", "combine_rows_backward"),
}


def layer_step(dim: int, rows: int, length: int, config: PreNormConfig) -> Callable[[], None]:
    """Forward and backward of one layer in bf16 with fp32 weights."""
    with torch.device("cuda"):
        layer = config.build(dim, length)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x_BSD = torch.randn(rows, length, dim, dtype=torch.bfloat16, requires_grad=True)
        context = AttentionContext.causal(rows, length, device="cuda")
    position = layer.mixer.position
    context = replace(context, tables={position.key: position.tables(context)})
    grad_BSD = torch.randn_like(x_BSD)

    def step(run: Callable[..., torch.Tensor] = layer) -> None:
        run(x_BSD, context).backward(grad_BSD)
        for parameter in (x_BSD, *layer.parameters()):
            parameter.grad = None

    step.layer = layer
    return step


def time_layers(names: list[str]) -> None:
    print("| layer | PyTorch | eager | compiled | " + " | ".join(f"compiled, {group}" for group in GROUPS) + " | all |")
    print("|---" * (5 + len(GROUPS)) + "|")
    for name in names or LAYERS:
        step, cells = layer_step(*LAYERS[name]), []
        with kernels.use(all="torch"):
            cells.append(microseconds([step]))
        cells.append(microseconds([step]))
        every = {operation: "triton" for group in GROUPS.values() for operation in group}
        for group in (None, *GROUPS, "all"):
            operations = every if group == "all" else {} if group is None else dict.fromkeys(GROUPS[group], "triton")
            torch.compiler.reset()
            compiled = torch.compile(step.layer, dynamic=False)
            with kernels.use(all="torch", **operations):
                cells.append(microseconds([lambda compiled=compiled, step=step: step(compiled)]))
        print(f"| {name} | " + " | ".join(f"{time / 1e3:.2f}" for time in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="operations, or with --layers layers; default: all")
    parser.add_argument("--layers", action="store_true", help="time whole layers, in ms, and nothing else")
    parser.add_argument("--quick", action="store_true", help="check and compile only")
    parser.add_argument("--ship", action="store_true", help="write the table that ships with the package")
    args = parser.parse_args()
    if args.layers:
        return time_layers(args.names)
    rates = kernels.Floor(1.0, 1.0) if args.quick else machine_rates()
    print(f"{machine()}: copies at {rates.bytes / 1e12:.2f} TB/s, matmuls at {rates.flops / 1e12:.0f} TFLOP/s")
    rows, findings = [], []
    for name in args.names or kernels.OPERATIONS:
        operation = kernels.OPERATIONS[name]
        torch.manual_seed(0)
        torch.compiler.reset()
        for backend in kernels.BACKENDS:
            if operation.unusable(backend) is None:
                for finding in check(operation, backend, "cuda"):
                    findings.append(finding)
                    if args.quick or not finding.good:
                        print(finding, flush=True)
        rows += bench(operation, rates, quick=args.quick)
    for line in table(rows, findings):
        print(line)
    if args.ship:
        tables.write(tables.SHIPPED / f"{tables.architecture()}.json", rows, machine())


if __name__ == "__main__":
    main()
