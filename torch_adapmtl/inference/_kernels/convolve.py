"""The kernel that skips zeros, in LLVM IR.

In a map (see `_maps`), each weight of a filter reads at one fixed distance from the position that
it helps to compute. So a convolution is, for each output channel: for each nonzero weight, add
``weight * (a run of the input)`` to ``a run of the output``. The run of the output stays in
registers while the weights of a filter pass by.

The filters are cut into blocks, and the input channels too, so that the runs of a block of
channels stay in the first cache. A *task* is what one filter adds from one block of channels. The
first task of a filter begins with the bias, the others with the sum so far, which lies in the
output. The last one adds the residual, applies the activation, sets the positions between the rows
of the images to zero, and stores.
"""

from __future__ import annotations

from .activations import CLAMP, HARDSWISH, SILU, clamp, hardswish
from .fields import FIELD, field, mask
from .ir import Function

MOST_VECTORS = {4: 14, 8: 14, 16: 16}  # of output that are held in registers, by floats in a vector
FIRST, LAST = 1, 2  # flags of a task


def convolve(width: int) -> Function:
    """Take strips of positions and blocks of filters until none is left.

    There are `strip_count` strips: `longer` of `vectors + 1` vectors, then the rest of `vectors`.
    """
    f = Function("void @convolve(ptr %d)", width)
    group_count, strip_count = field(f, "group_count"), field(f, "strip_count")
    vectors, longer = field(f, "vectors"), field(f, "longer")
    counter = f.at("%d", FIELD["next"], "i64")
    with f.shared_loop(counter, f.mul(group_count, strip_count)) as item:
        strip, group = (f.let(f"{how} i64 {item}, {group_count}") for how in ("udiv", "urem"))
        is_longer = f.let(f"zext i1 {f.compare('slt', strip, longer)} to i64")
        count = f.add(vectors, is_longer)
        before = f.add(f.mul(strip, vectors), f.smaller(strip, longer))
        position = f.mul(before, width)
        for n in range(1, MOST_VECTORS[width] + 1):
            with f.when(f.compare("eq", count, n)):
                f.do(f"call void @strip{n}(ptr %d, i64 {position}, i64 {group})")
    return f


def strip(count: int, width: int) -> Function:
    """Compute `count` vectors of positions, from `pos` on, for a block of filters.

    A short strip takes several nonzeros at once, each with sums of its own: sums that follow each
    other wait for the latency of a multiply-add.
    """
    f = Function(f"internal void @strip{count}(ptr noalias %d, i64 %pos, i64 %group)", width)
    chains = 4 if count <= 2 else 2 if count <= 5 else 1
    x, y, residual, keep = (
        f.at(field(f, name, "ptr"), "%pos") for name in ("x", "y", "residual", "keep")
    )
    bias, nonzeros, tasks, groups = (
        field(f, name, "ptr") for name in ("bias", "nonzeros", "tasks", "groups")
    )
    pitch, activation = field(f, "pitch"), field(f, "activation")
    low, high = (f.splat(field(f, name, "float")) for name in ("low", "high"))
    has_residual = f.compare("ne", field(f, "residual"), 0)
    has_keep = f.compare("ne", field(f, "keep"), 0)
    is_smooth = f.compare("sge", activation, SILU)

    def multiply_add(j: str, sums: list[str]) -> list[str]:
        pair = f.at(nonzeros, j, "i64")
        run, weight = f.at(x, f.long(pair, 0)), f.splat(f.load(pair, 1, "float"))
        loaded = [f.load(run, i * width) for i in range(count)]
        return [
            f.let(
                f"call {f.vector} @llvm.fma.v{width}f32"
                f"({f.vector} {weight}, {f.vector} {value}, {f.vector} {total})"
            )
            for value, total in zip(loaded, sums, strict=True)
        ]

    with f.loop(f.long(groups, "%group"), f.long(f.at(groups, "%group", "i32"), 1)) as task:
        place = f.at(tasks, f.mul(task.index, 4), "i32")
        row, begin, end = (f.long(place, i) for i in range(3))
        flags = f.load(place, 3, "i32")
        start = f.mul(row, pitch)
        y_row = f.at(y, start)
        first = f.splat(f.load(bias, row, "float"))
        is_later = f.compare("eq", f.let(f"and i32 {flags}, {FIRST}"), 0, "i32")
        with f.when(is_later, [first] * count) as sums:
            sums.now = [f.load(y_row, i * width) for i in range(count)]
        if chains > 1:
            many = f.let(f"and i64 {f.let(f'sub i64 {end}, {begin}')}, {-chains}")
            middle = f.add(begin, many)
            zeros = ["zeroinitializer"] * (count * (chains - 1))
            with f.loop(begin, middle, chains, sums.now + zeros) as several:
                several.now = [
                    total
                    for c in range(chains)
                    for total in multiply_add(
                        f.add(several.index, c), several.now[c * count : (c + 1) * count]
                    )
                ]
            for c in range(1, chains):
                for i in range(count):
                    extra = several.now[c * count + i]
                    several.now[i] = f.let(f"fadd {f.vector} {several.now[i]}, {extra}")
            sums.now, begin = several.now[:count], middle
        with f.loop(begin, end, 1, sums.now) as each:
            each.now = multiply_add(each.index, each.now)
        is_last = f.compare("ne", f.let(f"and i32 {flags}, {LAST}"), 0, "i32")
        with f.when(is_last, each.now) as done:
            done.now = _finish(
                f,
                done.now,
                (has_residual, f.at(residual, start)),
                (activation, low, high),
                (has_keep, keep),
            )
        for i, total in enumerate(done.now):
            f.store(total, y_row, i * width)
        with f.when(f.let(f"and i1 {is_last}, {is_smooth}")):
            f.do(f"call void @smooth(ptr {y_row}, i64 {count * width}, i64 {activation})")
    return f


def _finish(
    f: Function,
    sums: list[str],
    residual: tuple[str, str],
    activation: tuple[str, str, str],
    keep: tuple[str, str],
) -> list[str]:
    """Add the residual, apply the activation, and set positions outside of images to zero."""
    kind, low, high = activation
    with f.when(residual[0], sums) as added:
        given = [f.load(residual[1], i * f.width) for i in range(len(sums))]
        added.now = [f.let(f"fadd {f.vector} {a}, {b}") for a, b in zip(sums, given, strict=True)]
    with f.when(f.compare("eq", kind, CLAMP), added.now) as clamped:
        clamped.now = [clamp(f, value, low, high) for value in clamped.now]
    with f.when(f.compare("eq", kind, HARDSWISH), clamped.now) as swished:
        swished.now = [hardswish(f, value) for value in swished.now]
    with f.when(keep[0], swished.now) as kept:
        kept.now = [mask(f, value, keep[1], i * f.width) for i, value in enumerate(kept.now)]
    return kept.now
