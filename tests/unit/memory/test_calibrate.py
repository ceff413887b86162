"""`treadle plan --calibrate`, on the CPU that is here."""

import time

import pytest
import torch
from typer.testing import CliRunner

from treadle import cli
from treadle.errors import ConfigError
from treadle.memory.calibrate import calibrate
from treadle.memory.devices import DEVICES, calibrated, find_device


def test_rates_are_those_of_this_machine():
    found = calibrate(torch.device("cpu"), seconds=0.1)
    x, y = torch.randn(512, 512), torch.randn(512, 1024)
    x @ y
    start = time.perf_counter()
    for _ in range(50):
        x @ y
    rate = 50 * 2 * 512 * 512 * 1024 / (time.perf_counter() - start)
    assert 0.1 < found.matmul_tflops * 1e12 / rate < 10  # other tests may have the cores at either time
    assert 0 < found.attention_tflops <= 2 * found.matmul_tflops
    assert 0.5 < found.launch_us < 100
    assert found.per_node == 1


@pytest.mark.slow
def test_processes_tell_what_their_link_reaches():
    found = calibrate(torch.device("cpu"), 2, seconds=0.02)
    assert found.per_node == 2
    assert found.link_gbs > 0.01
    assert 1 < found.latency_us < 1e5


def test_what_was_measured_goes_first_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_device("here") is DEVICES["cpu"] or torch.cuda.is_available()
    result = CliRunner().invoke(cli.app, ["plan", "--calibrate"])
    assert result.exit_code == 0, result.output
    path = calibrated("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.cuda.is_available() or str(path) in result.output
    assert torch.cuda.is_available() or find_device("here").memory_gib != DEVICES["cpu"].memory_gib
    assert find_device("cpu") is DEVICES["cpu"]  # by its plain name as ever


def test_a_drivers_name_is_looked_up_among_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_device("NVIDIA H200") is DEVICES["h200"]
    path = calibrated("NVIDIA H200")
    path.parent.mkdir(parents=True)
    values = {**DEVICES["h200"].model_dump(exclude_none=True), "name": "NVIDIA H200", "matmul_tflops": 700.0}
    path.write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    assert find_device("NVIDIA H200").matmul_tflops == 700
    assert find_device("h200") is DEVICES["h200"]


def test_other_devices_are_refused():
    with pytest.raises(ConfigError, match=r"meta.*cuda, cpu"):
        calibrate(torch.device("meta"))
