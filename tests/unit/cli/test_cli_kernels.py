"""`treadle kernels` where there is no GPU."""

import pytest
from typer.testing import CliRunner

from treadle import kernels
from treadle.cli import app
from treadle.kernels import operation


def test_list_names_every_operation() -> None:
    result = CliRunner().invoke(app, ["kernels", "list"])
    assert result.exit_code == 0
    for name in kernels.OPERATIONS:
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "rms_nrom"], "no operation 'rms_nrom'. Did you mean 'rms_norm'"),
        (["check", "adamw_step", "--backend", "mojo"], "adamw_step has no backend mojo here: not written"),
        (["check", "rms_norm", "--backend", "tilelang"], "no backend tilelang here: not installed: pip install"),
        (["check", "--device", "cpu"], "nothing of backend triton can be checked on cpu"),
        (["bench"], "bench needs a GPU"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = operation.find_spec
    monkeypatch.setattr(operation, "find_spec", lambda name: None if name == "tilelang" else found(name))
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
