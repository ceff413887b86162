"""Compile the kernels in Mojo for Hopper GPUs, where there is none: `make kernels-mojo`.

    python build.py [MOJO]

Mojo writes PTX, and ptxas (of Triton's wheel, or on the PATH) makes one cubin of each source's kernels, and says what
they need. The cubins and the manifest are part of the package; the same sources give the same bytes.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NOT_ON_GPU = "cpu.mojo"
KINDS = {"Memory": "pointer", "Int32": "int", "Int64": "long", "Float32": "float"}


def digests(pattern: str) -> dict[str, str]:
    files = (path for path in sorted(FOLDER.glob(pattern)) if path.name != NOT_ON_GPU)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tool(name: str) -> str:
    """Of CUDA's tools, the one in Triton's wheel (its cubins run with older drivers too), or that on the PATH."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the PATH nor in an installed Triton: pip install triton")
    return found


def kernel(name: str, text: str) -> tuple[str, dict[str, Any]]:
    """What emit.mojo wrote for one kernel: the body of its PTX, under its own name, and what the manifest says."""
    about, ptx = text.split("\n", 1)
    found = json.loads(about)
    return ptx.split(".address_size 64", 1)[1].replace(found.pop("entry"), name), found


def arguments(source: str, operation: str) -> list[str]:
    """As the source declares them."""
    declared = re.search(rf"^def {operation}\s*\[.*?\]\((.*?)\):$", source, re.DOTALL | re.MULTILINE)
    if declared is None:
        raise ValueError(f"no kernel {operation}[...](...) in {source[:80]!r}")
    return [KINDS[kind] for kind in re.findall(r"\w+: (\w+)", declared[1])]


def main(mojo: str = "mojo") -> None:
    kernels: dict[str, dict[str, Any]] = {}
    bodies: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        emit = [mojo, "run", "-I", str(FOLDER), str(FOLDER / "emit.mojo"), folder]
        subprocess.run(emit, check=True, stderr=subprocess.DEVNULL)
        for path in sorted(Path(folder).glob("*.ptx")):
            source, name, _ = path.name.split(".")
            body, about = kernel(name, path.read_text())
            bodies[source] = bodies.get(source, "") + body
            about["arguments"] = arguments((FOLDER / f"{source}.mojo").read_text(), about["operation"])
            kernels.setdefault(source, {})[name] = about
        for source, body in bodies.items():
            ptx = Path(folder) / source
            ptx.write_text(f".version 8.5\n.target sm_90a\n.address_size 64\n{body}")
            cubin = FOLDER / f"{source}.cubin"
            command = [tool("ptxas"), "-v", "-arch=sm_90a", str(ptx), "-o", str(cubin)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            for name, needs in re.findall(
                r"Compiling entry function '(\w+)'(.*?)(?=ptxas info\s+: Compiling|\Z)", said, re.S
            ):
                kernels[source][name] |= _needs(needs)
    versions = {"mojo": _version([mojo]), "ptxas": _version([tool("ptxas")])}
    lines = ",\n".join(
        f'"{source}": {{\n' + ",\n".join(f'"{n}": {json.dumps(k)}' for n, k in known.items()) + "\n}"
        for source, known in kernels.items()
    )
    about = {"versions": versions, "sources": digests("*.mojo"), "cubins": digests("*.cubin")}
    head = ",\n".join(f'"{key}": {json.dumps(value, indent=1)}' for key, value in about.items())
    (FOLDER / "manifest.json").write_text(f'{{{head},\n"kernels": {{\n{lines}\n}}}}\n')


def _needs(said: str) -> dict[str, int]:
    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    patterns = {
        "registers": r"Used (\d+) registers",
        "shared": r"(\d+) bytes smem",
        "spills": r"(\d+) bytes spill stores",
    }
    return {name: number(pattern) for name, pattern in patterns.items()}


def _version(command: list[str]) -> str:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else said.strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
