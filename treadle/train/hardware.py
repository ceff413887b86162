"""What the device can do at most, for MFU."""

import re

import torch

# Dense bf16 tensor-core peaks from the vendors' data sheets, in FLOP/s.
_PEAKS = {
    "H200": 989.4e12,
    "H100": 989.4e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet, or None where it is not known: then no MFU is reported.

    Boards under the same name with lower peaks (PCIe, NVL, laptops, the D variants) are not known.
    """
    name = device_name(device)
    if re.search(r"PCIe|NVL|Laptop|Max-Q|\bD\b", name):
        return None
    return next((peak for key, peak in _PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
