"""The frame of the command line: quick to start, errors as messages, bugs as tracebacks."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import treadle
from treadle import cli
from treadle.errors import ConfigError

HEAVY = ("torch", "transformers", "matplotlib", "datasets", "pyarrow")


@pytest.fixture
def fail(monkeypatch):
    """A command `train` that raises the given error."""

    def _fail(error: BaseException) -> None:
        def train() -> None:
            """Fails."""
            raise error

        module = types.ModuleType("treadle.cli.train")
        module.train = train
        monkeypatch.setitem(sys.modules, "treadle.cli.train", module)
        monkeypatch.setattr(cli._LazyGroup, "list_commands", lambda self, ctx: ["train"])

    return _fail


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from treadle.cli import app\n"
        "try: app(['--help'])\n"
        f"finally: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Compose, train, sample" in result.stdout
    assert "HEAVY []" in result.stdout


def test_every_command_that_exists_is_listed():
    result = run("--help")
    assert result.exit_code == 0
    folder = Path(cli.__file__).parent
    for name in (*cli.COMMANDS, *cli.GROUPS):
        assert (f"│ {name} " in result.output) == (folder / f"{name}.py").exists()


def test_every_command_module_is_registered():
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert modules <= {*cli.COMMANDS, *cli.GROUPS}


def test_version():
    assert run("--version").output == f"treadle {treadle.__version__}\n"


def test_unknown_command_and_no_command():
    assert run("trian").exit_code == 2
    assert "Commands" in run().output


def test_our_errors_are_one_message(fail):
    fail(ConfigError("model.layers[0].mixer.heads: 3 does not divide [b]dim[/b]=64"))
    result = run("train")
    assert result.exit_code == 2
    assert result.stderr == "error: model.layers[0].mixer.heads: 3 does not divide [b]dim[/b]=64\n"
    assert result.stdout == ""


def test_debug_keeps_the_traceback(fail):
    error = ConfigError("x")
    fail(error)
    assert run("--debug", "train").exception is error


def test_bugs_keep_the_traceback(fail):
    error = ZeroDivisionError("x")
    fail(error)
    assert run("train").exception is error


def test_interrupt_is_quiet(fail):
    fail(KeyboardInterrupt())
    result = run("train")
    assert (result.exit_code, result.output) == (130, "")


def test_a_bug_prints_a_plain_traceback_without_locals():
    code = (
        "import sys, types; m = sys.modules['treadle.cli.train'] = types.ModuleType('treadle.cli.train')\n"
        "def train():\n  secret = 'hush' + 'hush'; 1 / 0\n"
        "m.train = train\n"
        "from treadle import cli; cli._LazyGroup.list_commands = lambda self, ctx: ['train']\n"
        "sys.argv = ['treadle', 'train']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "hushhush" not in result.stderr
