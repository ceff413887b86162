"""`treadle kernels`: which kernels there are, whether they are right, and how near they come to the hardware."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from treadle.config.base import nearest
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from treadle.kernels import Operation

app = typer.Typer(no_args_is_help=True, help="List, check and time the operations that have kernels of their own.")

Names = Annotated[list[str] | None, typer.Argument(metavar="[OPERATION]...", help="Default: all.")]


@app.command("list")
def list_operations(names: Names = None) -> None:
    """Each operation, and of each backend whether it has an implementation that can be used here."""
    from treadle.kernels import BACKENDS

    table = Table("operation", *BACKENDS, box=None)
    missing: dict[str, None] = {}
    for operation in _chosen(names):
        reasons = [operation.unusable(backend) for backend in BACKENDS]
        missing |= {reason: None for reason in reasons if reason and reason.startswith("not installed")}
        table.add_row(operation.name, *("yes" if r is None else r.partition(":")[0] for r in reasons))
    console = Console()
    console.print(table)
    for reason in missing:
        console.print(reason, markup=False, highlight=False)
    console.print("Every operation has a definition in PyTorch (backend torch).", highlight=False)


@app.command()
def check(
    names: Names = None,
    backend: Annotated[str, typer.Option(help="Of which backend.")] = "triton",
    device: Annotated[str, typer.Option(help="Where: cuda, or cpu: Mojo, or Triton with TRITON_INTERPRET=1.")] = "cuda",
) -> None:
    """Compare implementations with their definition in float64. Exit code 1 if one is wrong."""
    import torch

    from treadle.kernels.measure import check

    torch.manual_seed(0)
    able, findings = [], []
    for operation in _chosen(names):
        reason = operation.unusable(backend)
        if reason is not None and names:
            raise ConfigError(f"kernels: {operation.name} has no backend {backend} here: {reason}")
        able += [operation] if reason is None else []
    if able and device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("kernels: PyTorch sees no GPU; take --device cpu (Mojo, or Triton with TRITON_INTERPRET=1)")
    for operation in able:
        for finding in check(operation, backend, device):
            typer.echo(str(finding))
            findings.append(finding)
    if not findings:
        raise ConfigError(f"kernels: nothing of backend {backend} can be checked on {device}; see treadle kernels list")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def bench(
    names: Names = None,
    save: Annotated[bool, typer.Option("--save", help="Let these times decide from now on, for this user.")] = False,
) -> None:
    """Time implementations on this GPU, beside their definition as it is and compiled, and what the hardware allows."""
    import torch

    from treadle.kernels import tables
    from treadle.kernels.measure import bench, machine, machine_rates, table

    if not torch.cuda.is_available():
        raise ConfigError("kernels: bench needs a GPU, and PyTorch sees none")
    rates = machine_rates()
    typer.echo(
        f"{machine()['device']}: copies at {rates.bytes / 1e12:.2f} TB/s, matmuls at {rates.flops / 1e12:.0f} TFLOP/s"
    )
    rows = [row for operation in _chosen(names) for row in bench(operation, rates)]
    for line in table(rows):
        typer.echo(line)
    if save:
        path = tables.user_table(tables.architecture())
        tables.write(path, rows, machine())
        typer.echo(f"wrote {path}")


def _chosen(names: list[str] | None) -> "list[Operation]":
    from treadle.kernels import OPERATIONS

    for name in names or ():
        if name not in OPERATIONS:
            raise ConfigError(f"kernels: no operation '{name}'.{nearest(name, OPERATIONS)}")
    return [OPERATIONS[name] for name in names or OPERATIONS]
