"""Root-mean-square norm on a GPU. The threads of a row hold it in registers: each number is read and written once.

A row has WARPS warps, of whose threads each holds K vectors of 16 bytes; a block has ROWS rows.
"""

from std.math import rsqrt
from std.memory import stack_allocation

from max.gpu import block_idx, grid_dim, lane_id, thread_idx
from max.gpu.memory import AddressSpace
from max.gpu.primitives import warp
from max.gpu.sync import barrier

from vectors import F, Memory, factor, load, numbers, store

@always_inline
def row_sum[WARPS: Int](x: Float32, thread: Int) -> Float32:
    """Over all threads of a row."""
    var sum = warp.sum(x)
    comptime if WARPS > 1:
        var parts = stack_allocation[WARPS, Float32, address_space=AddressSpace.SHARED]()
        barrier()  # those of the row before have been read
        if lane_id() == 0:
            parts[unsafe_offset = thread // 32] = sum
        barrier()
        sum = 0
        comptime for i in range(WARPS):
            sum += parts[unsafe_offset=i]
    return sum


def rms_norm[
    T: DType, WARPS: Int, ROWS: Int, K: Int
](
    x: Memory[T],
    residual: Memory[T],
    weight: Memory[F],
    y: Memory[T],
    sum: Memory[T],
    rstd: Memory[F],
    rows: Int32,
    columns: Int32,
    wide: Int32,
    eps: Float32,
    offset: Float32,
):
    """Of x, or with a residual of their sum, which is stored too."""
    comptime V = numbers[T]()
    comptime STEP = WARPS * 32 * V
    var thread = Int(thread_idx.x) % (WARPS * 32)
    var row = Int(block_idx.x) * ROWS + Int(thread_idx.x) // (WARPS * 32)
    if row >= Int(rows):
        return
    var begin = row * Int(columns)
    var held = stack_allocation[K, SIMD[F, V]]()
    var squares = Float32(0)
    comptime for k in range(K):
        var column = k * STEP + thread * V
        var v = SIMD[F, V](0)
        if column < Int(columns):
            v = load[T, V](x, begin + column)
            if Int(residual) != 0:
                v = (v + load[T, V](residual, begin + column)).cast[T]().cast[F]()
                store[T](sum, begin + column, v)
        held[unsafe_offset=k] = v
        squares += (v * v).reduce_add()
    var r = rsqrt(row_sum[WARPS](squares, thread) / Float32(columns) + eps)
    if thread == 0:
        rstd[unsafe_offset=row] = r
    comptime for k in range(K):
        var column = k * STEP + thread * V
        if column < Int(columns):
            var w = factor[T, V](weight, wide != 0, column, offset)
            store[T](y, begin + column, held[unsafe_offset=k] * r * w)


def rms_norm_backward[
    T: DType, WARPS: Int, ROWS: Int, K: Int
](
    dy: Memory[T],
    dsum: Memory[T],
    x: Memory[T],
    weight: Memory[F],
    rstd: Memory[F],
    dx: Memory[T],
    parts: Memory[F],
    rows: Int32,
    columns: Int32,
    wide: Int32,
    offset: Float32,
):
    """A row's threads go through many rows, and keep what they add to the weight's gradient: one line of `parts`."""
    comptime V = numbers[T]()
    comptime STEP = WARPS * 32 * V
    var thread = Int(thread_idx.x) % (WARPS * 32)
    var first = Int(block_idx.x) * ROWS + Int(thread_idx.x) // (WARPS * 32)
    var dweight = stack_allocation[K, SIMD[F, V]]()
    comptime for k in range(K):
        dweight[unsafe_offset=k] = SIMD[F, V](0)
    for row in range(first, Int(rows), Int(grid_dim.x) * ROWS):
        var begin = row * Int(columns)
        var r = rstd[unsafe_offset=row]
        var grads = stack_allocation[K, SIMD[F, V]]()
        var normed = stack_allocation[K, SIMD[F, V]]()
        var along = Float32(0)
        comptime for k in range(K):
            var column = k * STEP + thread * V
            var d = SIMD[F, V](0)
            var n = SIMD[F, V](0)
            if column < Int(columns):
                d = load[T, V](dy, begin + column)
                n = load[T, V](x, begin + column) * r
                dweight[unsafe_offset=k] += d * n
                d *= factor[T, V](weight, wide != 0, column, offset)
            grads[unsafe_offset=k] = d
            normed[unsafe_offset=k] = n
            along += (d * n).reduce_add()
        along = row_sum[WARPS](along, thread) / Float32(columns)
        comptime for k in range(K):
            var column = k * STEP + thread * V
            if column < Int(columns):
                var found = (grads[unsafe_offset=k] - normed[unsafe_offset=k] * along) * r
                if Int(dsum) != 0:
                    found += load[T, V](dsum, begin + column)
                store[T](dx, begin + column, found)
    comptime for k in range(K):
        var column = k * STEP + thread * V
        if column < Int(columns):
            parts.unsafe_store[alignment=16](first * Int(columns) + column, dweight[unsafe_offset=k])
