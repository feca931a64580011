"""All kernels, as one module of LLVM IR."""

from __future__ import annotations

from .activations import smooth
from .between import add, maximum, mean, scale
from .convolve import MOST_VECTORS, convolve, strip
from .copies import copy, deinterleave, interleave, transpose
from .fields import FIELD, FIELDS, field
from .ir import Function


def source(width: int) -> str:
    """The module as LLVM IR, for vectors of `width` floats."""
    vector = f"<{width} x float>"
    return "\n".join(
        [
            f"declare {vector} @llvm.fma.v{width}f32({vector}, {vector}, {vector})",
            f"declare {vector} @llvm.fabs.v{width}f32({vector})",
            f"declare {vector} @llvm.maximum.v{width}f32({vector}, {vector})",
            f"declare double @llvm.vector.reduce.fadd.v{width}f64(double, <{width} x double>)",
            "declare i64 @llvm.smin.i64(i64, i64)",
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            str(smooth(width)),
            *[str(strip(count, width)) for count in range(1, MOST_VECTORS[width] + 1)],
            str(convolve(width)),
            str(copy()),
            str(deinterleave()),
            str(interleave()),
            str(transpose(width)),
            str(maximum(width)),
            str(add(width)),
            str(scale(width)),
            str(mean(width)),
            str(_run(width)),
            str(_run_all(width)),
        ]
    )


def _run(width: int) -> Function:
    """What Python calls: zeros around the output, then the work, alone or by a team of threads."""
    f = Function("void @run(ptr %d)", width)
    work = field(f, "work", "ptr")
    for name in ("lead", "tail"):
        place, size = field(f, name, "ptr"), field(f, f"{name}_bytes")
        f.do(f"call void @llvm.memset.p0.i64(ptr {place}, i8 0, i64 {size}, i1 false)")
    threads = field(f, "threads")
    with f.when(f.compare("sle", threads, 1)):
        f.do(f"call void {work}(ptr %d)")
    with f.when(f.compare("sgt", threads, 1)):
        number = f.let(f"trunc i64 {threads} to i32")
        f.do(f"call void {field(f, 'parallel', 'ptr')}(ptr {work}, ptr %d, i32 {number}, i32 0)")
    return f


def _run_all(width: int) -> Function:
    """Do what a list of calls describes, one after the other."""
    f = Function("void @run_all(ptr %calls, i64 %count)", width)
    with f.loop(0, "%count") as i:
        call = f.at("%calls", f.mul(i.index, len(FIELDS)), "i64")
        f.store("0", call, FIELD["next"], "i64")
        f.do(f"call void @run(ptr {call})")
    return f
