"""What a call of the kernels is made of."""

from __future__ import annotations

from .ir import Function

# A call is an array of 64-bit integers: addresses and sizes. A float lies in the lower half of one.
FIELDS = (
    *("work", "threads", "parallel", "next", "lead", "lead_bytes", "tail", "tail_bytes"),  # run
    *("x", "y", "pitch", "keep"),  # all works
    *("residual", "bias", "nonzeros", "tasks", "groups", "group_count"),  # convolve
    *("strip_count", "vectors", "longer", "activation", "low", "high"),
    *("channels", "batch", "rows", "columns", "x_channel", "x_image", "x_row", "x_step"),  # copy
    *("first_row", "last_row", "first_column", "last_column", "fill"),
    *("odd", "evens", "odds", "x_columns"),  # deinterleave, interleave
)
FIELD = {name: i for i, name in enumerate(FIELDS)}
WORKS = (
    *("convolve", "copy", "deinterleave", "interleave", "transpose"),
    *("maximum", "add", "scale", "mean"),
)


def field(f: Function, name: str, kind: str = "i64") -> str:
    """Load a field of the call `%d`."""
    return f.load(f.at("%d", FIELD[name], "i64"), 0, kind)


def mask(f: Function, value: str, keep: str, index: str | int) -> str:
    """The bits of `value` that are set in `keep`."""
    ints = f"<{f.width} x i32>"
    mask = f.let(f"load {ints}, ptr {f.at(keep, index)}, align 4")
    bits = f.let(f"and {ints} {f.let(f'bitcast {f.vector} {value} to {ints}')}, {mask}")
    return f.let(f"bitcast {ints} {bits} to {f.vector}")
