"""benchmarks/serve.py runs, and its workload is the one that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_case_of_ours(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    cases = "s1,s2,latency,poisson,mla,moe,step"
    command = [sys.executable, str(ROOT / "benchmarks/serve.py"), "--tiny", "--cases", cases, "--repeat", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(results)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(results.read_text())
    assert set(found) == {"device", "torch", *cases.split(",")}
    assert found["s1"]["tokens/s"] > 0
    assert [row["requests/s"] for row in found["poisson"]] == [20, 60, 120]


def test_the_workload_is_that_of_the_published_numbers() -> None:
    code = "import argparse, serve; a, b = serve.s1(argparse.Namespace(tiny=False)); print(sum(map(len, a)), sum(b))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split() == ["142827", "133966"], done.stderr[-2000:]
