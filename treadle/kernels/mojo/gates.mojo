"""SwiGLU on a GPU: a thread computes 16 bytes of the result."""

from max.gpu import block_dim, block_idx, thread_idx

from vectors import Memory, swiglu_at, swiglu_backward_at


@always_inline
def index() -> Int:
    return Int(block_idx.x) * Int(block_dim.x) + Int(thread_idx.x)


def swiglu[T: DType](x: Memory[T], y: Memory[T], columns: Int32, vectors: Int64):
    if index() < Int(vectors):
        swiglu_at[T](x, y, Int(columns), index())


def swiglu_backward[T: DType](dy: Memory[T], x: Memory[T], dx: Memory[T], columns: Int32, vectors: Int64):
    if index() < Int(vectors):
        swiglu_backward_at[T](dy, x, dx, Int(columns), index())
