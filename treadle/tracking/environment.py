"""What a run ran on: code revision, versions and hardware. No hostname; the command line is kept as it was typed."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

GIB = 2**30


def environment() -> dict[str, Any]:
    """The facts written to `environment.json`. Memory is in GiB. A fact that cannot be found is None or empty."""
    packages = installed_packages()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_state(Path.cwd()),
        "treadle": packages.get("treadle"),
        "python": platform.python_version(),
        "torch": packages.get("torch"),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "packages": packages,
    }


def installed_packages() -> dict[str, str]:
    """Version of every installed distribution, by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed distribution has none
            found.setdefault(name, distribution.version)  # the first on sys.path is the one that is imported
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision, branch, and whether tracked files differ from it; None outside a repository or without git."""
    revision = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if revision is None:
        return None
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {
        "revision": revision,
        "branch": _output("git", "-C", str(folder), "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu() -> dict[str, Any]:
    """Model, cores this process may use, and memory in GiB."""
    import psutil

    return {
        "model": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and driver of each GPU that this process can use (of the machine, if torch is not in use)."""
    query = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (query or "").splitlines() if line.count(",") == 2]
    # Only a process that computes with torch has loaded it; loading it here for a list of names would take seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return [{"name": name, "memory_gib": _gib_from_mib(memory), "driver": driver} for name, memory, driver in rows]
    driver = rows[0][2] if rows else None
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_gib": round(d.total_memory / GIB, 1), "driver": driver} for d in devices]


def _gib_from_mib(text: str) -> float | None:
    with contextlib.suppress(ValueError):  # unified-memory machines answer "[N/A]"
        return round(float(text) / 1024, 1)
    return None


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None


def _output(*command: str) -> str | None:
    # GIT_OPTIONAL_LOCKS: a look at the state must not get in the way of the user's own git.
    settings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=settings)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
