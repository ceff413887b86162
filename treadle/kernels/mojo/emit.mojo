"""Write the PTX of every kernel: mojo run -I . emit.mojo FOLDER. Each file begins with what the manifest says of it."""

from std.compile import compile_info
from std.sys import argv

from max.gpu.host import get_gpu_target

from gates import swiglu, swiglu_backward
from linear import linear
from norms import rms_norm, rms_norm_backward
from rope import rope
from vectors import numbers

comptime HOPPER = get_gpu_target["sm_90a"]()
comptime DTYPES = (DType.bfloat16, DType.float16, DType.float32)
# Of the norms: warps of a row, rows of a block, vectors of 16 bytes of a thread.
comptime WARPS = (1, 4, 8, 16, 32)
comptime ROWS = (8, 1, 1, 1, 1)
comptime VECTORS = (1, 1, 2, 2, 4)
comptime BACKWARD = 4  # of those sizes: with the fifth, a block has more registers than there are


def write(source: String, operation: String, dtype: DType, suffix: String, entry: String, ptx: String, rule: String) raises:
    var name = operation + "_" + String(dtype) + suffix
    with open(String(argv()[1]) + "/" + source + "." + name + ".ptx", "w") as file:
        file.write('{"operation": "', operation, '", "dtype": "', String(dtype), '", "entry": "', entry, '", ', rule, "}\n", ptx)


def main() raises:
    comptime for d in range(3):
        comptime T = DTYPES[d]
        comptime each = '"block": 256, "grid": "vectors / 256"'
        comptime forward = compile_info[swiglu[T], emission_kind="asm", target=HOPPER]
        var f = forward()
        write("gates", "swiglu", T, "", String(f.function_name), String(f.asm), each)
        comptime backward = compile_info[swiglu_backward[T], emission_kind="asm", target=HOPPER]
        var b = backward()
        write("gates", "swiglu_backward", T, "", String(b.function_name), String(b.asm), each)
        comptime turned = compile_info[rope[T], emission_kind="asm", target=HOPPER]
        var t = turned()
        write("rope", "rope", T, "", String(t.function_name), String(t.asm), '"block": 128, "grid": "tokens"')
        comptime if d < 2:
            comptime product = compile_info[linear[T], emission_kind="asm", target=HOPPER]
            var p = product()
            var tiles = '"block": 256, "grid": "tiles of 128 rows x tiles of 128 features"'
            write("linear", "linear", T, "", String(p.function_name), String(p.asm), tiles)
        comptime for i in range(5):
            comptime W = WARPS[i]
            comptime R = ROWS[i]
            comptime K = VECTORS[i]
            var rule = String('"block": ', 32 * W * R, ', "rows": ', R, ', "columns": ', 32 * W * K * numbers[T]())
            comptime normed = compile_info[rms_norm[T, W, R, K], emission_kind="asm", target=HOPPER]
            var n = normed()
            var all = rule + ', "grid": "row count / rows"'
            write("norms", "rms_norm", T, "_" + String(W), String(n.function_name), String(n.asm), all)
            comptime if i < BACKWARD:
                comptime gradient = compile_info[rms_norm_backward[T, W, R, K], emission_kind="asm", target=HOPPER]
                var g = gradient()
                var any = rule + ', "grid": "any, up to row count / rows"'
                write("norms", "rms_norm_backward", T, "_" + String(W), String(g.function_name), String(g.asm), any)
