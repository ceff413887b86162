"""The `treadle` command: one file per subcommand in this folder, imported only when it is asked for.

Errors that the user can act on (`TreadleError`) are printed as one message, exit code 2; an interrupt exits with 130;
anything else is a bug and keeps its traceback.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from treadle import __version__
from treadle.errors import TreadleError

# In the order of `treadle --help`. A command is the function of the same name in its module; a group is its `app`.
COMMANDS = ("train", "plan", "generate", "chat", "serve")
SECONDS_FOR_THE_LEADER = 3.0  # what all processes complain about, the leading one says, and its end is theirs
GROUPS = ("tokenizer", "data", "model", "convert", "adapter", "runs", "kernels", "config")


class _LazyGroup(TyperGroup):
    """Imports a subcommand's module when it is looked up, and turns our errors into messages."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in (*COMMANDS, *GROUPS) if find_spec(f"{__name__}.{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{__name__}.{cmd_name}")
        command = get_group(module.app) if cmd_name in GROUPS else _single(getattr(module, cmd_name))
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TreadleError as error:
            if ctx.params.get("debug"):
                raise
            if not _leads():
                time.sleep(SECONDS_FOR_THE_LEADER)
            if _leads() or not error.everywhere:
                _print_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _single(function: Callable[..., Any]) -> Any:
    single = typer.Typer(add_completion=False)
    single.command()(function)
    return get_command(single)


def _leads() -> bool:
    """Whether this is the process of a run that prints (the others of a torchrun know their rank)."""
    return os.environ.get("RANK", "0") == "0"


def _print_error(error: TreadleError) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), str(error))
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"treadle {__version__}")
        raise typer.Exit()


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback, without the values of locals
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of every error.")] = False,
) -> None:
    """Compose, train, sample and measure language models."""
    shown = logging.StreamHandler()  # to the terminal only what needs attention; the run's log.txt holds the rest
    shown.setLevel(logging.WARNING if _leads() else logging.ERROR)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[shown])


def main() -> None:
    """The `treadle` script."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the launcher is told which process failed first, and why
        from torch.distributed.elastic.multiprocessing.errors import record

        sys.exit(record(app)())
    sys.exit(app())
