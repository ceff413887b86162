"""The kernels on a CPU, with the arguments of those for GPUs, after the number of the dtype. One thread."""

from std.math import sqrt

from vectors import F, Memory, factor, load, numbers, store, swiglu_at, swiglu_backward_at, turn_at

comptime Address = Int
comptime DTYPES = (DType.bfloat16, DType.float16, DType.float32)


@always_inline
def at[T: DType](address: Address) -> Memory[T]:
    return Memory[T](unsafe_from_address=address)


@export
def swiglu(dtype: Int32, x: Address, y: Address, columns: Int32, vectors: Int64) abi("C"):
    comptime for d in range(3):
        comptime T = DTYPES[d]
        if Int(dtype) == d:
            for vector in range(Int(vectors)):
                swiglu_at[T](at[T](x), at[T](y), Int(columns), vector)


@export
def swiglu_backward(dtype: Int32, dy: Address, x: Address, dx: Address, columns: Int32, vectors: Int64) abi("C"):
    comptime for d in range(3):
        comptime T = DTYPES[d]
        if Int(dtype) == d:
            for vector in range(Int(vectors)):
                swiglu_backward_at[T](at[T](dy), at[T](x), at[T](dx), Int(columns), vector)


@export
def rope(
    dtype: Int32,
    q: Address,
    k: Address,
    cos: Address,
    sin: Address,
    q_out: Address,
    k_out: Address,
    q_batch: Int64,
    q_token: Int64,
    q_head: Int64,
    k_batch: Int64,
    k_token: Int64,
    k_head: Int64,
    length: Int32,
    tables: Int32,
    q_heads: Int32,
    k_heads: Int32,
    dim: Int32,
    rotated: Int32,
    tokens: Int32,
    sign: Float32,
) abi("C"):
    comptime for d in range(3):
        comptime T = DTYPES[d]
        if Int(dtype) == d:
            var each = (Int(dim) - Int(rotated) // 2) // numbers[T]()
            for token in range(Int(tokens)):
                var row = token // Int(length)
                var place = token % Int(length)
                var angle = token % Int(tables) * Int(rotated)
                var c = at[F](cos).unsafe_offset(angle)
                var s = at[F](sin).unsafe_offset(angle)
                var x = at[T](q).unsafe_offset(row * Int(q_batch) + place * Int(q_token))
                var y = at[T](q_out).unsafe_offset(token * Int(q_heads) * Int(dim))
                for item in range(Int(q_heads) * each):
                    turn_at[T](x, y, c, s, Int(q_head), Int(dim), Int(rotated), sign, item)
                x = at[T](k).unsafe_offset(row * Int(k_batch) + place * Int(k_token))
                y = at[T](k_out).unsafe_offset(token * Int(k_heads) * Int(dim))
                for item in range(Int(k_heads) * each):
                    turn_at[T](x, y, c, s, Int(k_head), Int(dim), Int(rotated), sign, item)


@export
def rms_norm(
    dtype: Int32,
    x: Address,
    residual: Address,
    weight: Address,
    y: Address,
    sum: Address,
    rstd: Address,
    rows: Int32,
    columns: Int32,
    wide: Int32,
    eps: Float32,
    offset: Float32,
) abi("C"):
    comptime for d in range(3):
        comptime T = DTYPES[d]
        comptime V = numbers[T]()
        if Int(dtype) == d:
            var n = Int(columns)
            for row in range(Int(rows)):
                var source = at[T](x).unsafe_offset(row * n)
                var squares = SIMD[F, V](0)
                if residual != 0:
                    var total = at[T](sum).unsafe_offset(row * n)
                    var other = at[T](residual).unsafe_offset(row * n)
                    for i in range(0, n, V):
                        store[T](total, i, load[T, V](source, i) + load[T, V](other, i))
                    source = total
                for i in range(0, n, V):
                    squares += load[T, V](source, i) * load[T, V](source, i)
                var r = 1 / sqrt(squares.reduce_add() / Float32(n) + eps)
                at[F](rstd)[unsafe_offset=row] = r
                var target = at[T](y).unsafe_offset(row * n)
                for i in range(0, n, V):
                    store[T](target, i, load[T, V](source, i) * r * factor[T, V](at[F](weight), wide != 0, i, offset))


@export
def rms_norm_backward(
    dtype: Int32,
    dy: Address,
    dsum: Address,
    x: Address,
    weight: Address,
    rstd: Address,
    dx: Address,
    parts: Address,
    rows: Int32,
    columns: Int32,
    wide: Int32,
    offset: Float32,
) abi("C"):
    """`parts` is one line."""
    comptime for d in range(3):
        comptime T = DTYPES[d]
        comptime V = numbers[T]()
        if Int(dtype) == d:
            var n = Int(columns)
            for i in range(0, n, V):
                at[F](parts).unsafe_store[alignment=16](i, SIMD[F, V](0))
            for row in range(Int(rows)):
                var grad = at[T](dy).unsafe_offset(row * n)
                var source = at[T](x).unsafe_offset(row * n)
                var r = at[F](rstd)[unsafe_offset=row]
                var along = SIMD[F, V](0)
                for i in range(0, n, V):
                    var g = load[T, V](grad, i)
                    var normed = load[T, V](source, i) * r
                    at[F](parts).unsafe_store[alignment=16](i, load[F, V](at[F](parts), i) + g * normed)
                    along += g * factor[T, V](at[F](weight), wide != 0, i, offset) * normed
                var mean = along.reduce_add() / Float32(n)
                for i in range(0, n, V):
                    var w = factor[T, V](at[F](weight), wide != 0, i, offset)
                    var found = (load[T, V](grad, i) * w - load[T, V](source, i) * r * mean) * r
                    if dsum != 0:
                        found += load[T, V](at[T](dsum), row * n + i)
                    store[T](at[T](dx), row * n + i, found)
