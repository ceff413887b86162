"""`treadle kernels` where there is no GPU."""

import pytest
from typer.testing import CliRunner

from treadle import kernels
from treadle.cli import app


def test_list_names_every_operation() -> None:
    result = CliRunner().invoke(app, ["kernels", "list"])
    assert result.exit_code == 0
    for name in kernels.OPERATIONS:
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "rms_nrom"], "no operation 'rms_nrom'. Did you mean 'rms_norm'"),
        (["check", "rms_norm", "--backend", "mojo"], "rms_norm has no backend mojo here: not written"),
        (["check", "--device", "cpu"], "nothing of backend triton can be checked on cpu"),
        (["bench"], "bench needs a GPU"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
