"""Configurations measured one after the other, each in processes of its own with a time limit; what is known is kept.

What train_parallel.py and plan_accuracy.py share.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_processes(command: list[str], number: int, folder: Path, seconds: float) -> dict[str, Any]:
    """What `number` processes of `command --answer FILE` write there, or `failed`. folder: for what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "result.json"
    answer.unlink(missing_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    logs = [folder / f"rank-{rank}.txt" for rank in range(number)]
    processes = []
    for rank, log in enumerate(logs):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        environment = {**os.environ, **place, **{key: str(value) for key, value in names.items()}}
        environment.setdefault("OMP_NUM_THREADS", str((os.cpu_count() or 1) // number))
        with log.open("w") as file:
            said = {"env": environment, "stdout": file, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen([*command, "--answer", str(answer)], **said))  # type: ignore[call-overload]
    deadline = time.monotonic() + seconds
    late = False
    try:
        while any(process.poll() is None for process in processes) and not late:
            if any(process.poll() for process in processes):
                time.sleep(2)  # the first to fail may not be the first to end
                break
            late = time.monotonic() > deadline
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if answer.exists():  # also of processes that did not end
        return json.loads(answer.read_text())  # type: ignore[no-any-return]
    if late:
        return {"failed": f"not ready after {seconds:.0f} s"}
    failed = [log for process, log in zip(processes, logs, strict=True) if process.returncode > 0]
    return {"failed": reason((failed or logs)[0].read_text())}


def reason(log: str) -> str:
    """The error's own line, where there is one."""
    lines = [line for line in log.strip().splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if not line.startswith((" ", "[rank")) and "Error" in line.partition(":")[0]]
    return (errors or lines)[-1][:300]


def recorded(file: Path | None) -> dict[str, dict[str, Any]]:
    """The last result of each configuration in a file of them."""
    if file is None or not file.exists():
        return {}
    return {result["layout"]: result for result in map(json.loads, file.read_text().splitlines())}


def measure_all(
    names: list[str],
    start: Callable[[str, float], dict[str, Any]],
    file: Path | None,
    *,
    timeout: float,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """The results of all: of those that `file` has not, what `start(name, seconds left)` finds, appended to it at once.

    Nothing is started that might end after `seconds`; Ctrl-C ends it with what is there.
    """
    results, began = recorded(file), time.monotonic()
    # What has failed before comes after what has never run.
    due = sorted((name for name in names if "losses" not in results.get(name, {})), key=lambda name: name in results)
    with contextlib.suppress(KeyboardInterrupt):
        for name in due:
            left = seconds - (time.monotonic() - began)
            if left < min(60.0, timeout):
                print(f"{len(due) - due.index(name)} layouts are left; run the same command again")
                break
            result = start(name, min(timeout, left))
            results[name] = {"layout": name, **result}
            spoken = result.get("failed") or f"{result['tokens_per_second']:,.0f} tokens/s"
            print(f"{time.monotonic() - began:5.0f} s  {name}: {spoken}", flush=True)
            if file:
                with file.open("a") as out:
                    out.write(json.dumps(results[name]) + "\n")
    return results
