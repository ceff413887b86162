"""What a device and its links reach: the constants that predictions of time rest on, each with where it comes from.

Rates are what kernels reach that follow each other for a while, as in training, where the clock is lower than for one
of them: of the H200 measured, of others the data sheet times the share that the H200 reaches of its own.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from treadle.config import Config, resolve
from treadle.errors import ConfigError
from treadle.train.hardware import device_name


class Device(Config):
    """One accelerator and the machine that it is in. Rates in units per second, bandwidths one way."""

    name: str
    memory_gib: PositiveFloat = Field(description="what a program can allocate, GiB")
    peak_tflops: PositiveFloat = Field(description="dense bf16, data sheet: what MFU divides by")
    matmul_tflops: PositiveFloat = Field(description="large bf16 matmuls reach in a training step")
    fp8_tflops: PositiveFloat | None = Field(None, description="the same in fp8; null: it has none")
    attention_tflops: PositiveFloat = Field(description="forward + backward at head dim 128, 3.5 times the forward")
    attention_64_tflops: PositiveFloat = Field(description="the same at head dim 64 and below")
    bandwidth_tbs: PositiveFloat = Field(description="a copy reads and writes, TB/s")
    per_node: PositiveInt = Field(8, description="devices of a machine")
    link_gbs: PositiveFloat = Field(description="between devices of a machine, GB/s that collectives reach")
    network_gbs: PositiveFloat = Field(45.0, description="to other machines, GB/s for each device")
    host_gbs: PositiveFloat = Field(50.0, description="to host memory, GB/s for each device")
    latency_us: PositiveFloat = Field(10.0, description="a collective takes at least, microseconds")
    launch_us: PositiveFloat = Field(7.0, description="the host takes for an operation, microseconds")
    context_gib: PositiveFloat = Field(0.7, description="taken before the first tensor: CUDA context and kernels")


def _nvidia(name: str, memory: float, peak: float, bandwidth: float, link: float, **others: Any) -> Device:
    """From the data sheet (dense bf16 TFLOP/s, TB/s, GB/s one way), at the shares that an H200 reaches."""
    return Device(
        name=name,
        memory_gib=memory,
        peak_tflops=peak,
        matmul_tflops=round(0.70 * peak),
        attention_tflops=round(0.51 * peak),
        attention_64_tflops=round(0.42 * peak),
        bandwidth_tbs=round(0.88 * bandwidth, 2),
        link_gbs=0.8 * link,  # what NCCL's rings reach of NVLink
        **others,
    )


DEVICES: dict[str, Device] = {
    # Measured by `treadle plan --calibrate`; but links, which are the data sheet's.
    "h200": Device(
        name="h200",
        memory_gib=139.8,
        peak_tflops=989.4,
        matmul_tflops=696,
        fp8_tflops=1287,
        attention_tflops=501,
        attention_64_tflops=412,
        bandwidth_tbs=4.24,
        link_gbs=360,
        host_gbs=55,
        launch_us=7.4,
        context_gib=0.69,
    ),
    "h100": _nvidia("h100", 79.1, 989.4, 3.35, 450, fp8_tflops=1287),
    "a100": _nvidia("a100", 79.1, 312, 2.04, 300, host_gbs=25),
    "b200": _nvidia("b200", 178.0, 2250, 8.0, 900, fp8_tflops=2927),
    "l40s": _nvidia("l40s", 44.4, 362, 0.864, 32, fp8_tflops=471, host_gbs=25),
    "rtx4090": _nvidia("rtx4090", 23.5, 165.2, 1.008, 32, fp8_tflops=215, per_node=1, host_gbs=25),
    "rtx3090": _nvidia("rtx3090", 23.5, 71, 0.936, 32, per_node=1, host_gbs=25),
    # One core of a server: what float32 matmuls of a few hundred rows reach.
    "cpu": Device(
        name="cpu",
        memory_gib=24,
        peak_tflops=0.1,
        matmul_tflops=0.06,
        attention_tflops=0.02,
        attention_64_tflops=0.02,
        bandwidth_tbs=0.01,
        per_node=1,
        link_gbs=5,
        context_gib=0.3,
    ),
}


def calibrated(name: str) -> Path:
    """Where what `treadle plan --calibrate` measured of a device is kept, by its driver's name."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "treadle" / "devices" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.yaml"


def find_device(name: str) -> Device:
    """A device by its name, as data sheets and drivers write it, or from a YAML file with the keys of `Device`.

    `here` is the one of this machine. Of a driver's name, what was measured on this machine goes first.
    Raises ConfigError for another, which says what a file needs.
    """
    here = name == "here"
    if here:
        name = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(name)
    if (here or name not in DEVICES) and calibrated(name).is_file():
        path = calibrated(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        found: Device = resolve(Device, path)
        return found
    plain = re.sub(r"[-_\s]+", " ", name.lower())
    # Boards of the same name that are slower, or two of it, are others.
    if not re.search(r"pcie|nvl|laptop|max q|\bd\b|gb200", plain):
        for key, device in DEVICES.items():
            if re.search(rf"\b{key.replace('rtx', '(geforce )?rtx ?')}\b", plain):
                return device
    near = difflib.get_close_matches(plain, DEVICES, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    needed = [key for key, field in Device.model_fields.items() if field.is_required()]
    raise ConfigError(
        f"device: '{name}' is not known; known: {', '.join(DEVICES)}.{hint} For another give a YAML file with "
        f"{', '.join(needed)} (units: treadle/memory/devices.py)"
    )
