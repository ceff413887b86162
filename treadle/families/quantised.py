"""Weights that are published in fewer bits, read as if they were not: one tensor at a time, when it is asked for.

FP8 (DeepSeek-V3, arXiv:2412.19437): `X.weight` in float8, `X.weight_scale_inv` a factor for each block, or one for all.
MXFP4 (GPT-OSS; OCP Microscaling Formats 1.0): `X_blocks` holds two 4-bit floats in each byte, the low half first, in
groups of 32, `X_scales` each group's exponent.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from treadle.errors import CheckpointError
from treadle.nn.weights import WeightsReader

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the positive half of E2M1


def dequantised(reader: WeightsReader, config: Mapping[str, Any]) -> WeightsReader:
    """The reader itself, or one that gives its quantised tensors in bf16. Raises CheckpointError for other methods."""
    quantisation = config.get("quantization_config") or {}
    if not isinstance(quantisation, Mapping):
        raise CheckpointError(f"{reader.path}: quantization_config: {quantisation!r} is no JSON object")
    method = quantisation.get("quant_method")
    if method is None:
        return reader
    if method == "fp8":
        block = quantisation.get("weight_block_size") or (128, 128)
        if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise CheckpointError(f"{reader.path}: weight_block_size: {block!r}; expected two whole numbers")
        return FP8Reader(reader, (block[0], block[1]))
    if method == "mxfp4":
        return MXFP4Reader(reader)
    raise CheckpointError(
        f"{reader.path}: its weights are quantised by '{method}', which is not read here (fp8 and mxfp4 are); "
        "use the unquantised checkpoint"
    )


class _Dequantised(WeightsReader):
    def __init__(self, reader: WeightsReader):
        self.path, self.files, self.metadata = reader.path, dict(reader.files), reader.metadata
        self.reader = reader

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)


class FP8Reader(_Dequantised):
    SCALE = "_scale_inv"

    def __init__(self, reader: WeightsReader, block: tuple[int, int]):
        super().__init__(reader)
        self.block = tuple(block)
        self.files = {name: file for name, file in self.files.items() if not name.endswith(self.SCALE)}

    def _scaled(self, name: str) -> bool:
        return name + self.SCALE in self.reader

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if self._scaled(name) else self.reader.dtype(name)

    def tensor(self, name: str) -> Tensor:
        stored = self.reader.tensor(name)
        if not self._scaled(name):
            return stored
        scale = self.reader.tensor(name + self.SCALE).float()
        if scale.numel() == 1:
            return (stored.float() * scale.reshape(())).bfloat16()
        rows, columns = self.block
        blocks = tuple(-(-size // n) for size, n in zip(stored.shape, self.block, strict=True))
        if scale.shape != blocks:
            raise CheckpointError(
                f"{self.path}: {name}{self.SCALE} is {tuple(scale.shape)}, where blocks of {self.block} make {blocks}"
            )
        scale = scale.repeat_interleave(rows, 0)[: stored.shape[0]].repeat_interleave(columns, 1)[:, : stored.shape[1]]
        return (stored.float() * scale).bfloat16()


class MXFP4Reader(_Dequantised):
    """Experts' matrices come out inputs first, [experts, inputs, outputs], as the unquantised checkpoint has them."""

    BLOCKS, SCALES = "_blocks", "_scales"

    def __init__(self, reader: WeightsReader):
        super().__init__(reader)
        self.files = {
            name.removesuffix(self.BLOCKS): file for name, file in self.files.items() if not name.endswith(self.SCALES)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.reader:
            return self.reader.shape(name)
        experts, outputs, groups, half = self.reader.shape(name + self.BLOCKS)
        return experts, groups * half * 2, outputs

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name) if name in self.reader else torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        if name in self.reader:
            return self.reader.tensor(name)
        blocks, scales = self.reader.tensor(name + self.BLOCKS), self.reader.tensor(name + self.SCALES)
        table = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.bfloat16)
        pairs = torch.stack((table[(blocks & 15).int()], table[(blocks >> 4).int()]), dim=-1)
        values = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).bfloat16()
        return values.flatten(-2).transpose(1, 2)
