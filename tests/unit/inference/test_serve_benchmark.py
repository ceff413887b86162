"""benchmarks/serve.py runs, and its workload is the one that it names."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CASES = "s1,s2,latency,poisson,mla,moe,step"


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", Path(__file__).parents[3] / "benchmarks/serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are those of a CPU")
def test_every_case_of_ours(serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.json"
    command = ["serve.py", "--tiny", "--cases", CASES, "--repeat", "1", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    serve.main()
    found = json.loads(results.read_text())
    assert set(found) == {"device", "torch", *CASES.split(",")}
    assert found["s1"]["tokens/s"] > 0
    assert [row["requests/s"] for row in found["poisson"]] == [20, 60, 120]


def test_the_workload_is_that_of_the_published_numbers(serve: ModuleType) -> None:
    prompts, new = serve.s1(argparse.Namespace(tiny=False))
    assert (len(prompts), sum(map(len, prompts)), sum(new)) == (256, 142_827, 133_966)
