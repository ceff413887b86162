"""A linear map on a GPU: y = epilogue(x @ weight.T + bias), on tensor cores (mma.sync).

A block computes BN rows of BF features. Its eight warps share tiles of BN and of BF rows, BD inputs wide, which are
copied into shared memory STAGES - 1 steps ahead. There the 16 bytes of a row lie in an order that depends on the row, so
that the eight rows that one instruction reads lie in different banks.
"""

from std.math import exp
from std.memory import stack_allocation

from max.gpu import block_idx, lane_id, thread_idx
from max.gpu.compute.mma import ld_matrix, mma
from max.gpu.memory import AddressSpace, async_copy, async_copy_commit_group, async_copy_wait_group
from max.gpu.sync import barrier

from vectors import F, Memory, sigmoid

comptime BN = 128
comptime BF = 128
comptime BD = 32
comptime STAGES = 3
comptime THREADS = 256
comptime GROUP = 8  # blocks one below the other that run together: they share the weight's tiles in the L2 cache
comptime Tile[T: DType] = MutPointer[Scalar[T], MutUntrackedOrigin, address_space=AddressSpace.SHARED]


@always_inline
def place(row: Int, chunk: Int) -> Int:
    """Where in a tile 16 bytes of a row are."""
    return row * BD + (chunk ^ ((row >> 1) & 3)) * 8


@always_inline
def fetch[T: DType](x: Memory[T], tile: Tile[T], first: Int, rows: Int, inputs: Int, begin: Int):
    """128 rows from `first` on, of which those that are not there are the last one's."""
    comptime for i in range(2):
        var row = Int(thread_idx.x) // 4 + i * 64
        var chunk = Int(thread_idx.x) % 4
        var source = x.unsafe_offset(min(first + row, rows - 1) * inputs + begin + chunk * 8)
        async_copy[16](source.unsafe_address_space_cast[AddressSpace.GLOBAL](), tile.unsafe_offset(place(row, chunk)))


@always_inline
def finished(x: Float32, epilogue: Int) -> Float32:
    if epilogue == 1:
        return max(x, 0) * max(x, 0)
    if epilogue == 2:
        return x * sigmoid[1](1.5957691216057308 * (x + 0.044715 * x * x * x))
    if epilogue == 3:
        return x * sigmoid[1](x)
    return x


def linear[
    T: DType
](
    x: Memory[T],
    weight: Memory[T],
    bias: Memory[F],
    y: Memory[T],
    rows: Int32,
    features: Int32,
    inputs: Int32,
    epilogue: Int32,
):
    """epilogue: 0 none, 1 relu squared, 2 gelu by tanh, 3 silu. Inputs are a multiple of BD, features even."""
    var N = Int(rows)
    var O = Int(features)
    var D = Int(inputs)
    var down = (N + BN - 1) // BN
    var across = (O + BF - 1) // BF
    var group = Int(block_idx.x) // (GROUP * across) * GROUP
    var size = min(GROUP, down - group)
    var inside = Int(block_idx.x) % (GROUP * across)
    var row = (group + inside % size) * BN
    var feature = inside // size * BF
    var xs = stack_allocation[STAGES * BN * BD, Scalar[T], alignment=128, address_space=AddressSpace.SHARED]()
    var ws = stack_allocation[STAGES * BF * BD, Scalar[T], alignment=128, address_space=AddressSpace.SHARED]()
    var lane = Int(lane_id())
    var warp_row = Int(thread_idx.x) // 128 * 64
    var warp_feature = Int(thread_idx.x) // 32 % 4 * 32
    var sums = stack_allocation[16, SIMD[F, 4]]()
    comptime for i in range(16):
        sums[unsafe_offset=i] = SIMD[F, 4](0)
    var steps = D // BD
    comptime for s in range(STAGES - 1):
        if s < steps:
            fetch[T](x, xs.unsafe_offset(s * BN * BD), row, N, D, s * BD)
            fetch[T](weight, ws.unsafe_offset(s * BF * BD), feature, O, D, s * BD)
        async_copy_commit_group()
    var slot = 0  # of the tiles to read; those of the step before it are overwritten
    for step in range(steps):
        async_copy_wait_group(STAGES - 2)
        barrier()  # the tile is there for all, and all have read the one that is overwritten now
        var free = slot - 1 if slot > 0 else STAGES - 1
        var ahead = step + STAGES - 1
        if ahead < steps:
            fetch[T](x, xs.unsafe_offset(free * BN * BD), row, N, D, ahead * BD)
            fetch[T](weight, ws.unsafe_offset(free * BF * BD), feature, O, D, ahead * BD)
        async_copy_commit_group()
        var x_tile = xs.unsafe_offset(slot * BN * BD)
        var w_tile = ws.unsafe_offset(slot * BF * BD)
        slot = slot + 1 if slot < STAGES - 1 else 0
        comptime for k in range(BD // 16):
            var a = stack_allocation[4, SIMD[T, 8]]()
            comptime for i in range(4):
                var at = place(warp_row + i * 16 + lane % 16, k * 2 + lane // 16)
                a[unsafe_offset=i] = ld_matrix[8](x_tile.unsafe_offset(at))
            comptime for j in range(2):
                var at = place(warp_feature + j * 16 + lane % 8 + lane // 16 * 8, k * 2 + lane // 8 % 2)
                var b = ld_matrix[8](w_tile.unsafe_offset(at))
                comptime for i in range(4):
                    comptime c = i * 4 + j * 2
                    mma(sums[unsafe_offset=c], a[unsafe_offset=i], b.slice[4](), sums[unsafe_offset=c])
                    mma(sums[unsafe_offset = c + 1], a[unsafe_offset=i], b.slice[4, offset=4](), sums[unsafe_offset = c + 1])
    comptime for j in range(4):
        var at = feature + warp_feature + j * 8 + lane % 4 * 2
        if at < O:
            var added = SIMD[F, 2](0)
            if Int(bias) != 0:
                added = bias.unsafe_load[width=2, alignment=8](at)
            comptime for i in range(4):
                comptime for half in range(2):
                    var n = row + warp_row + i * 16 + half * 8 + lane // 4
                    if n < N:
                        var found = sums[unsafe_offset = i * 4 + j].slice[2, offset = half * 2]() + added
                        var e = Int(epilogue)
                        var both = SIMD[F, 2](finished(found[0], e), finished(found[1], e))
                        y.unsafe_store[alignment=4](n * O + at, both.cast[T]())
