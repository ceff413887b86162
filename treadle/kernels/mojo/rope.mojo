"""Rotary positions on a GPU, of queries and keys in one launch: a block takes a token."""

from max.gpu import block_dim, block_idx, thread_idx

from vectors import F, Memory, numbers, turn_at


def rope[
    T: DType
](
    q: Memory[T],
    k: Memory[T],
    cos: Memory[F],
    sin: Memory[F],
    q_out: Memory[T],
    k_out: Memory[T],
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
):
    """The tables are of `tables` tokens: of one row, or of all. sign: -1 turns back."""
    var token = Int(block_idx.x)
    var row = token // Int(length)
    var place = token % Int(length)
    var cosines = cos.unsafe_offset(token % Int(tables) * Int(rotated))
    var sines = sin.unsafe_offset(token % Int(tables) * Int(rotated))
    var each = (Int(dim) - Int(rotated) // 2) // numbers[T]()
    var x = q.unsafe_offset(row * Int(q_batch) + place * Int(q_token))
    var y = q_out.unsafe_offset(token * Int(q_heads) * Int(dim))
    for item in range(Int(thread_idx.x), Int(q_heads) * each, Int(block_dim.x)):
        turn_at[T](x, y, cosines, sines, Int(q_head), Int(dim), Int(rotated), sign, item)
    x = k.unsafe_offset(row * Int(k_batch) + place * Int(k_token))
    y = k_out.unsafe_offset(token * Int(k_heads) * Int(dim))
    for item in range(Int(thread_idx.x), Int(k_heads) * each, Int(block_dim.x)):
        turn_at[T](x, y, cosines, sines, Int(k_head), Int(dim), Int(rotated), sign, item)
