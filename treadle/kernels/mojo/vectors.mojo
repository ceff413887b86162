"""What the kernels do with 16 bytes of numbers, on a GPU or a CPU: all reads and writes are of so many."""

from std.math import exp
from std.sys.info import size_of

comptime F = DType.float32
comptime Memory[T: DType] = MutPointer[Scalar[T], MutAnyOrigin]


@always_inline
def numbers[T: DType]() -> Int:
    return 16 // size_of[Scalar[T]]()


@always_inline
def load[T: DType, V: Int](x: Memory[T], at: Int) -> SIMD[F, V]:
    return x.unsafe_load[width=V, alignment=16](at).cast[F]()


@always_inline
def store[T: DType, V: Int](y: Memory[T], at: Int, value: SIMD[F, V]):
    y.unsafe_store[alignment=16](at, value.cast[T]())


@always_inline
def factor[T: DType, V: Int](weight: Memory[F], wide: Bool, at: Int, offset: Float32) -> SIMD[F, V]:
    """A norm's weight, in float32 (`wide`) or in T, rounded to T; plus the offset."""
    if wide:
        return weight.unsafe_load[width=V, alignment=16](at).cast[T]().cast[F]() + offset
    return load[T, V](weight.unsafe_bitcast[Scalar[T]](), at) + offset


@always_inline
def sigmoid[V: Int](x: SIMD[F, V]) -> SIMD[F, V]:
    return 1 / (1 + exp(-x))


@always_inline
def swiglu_at[T: DType](x: Memory[T], y: Memory[T], columns: Int, vector: Int):
    """silu(gate) * up, of the two halves of each row."""
    comptime V = numbers[T]()
    var gate_at = vector * V + vector * V // columns * columns
    var gate = load[T, V](x, gate_at)
    store[T](y, vector * V, gate * sigmoid(gate) * load[T, V](x, gate_at + columns))


@always_inline
def swiglu_backward_at[T: DType](dy: Memory[T], x: Memory[T], dx: Memory[T], columns: Int, vector: Int):
    comptime V = numbers[T]()
    var gate_at = vector * V + vector * V // columns * columns
    var d = load[T, V](dy, vector * V)
    var gate = load[T, V](x, gate_at)
    var s = sigmoid(gate)
    store[T](dx, gate_at, d * load[T, V](x, gate_at + columns) * s * (1 + gate * (1 - s)))
    store[T](dx, gate_at + columns, d * gate * s)


@always_inline
def turn_at[
    T: DType
](
    x: Memory[T],
    y: Memory[T],
    cos: Memory[F],
    sin: Memory[F],
    stride: Int,
    dim: Int,
    rotated: Int,
    sign: Float32,
    item: Int,
):
    """Of a token's heads, `stride` numbers apart: 16 bytes of channels i and i + rotated / 2, or of the others."""
    comptime V = numbers[T]()
    var half = rotated // 2
    var each = (dim - half) // V
    var head = item // each
    var at = item % each * V
    var source = x.unsafe_offset(head * stride)
    var target = y.unsafe_offset(head * dim)
    if at >= half:
        store[T](target, half + at, load[T, V](source, half + at))
        return
    var first = load[T, V](source, at)
    var second = load[T, V](source, half + at)
    store[T](target, at, first * load[F, V](cos, at) - second * sign * load[F, V](sin, at))
    at += half
    store[T](target, at, second * load[F, V](cos, at) + first * sign * load[F, V](sin, at))
