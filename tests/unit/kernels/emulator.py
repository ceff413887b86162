"""Runs the PTX of a kernel on the CPU, number by number: enough of the language for kernels that Mojo compiles.

All threads of a block are one array. Those furthest behind go first, so that branches meet again; at a barrier each
waits for all, and with a `seed` one warp at a time runs ahead until a barrier, so that a missing one shows.
Reads and writes outside of a tensor's memory, or that are not aligned, are errors.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
SHARED = 1 << 20  # where shared memory begins, as addresses of it are seen
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip


def dtype(kind: str) -> Any:
    """numpy's, of a type of PTX; bf16 are bits, which `widened` reads."""
    return FLOATS.get(kind) or np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(re.sub('[a-z]+', '', kind)) // 8}")


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """16 bits each, as float32."""
    bits = bits.astype(np.uint16)
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """To nearest, ties to even, as PyTorch rounds."""
    target = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(values.astype(np.float32)).to(target).view(torch.int16).numpy().view(np.uint16)


class Emulator:
    """One kernel, from the text that defines it."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//.*|\.pragma.*", "", ptx)
        found = re.search(r"\.entry\s+\S+?\((.*?)\)\s*(?:\.\w+ [\d, ]+\s*)*\{(.*)\}", ptx, re.DOTALL)
        assert found is not None
        self.parameters = re.findall(r"(\S+)\s*(?:,|$)", found[1])
        self.shared, self.shared_size = {}, 0
        for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\S+)\[(\d+)\];", found[2]):
            self.shared[name] = SHARED + self.shared_size
            self.shared_size += -(-int(size) // 128) * 128
        self.code: list[tuple[str, list[str], list[str]]] = []
        self.labels: dict[str, int] = {}
        body = re.sub(r"(?m)^\s*\.(?:reg|shared) .*?;", "", found[2])
        for line in re.sub(r"\s*\n\s*(?=\{)", " ", body).splitlines():
            for label in re.findall(r"^\s*(\$\w+):", line):
                self.labels[label] = len(self.code)
            if parts := re.search(r"(?:@(!?%\w+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*?);", line):
                operands = re.findall(r"\{.*?\}|\[.*?\]|[^\s,]+", parts[3])
                self.code.append((parts[1] or "", re.split(r"[.:]+", parts[2]), operands))

    def run(self, grid: int, block: int, arguments: list[Any], seed: int | None = None) -> None:
        """arguments: tensors, None, and numbers; tensors are written in place."""
        self.memory, values = [], {}
        for name, argument in zip(self.parameters, arguments, strict=True):
            if isinstance(argument, Tensor):
                storage = torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())
                self.memory.append((storage.data_ptr(), storage.numpy()))
                argument = argument.data_ptr()
            number = np.float32(argument).view(np.uint32) if isinstance(argument, float) else argument or 0
            values[name] = np.array(int(number) & (1 << 64) - 1, np.uint64)
        self.random = None if seed is None else np.random.default_rng(seed)
        for index in range(grid):
            self._block(index, grid, block, values)

    def _block(self, index: int, grid: int, threads: int, values: dict[str, np.ndarray]) -> None:
        thread = np.arange(threads)
        self.registers = {"%tid.x": thread, "%laneid": thread % 32}
        self.registers |= {
            "%ctaid.x": thread * 0 + index,
            "%ntid.x": thread * 0 + threads,
            "%nctaid.x": thread * 0 + grid,
        }
        self.registers = {name: numbers.astype(np.uint64) for name, numbers in self.registers.items()}
        self.tile = np.full(self.shared_size, 0xFF, np.uint8)  # NaNs
        self.values, at, waits, ahead = values, np.zeros(threads, np.int64), np.zeros(threads, bool), 0
        while (at < len(self.code)).any():
            ready = (at < len(self.code)) & ~waits
            if not ready.any():
                waits[:] = False
                continue
            if self.random is not None:
                if not ready[32 * ahead]:
                    ahead = self.random.choice(np.unique(thread[ready] // 32))
                ready &= thread // 32 == ahead
            now = at[ready].min()
            self.who = np.flatnonzero(ready & (at == now))
            guard, name, operands = self.code[now]
            at[self.who] += 1
            if guard:
                self.who = self.who[(self.registers[guard.lstrip("!")][self.who] != 0) != guard.startswith("!")]
            if name[0] == "bra":
                at[self.who] = self.labels[operands[0]]
            elif name[0] == "ret":
                at[self.who] = len(self.code)
            elif name[0] == "bar":
                waits[self.who] = True
            elif len(self.who):
                self._step(name, operands)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """Of the threads that are on, in numpy's dtype."""
        if operand[0] == "%":
            bits = self.registers[operand][self.who]
        elif operand in self.shared:
            bits = np.full(len(self.who), self.shared[operand], np.uint64)
        else:
            number = int(operand[2:], 16) if operand.startswith("0f") else int(operand)
            bits = np.full(len(self.who), number & (1 << 64) - 1, np.uint64)
        wanted = np.dtype(dtype(kind))
        return bits.astype(f"u{wanted.itemsize}").view(wanted)

    def write(self, register: str, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        bits = values.astype(np.uint64) if values.dtype == bool else values.view(f"u{values.itemsize}")
        self.registers.setdefault(register, np.zeros(len(self.registers["%tid.x"]), np.uint64))[self.who] = bits

    def _bytes(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The array that holds such addresses, and the indices of their bytes."""
        assert not (address % size).any(), f"not aligned to {size} bytes"
        for begin, held in ((SHARED, self.tile), *self.memory):
            offset = address.astype(np.int64) - begin
            if (offset >= 0).all() and (offset + size <= len(held)).all():
                return held, offset[:, None] + np.arange(size)
        raise IndexError(f"{size} bytes at {address[0]} and beside are in no tensor")

    def _address(self, operand: str) -> np.ndarray:
        base, offset = re.fullmatch(r"\[(\S+?)(?:\+(-?\d+))?\]", operand).groups()
        return self.read(base, "u64") + np.uint64(int(offset or 0) & (1 << 64) - 1)

    def _step(self, name: list[str], operands: list[str]) -> None:
        operation, kind = name[0], name[-1]
        with np.errstate(all="ignore"):
            if operation == "ld" and name[1] == "param":
                bits = self.values[operands[1].strip("[]")]
                value = bits.astype(f"u{np.dtype(dtype(kind)).itemsize}").view(dtype(kind))
                value = value.astype(np.int64) if kind == "s32" else value
                self.write(operands[0], np.full(len(self.who), value))
            elif operation in ("ld", "st"):
                self._move(operation, kind, *(operands if operation == "ld" else reversed(operands)))
            elif operation == "cp" and len(operands) == 3:  # copied at once, which groups of copies allow
                held, indices = self._bytes(self._address(operands[1]), 16)
                target, to = self._bytes(self._address(operands[0]), 16)
                target[to] = held[indices]
            elif operation == "cp":
                pass
            elif operation == "ldmatrix":
                self._load_matrix(operands)
            elif operation == "mma":
                self._multiply(kind, name[-2], operands)
            elif operation == "shfl":
                lane = self.who ^ self.read(operands[2], "u32").astype(np.int64)
                self.write(operands[0].split("|")[0], self.registers[operands[1]][lane].astype(np.uint32))
            elif operands[0][0] == "{" or (len(operands) > 1 and operands[1][0] == "{"):
                self._pack(operands)
            else:
                self.write(operands[0], self._compute(operation, name[1:], operands[1:]))

    def _move(self, operation: str, kind: str, registers: str, address: str) -> None:
        names, size = re.findall(r"[%\w.]+", registers), np.dtype(dtype(kind)).itemsize
        held, indices = self._bytes(self._address(address), size * len(names))
        for name, part in zip(names, np.split(indices, len(names), axis=1), strict=True):
            if operation == "ld":
                self.write(name, held[part].view(dtype(kind))[:, 0])
            else:
                held[part] = self.read(name, kind)[:, None].view(np.uint8)

    def _pack(self, operands: list[str]) -> None:
        """Two of 16 bits into one of 32, or back."""
        low, high = re.findall(r"[%\w]+", operands[0] if operands[0][0] == "{" else operands[1])
        if operands[0][0] == "{":
            bits = self.read(operands[1], "u32")
            self.write(low, (bits & 0xFFFF).astype(np.uint16))
            self.write(high, (bits >> 16).astype(np.uint16))
        else:
            self.write(
                operands[0], self.read(low, "u16").astype(np.uint32) | self.read(high, "u16").astype(np.uint32) << 16
            )

    def _compute(self, operation: str, modifiers: list[str], operands: list[str]) -> np.ndarray:
        kind = modifiers[-1]
        if operation == "cvt":
            return self._convert(modifiers[-2], kind, operands)
        if kind == "pred":
            x, *rest = ((self.registers[o][self.who] if o[0] == "%" else np.uint64(int(o))) != 0 for o in operands)
            return {"not": lambda: ~x, "and": lambda: x & rest[0], "or": lambda: x | rest[0], "mov": lambda: x}[
                operation
            ]()
        if kind.endswith("x2"):  # rounded once, as in float32 and then narrowed
            halves = [[widened(self.read(o, "u32") >> shift, kind[:-2]) for o in operands] for shift in (0, 16)]
            low, high = (narrowed(BINARY[operation](*half), kind[:-2]).astype(np.uint32) for half in halves)
            return low | high << 16
        if operation == "selp":
            chosen = self.registers[operands[2]][self.who] != 0
            return np.where(chosen, self.read(operands[0], kind), self.read(operands[1], kind))
        shifts = operation in ("shl", "shr")
        x, *rest = (self.read(o, "u32" if shifts and i else kind) for i, o in enumerate(operands))
        if operation == "setp":
            return COMPARE[modifiers[0]](x, rest[0])
        if "wide" in modifiers:
            return x.astype(f"{x.dtype.kind}8") * rest[0].astype(f"{x.dtype.kind}8")
        if operation == "fma":  # rounded once
            return (x.astype(np.float64) * rest[0] + rest[1]).astype(x.dtype)
        if operation == "div" and x.dtype.kind != "f":
            return np.trunc(x.astype(np.float64) / rest[0]).astype(x.dtype)
        more = {
            "mov": lambda: x, "cvta": lambda: x, "neg": lambda: -x, "not": lambda: ~x,
            "rcp": lambda: 1 / x, "ex2": lambda: np.exp2(x), "rsqrt": lambda: 1 / np.sqrt(x),
            "div": lambda: x / rest[0], "mad": lambda: x * rest[0] + rest[1],
            "min": lambda: np.minimum(x, rest[0]), "max": lambda: np.maximum(x, rest[0]),
        }  # fmt: skip
        found = BINARY[operation](x, rest[0].astype(x.dtype)) if operation in BINARY else more[operation]()
        return found.astype(x.dtype)

    def _convert(self, target: str, source: str, operands: list[str]) -> np.ndarray:
        if target.endswith("x2"):  # the first is the higher
            high, low = (narrowed(self.read(o, source), target[:-2]).astype(np.uint32) for o in operands)
            return low | high << 16
        if source in ("f16", "bf16"):
            return widened(self.read(operands[0], "u16"), source)
        x = self.read(operands[0], source)
        return narrowed(x, target) if target in ("f16", "bf16") else x.astype(dtype(target))

    def _warps(self, register: str) -> np.ndarray:
        """-> two numbers of 16 bits for each lane, as (warps, 32, 2)"""
        bits = self.read(register, "u32").reshape(-1, 32)
        return np.stack((bits & 0xFFFF, bits >> 16), axis=-1).astype(np.uint16)

    def _load_matrix(self, operands: list[str]) -> None:
        """Each register is of a matrix of 8 rows, whose addresses eight lanes have: each lane gets two neighbours."""
        held, indices = self._bytes(self._address(operands[1]), 16)
        rows = held[indices].view(np.uint32).reshape(-1, 4, 32)  # of a matrix: 8 rows of 4 pairs
        for i, register in enumerate(re.findall(r"%\w+", operands[0])):
            self.write(register, rows[:, i].reshape(-1))

    def _multiply(self, kind: str, narrow: str, operands: list[str]) -> None:
        """Rows and columns of each lane's numbers, as the manual of PTX draws them for m16n8k16."""
        names = [re.findall(r"[%\w]+", operand) for operand in operands]
        warps, row, pair = len(self.who) // 32, np.arange(32) // 4, np.arange(32) % 4 * 2
        a, b, c = (np.zeros((warps, *shape), np.float32) for shape in ((16, 16), (8, 16), (16, 8)))
        for i, register in enumerate(names[1]):
            for j in range(2):
                a[:, row + 8 * (i % 2), pair + 8 * (i // 2) + j] = widened(self._warps(register)[..., j], narrow)
        for i, register in enumerate(names[2]):
            for j in range(2):
                b[:, row, pair + 8 * i + j] = widened(self._warps(register)[..., j], narrow)
        places = [(slice(None), row + 8 * (i // 2), pair + i % 2) for i in range(4)]
        for place, register in zip(places, names[3], strict=True):
            c[place] = self.read(register, kind).reshape(-1, 32)
        c += a @ b.transpose(0, 2, 1)
        for place, register in zip(places, names[0], strict=True):
            self.write(register, c[place].reshape(-1))
