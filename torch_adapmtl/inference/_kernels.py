"""Kernels that skip zeros, in LLVM IR.

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

from ._ir import Function

MOST_VECTORS = {4: 14, 8: 14, 16: 16}  # of output that are held in registers, by floats in a vector
NONE, CLAMP, HARDSWISH = 0, 1, 2  # activations
FIRST, LAST = 1, 2  # flags of a task

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


def source(width: int) -> str:
    """The module as LLVM IR, for vectors of `width` floats."""
    vector = f"<{width} x float>"
    return "\n".join(
        [
            f"declare {vector} @llvm.fma.v{width}f32({vector}, {vector}, {vector})",
            f"declare {vector} @llvm.maximum.v{width}f32({vector}, {vector})",
            f"declare float @llvm.vector.reduce.fadd.v{width}f32(float, {vector})",
            "declare i64 @llvm.smin.i64(i64, i64)",
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            *[str(_strip(count, width)) for count in range(1, MOST_VECTORS[width] + 1)],
            str(_convolve(width)),
            str(_copy()),
            str(_deinterleave()),
            str(_interleave()),
            str(_transpose(width)),
            str(_maximum(width)),
            str(_add(width)),
            str(_scale(width)),
            str(_mean(width)),
            str(_run(width)),
            str(_run_all(width)),
        ]
    )


def _field(f: Function, name: str, kind: str = "i64") -> str:
    """Load a field of the call `%d`."""
    return f.load(f.at("%d", FIELD[name], "i64"), 0, kind)


def _run(width: int) -> Function:
    """What Python calls: zeros around the output, then the work, alone or by a team of threads."""
    f = Function("void @run(ptr %d)", width)
    work = _field(f, "work", "ptr")
    for name in ("lead", "tail"):
        place, size = _field(f, name, "ptr"), _field(f, f"{name}_bytes")
        f.do(f"call void @llvm.memset.p0.i64(ptr {place}, i8 0, i64 {size}, i1 false)")
    threads = _field(f, "threads")
    with f.when(f.compare("sle", threads, 1)):
        f.do(f"call void {work}(ptr %d)")
    with f.when(f.compare("sgt", threads, 1)):
        number = f.let(f"trunc i64 {threads} to i32")
        f.do(f"call void {_field(f, 'parallel', 'ptr')}(ptr {work}, ptr %d, i32 {number}, i32 0)")
    return f


def _run_all(width: int) -> Function:
    """Do what a list of calls describes, one after the other."""
    f = Function("void @run_all(ptr %calls, i64 %count)", width)
    with f.loop(0, "%count") as i:
        call = f.at("%calls", f.mul(i.index, len(FIELDS)), "i64")
        f.store("0", call, FIELD["next"], "i64")
        f.do(f"call void @run(ptr {call})")
    return f


def _convolve(width: int) -> Function:
    """Take strips of positions and blocks of filters until none is left.

    There are `strip_count` strips: `longer` of `vectors + 1` vectors, then the rest of `vectors`.
    """
    f = Function("void @convolve(ptr %d)", width)
    group_count, strip_count = _field(f, "group_count"), _field(f, "strip_count")
    vectors, longer = _field(f, "vectors"), _field(f, "longer")
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


def _strip(count: int, width: int) -> Function:
    """Compute `count` vectors of positions, from `pos` on, for a block of filters.

    A short strip takes several nonzeros at once, each with sums of its own: sums that follow each
    other wait for the latency of a multiply-add.
    """
    f = Function(f"internal void @strip{count}(ptr noalias %d, i64 %pos, i64 %group)", width)
    chains = 4 if count <= 2 else 2 if count <= 5 else 1
    x, y, residual, keep = (
        f.at(_field(f, name, "ptr"), "%pos") for name in ("x", "y", "residual", "keep")
    )
    bias, nonzeros, tasks, groups = (
        _field(f, name, "ptr") for name in ("bias", "nonzeros", "tasks", "groups")
    )
    pitch, activation = _field(f, "pitch"), _field(f, "activation")
    low, high = (f.splat(_field(f, name, "float")) for name in ("low", "high"))
    has_residual = f.compare("ne", _field(f, "residual"), 0)
    has_keep = f.compare("ne", _field(f, "keep"), 0)

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
        clamped.now = [_clamp(f, value, low, high) for value in clamped.now]
    with f.when(f.compare("eq", kind, HARDSWISH), clamped.now) as swished:
        three, six, sixth = f.constant(3), f.constant(6), f.constant(1 / 6)
        gates = [
            _clamp(f, f.let(f"fadd {f.vector} {value}, {three}"), f.constant(0), six)
            for value in swished.now
        ]
        products = [
            f.let(f"fmul {f.vector} {value}, {gate}")
            for value, gate in zip(swished.now, gates, strict=True)
        ]
        swished.now = [f.let(f"fmul {f.vector} {product}, {sixth}") for product in products]
    with f.when(keep[0], swished.now) as kept:
        kept.now = [_mask(f, value, keep[1], i * f.width) for i, value in enumerate(kept.now)]
    return kept.now


def _clamp(f: Function, value: str, low: str, high: str) -> str:
    """`value` between `low` and `high`; a NaN fails both comparisons and stays."""
    for how, limit in (("olt", low), ("ogt", high)):
        beyond = f.let(f"fcmp {how} {f.vector} {value}, {limit}")
        value = f.let(f"select <{f.width} x i1> {beyond}, {f.vector} {limit}, {f.vector} {value}")
    return value


def _mask(f: Function, value: str, keep: str, index: str | int) -> str:
    """The bits of `value` that are set in `keep`."""
    ints = f"<{f.width} x i32>"
    mask = f.let(f"load {ints}, ptr {f.at(keep, index)}, align 4")
    bits = f.let(f"and {ints} {f.let(f'bitcast {f.vector} {value} to {ints}')}, {mask}")
    return f.let(f"bitcast {ints} {bits} to {f.vector}")


def _copy() -> Function:
    """Copy images of any strides into a map, every `x_step`-th column (1 or 2), channel by channel.

    In the map, the rows from `first_row` to `last_row` of each image and their columns from
    `first_column` to `last_column` are copied, from `x` on; the rest of the channel is `fill`.
    """
    f = Function("void @copy(ptr %d)", 8)
    x, y, pitch = _field(f, "x", "ptr"), _field(f, "y", "ptr"), _field(f, "pitch")
    batch, rows, columns = (_field(f, name) for name in ("batch", "rows", "columns"))
    first_row, last_row = _field(f, "first_row"), _field(f, "last_row")
    first_column, last_column = _field(f, "first_column"), _field(f, "last_column")
    x_channel, x_image, x_row = (_field(f, f"x_{name}") for name in ("channel", "image", "row"))
    by_two = f.compare("eq", _field(f, "x_step"), 2)
    by_one = f.compare("ne", _field(f, "x_step"), 2)
    count, image = f.let(f"sub i64 {last_column}, {first_column}"), f.mul(rows, columns)
    corner = f.add(f.mul(first_row, columns), first_column)
    height = f.let(f"sub i64 {last_row}, {first_row}")
    fill = f.splat(_field(f, "fill", "float"))
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), _field(f, "channels")) as channel:
        to, source = f.at(y, f.mul(channel, pitch)), f.at(x, f.mul(channel, x_channel))
        with f.loop(0, pitch, f.width) as position:
            f.store(fill, to, position.index)
        with f.loop(0, batch) as b:
            x_b = f.at(source, f.mul(b.index, x_image))
            y_b = f.at(to, f.add(f.mul(b.index, image), corner))
            with f.loop(0, height) as r:
                x_r, y_r = f.at(x_b, f.mul(r.index, x_row)), f.at(y_b, f.mul(r.index, columns))
                with f.when(by_one):
                    _copy_row(f, x_r, y_r, count, 1)
                with f.when(by_two):
                    _copy_row(f, x_r, y_r, count, 2)
    return f


def _copy_row(f: Function, x: str, y: str, count: str, step: int) -> None:
    """Copy `count` floats that lie `step` apart: eight at once; the last eight overlap others."""
    last = f.let(f"sub i64 {count}, 8")
    with f.when(f.compare("sge", last, 0)), f.loop(0, count, 8) as i:
        index = f.smaller(i.index, last)
        given = f.at(x, f.mul(index, step))
        value = f.load(given)
        if step == 2:  # no float after the last one is read
            second = f.load(given, 7)
            evens = ", ".join(f"i32 {e}" for e in (0, 2, 4, 6, 9, 11, 13, 15))
            pairs = f"{f.vector} {value}, {f.vector} {second}"
            value = f.let(f"shufflevector {pairs}, <8 x i32> <{evens}>")
        f.store(value, y, index)
    with f.when(f.compare("slt", last, 0)), f.loop(0, count) as i:
        f.store(f.load(x, f.mul(i.index, step), "float"), y, i.index, "float")


def _deinterleave() -> Function:
    """Copy images into two maps of every second column, channel by channel.

    The even columns go to the map at `y`, the odd ones to that at `odd`. In both, the rows from
    `first_row` to `last_row` are written; from the columns `evens` and `odds` on, all
    `x_columns` columns; the rest is `fill`.
    """
    f = Function("void @deinterleave(ptr %d)", 8)
    x, even, odd = (_field(f, name, "ptr") for name in ("x", "y", "odd"))
    pitch, fill = _field(f, "pitch"), f.splat(_field(f, "fill", "float"))
    batch, rows, columns = (_field(f, name) for name in ("batch", "rows", "columns"))
    x_channel, x_image, x_row = (_field(f, f"x_{name}") for name in ("channel", "image", "row"))
    width, evens, odds = (_field(f, name) for name in ("x_columns", "evens", "odds"))
    first_row, image = _field(f, "first_row"), f.mul(rows, columns)
    height = f.let(f"sub i64 {_field(f, 'last_row')}, {first_row}")
    pairs = f.let(f"lshr i64 {width}, 1")
    last = f.let(f"sub i64 {pairs}, 8")
    is_odd = f.compare("ne", f.let(f"and i64 {width}, 1"), 0)
    picks = [", ".join(f"i32 {2 * e + odd_one}" for e in range(8)) for odd_one in (0, 1)]
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), _field(f, "channels")) as channel:
        start = f.mul(channel, pitch)
        to_even, to_odd = f.at(even, start), f.at(odd, start)
        source = f.at(x, f.mul(channel, x_channel))
        with f.loop(0, pitch, f.width) as position:
            f.store(fill, to_even, position.index)
            f.store(fill, to_odd, position.index)
        with f.loop(0, batch) as b:
            x_b = f.at(source, f.mul(b.index, x_image))
            place = f.add(f.mul(b.index, image), f.mul(first_row, columns))
            with f.loop(0, height) as r:
                x_r, row = f.at(x_b, f.mul(r.index, x_row)), f.mul(r.index, columns)
                row = f.add(place, row)
                y_even, y_odd = (
                    f.at(to, f.add(row, begin)) for to, begin in ((to_even, evens), (to_odd, odds))
                )
                with f.when(f.compare("sge", last, 0)), f.loop(0, pairs, 8) as i:
                    index = f.smaller(i.index, last)
                    given = f.at(x_r, f.mul(index, 2))
                    both = f"{f.vector} {f.load(given)}, {f.vector} {f.load(given, 8)}"
                    for to, picked in zip((y_even, y_odd), picks, strict=True):
                        value = f.let(f"shufflevector {both}, <8 x i32> <{picked}>")
                        f.store(value, to, index)
                with f.when(f.compare("slt", last, 0)), f.loop(0, pairs) as i:
                    given = f.at(x_r, f.mul(i.index, 2))
                    for to, offset in ((y_even, 0), (y_odd, 1)):
                        f.store(f.load(given, offset, "float"), to, i.index, "float")
                with f.when(is_odd):
                    value = f.load(x_r, f.mul(pairs, 2), "float")
                    f.store(value, y_even, pairs, "float")
    return f


def _interleave() -> Function:
    """Put the columns of two images of any strides in turn into one map, channel by channel.

    The even columns come from `x`, the odd ones from `odd`. Their rows become every `x_step`-th row
    of the images of the map, from `y` on. The rest of the channel becomes zero if `fill` is not 0.
    """
    f = Function("void @interleave(ptr %d)", 8)
    even, odd, y = (_field(f, name, "ptr") for name in ("x", "odd", "y"))
    pitch, clear = _field(f, "pitch"), f.compare("ne", _field(f, "fill"), 0)
    batch, rows, columns = (_field(f, name) for name in ("batch", "rows", "columns"))
    x_channel, x_image, x_row = (_field(f, f"x_{name}") for name in ("channel", "image", "row"))
    width, height = _field(f, "x_columns"), _field(f, "last_row")
    image, apart = f.mul(rows, columns), f.mul(columns, _field(f, "x_step"))
    before, last = f.mul(_field(f, "first_row"), columns), f.let(f"sub i64 {width}, 8")
    picks = [", ".join(f"i32 {half + e // 2 + 8 * (e % 2)}" for e in range(8)) for half in (0, 4)]
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), _field(f, "channels")) as channel:
        to, start = f.at(y, f.mul(channel, pitch)), f.mul(channel, x_channel)
        with f.when(clear), f.loop(0, pitch, f.width) as position:
            f.store("zeroinitializer", to, position.index)
        with f.loop(0, batch) as b:
            x_b = f.add(start, f.mul(b.index, x_image))
            y_b = f.at(to, f.add(f.mul(b.index, image), before))
            with f.loop(0, height) as r:
                x_r, y_r = f.add(x_b, f.mul(r.index, x_row)), f.at(y_b, f.mul(r.index, apart))
                evens, odds = f.at(even, x_r), f.at(odd, x_r)
                with f.when(f.compare("sge", last, 0)), f.loop(0, width, 8) as i:
                    index = f.smaller(i.index, last)
                    both = f"{f.vector} {f.load(evens, index)}, {f.vector} {f.load(odds, index)}"
                    place = f.at(y_r, f.mul(index, 2))
                    for half, picked in enumerate(picks):
                        value = f.let(f"shufflevector {both}, <8 x i32> <{picked}>")
                        f.store(value, place, 8 * half)
                with f.when(f.compare("slt", last, 0)), f.loop(0, width) as i:
                    place = f.at(y_r, f.mul(i.index, 2))
                    for offset, source in enumerate((evens, odds)):
                        f.store(f.load(source, i.index, "float"), place, offset, "float")
    return f


def _transpose(width: int) -> Function:
    """Transpose a matrix of `rows` by `columns`, both at least `width`, in square tiles.

    The last tiles overlap the ones before, so that none is smaller.
    """
    f = Function("void @transpose(ptr %d)", width)
    x, y = _field(f, "x", "ptr"), _field(f, "y", "ptr")
    rows, columns = _field(f, "rows"), _field(f, "columns")
    pitch, x_row = _field(f, "pitch"), _field(f, "x_row")
    last_row, last_column = (f.let(f"sub i64 {n}, {width}") for n in (rows, columns))
    strips = f.let(f"udiv i64 {f.add(columns, width - 1)}, {width}")
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), strips) as strip:
        column = f.smaller(f.mul(strip, width), last_column)
        source, to = f.at(x, column), f.at(y, f.mul(column, pitch))
        with f.loop(0, rows, width) as r:
            row = f.smaller(r.index, last_row)
            given, result = f.at(source, f.mul(row, x_row)), f.at(to, row)
            tile = [f.load(given, f.mul(x_row, i)) for i in range(width)]
            step = 1
            while step < width:  # transpose the square of side 2 * step from those of side step
                tile = _exchange(f, tile, step)
                step *= 2
            for i, value in enumerate(tile):
                f.store(value, result, f.mul(pitch, i))
    return f


def _exchange(f: Function, tile: list[str], step: int) -> list[str]:
    """Exchange the upper right and lower left squares of side `step` in each of side `2 * step`."""
    width, result = f.width, list(tile)
    upper = [e if not e & step else width + e - step for e in range(width)]
    lower = [e + step if not e & step else width + e for e in range(width)]
    for i in range(width):
        if not i & step:
            pair = f"{f.vector} {tile[i]}, {f.vector} {tile[i + step]}"
            for j, picked in ((i, upper), (i + step, lower)):
                mask = ", ".join(f"i32 {e}" for e in picked)
                result[j] = f.let(f"shufflevector {pair}, <{width} x i32> <{mask}>")
    return result


def _maximum(width: int) -> Function:
    """The largest of what lies at some offsets from each position, channel by channel.

    `nonzeros` is a list of `rows` offsets; `x_channel` the floats from one input channel to the
    next.
    """
    f = Function("void @maximum(ptr %d)", width)
    x, y, keep = (_field(f, name, "ptr") for name in ("x", "y", "keep"))
    offsets, count = _field(f, "nonzeros", "ptr"), _field(f, "rows")
    pitch, x_channel = _field(f, "pitch"), _field(f, "x_channel")
    has_keep = f.compare("ne", _field(f, "keep"), 0)
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), _field(f, "channels")) as channel:
        source, to = f.at(x, f.mul(channel, x_channel)), f.at(y, f.mul(channel, pitch))
        with f.loop(0, pitch, width) as position:
            given = f.at(source, position.index)
            first = f.load(given, f.long(offsets, 0))
            with f.loop(1, count, 1, [first]) as tap:
                value = f.load(given, f.long(offsets, tap.index))
                pair = f"{f.vector} {tap.now[0]}, {f.vector} {value}"
                tap.now = [f.let(f"call {f.vector} @llvm.maximum.v{width}f32({pair})")]
            with f.when(has_keep, tap.now) as kept:
                kept.now = [_mask(f, tap.now[0], keep, position.index)]
            f.store(kept.now[0], to, position.index)
    return f


def _add(width: int) -> Function:
    """The sum of two maps of one layout, `x` and `residual`, channel by channel."""
    f = Function("void @add(ptr %d)", width)
    maps = [_field(f, name, "ptr") for name in ("x", "residual", "y")]
    pitch = _field(f, "pitch")
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), _field(f, "channels")) as channel:
        x, residual, y = (f.at(place, f.mul(channel, pitch)) for place in maps)
        with f.loop(0, pitch, width) as i:
            a, b = f.load(x, i.index), f.load(residual, i.index)
            f.store(f.let(f"fadd {f.vector} {a}, {b}"), y, i.index)
    return f


def _scale(width: int) -> Function:
    """A map times one factor for each image and channel, which lies at `odd` in that order.

    What lies around the images becomes zero, also where the factor is not finite.
    """
    f = Function("void @scale(ptr %d)", width)
    x, y, keep, factors = (_field(f, name, "ptr") for name in ("x", "y", "keep", "odd"))
    pitch, channels, batch = (_field(f, name) for name in ("pitch", "channels", "batch"))
    image = f.mul(_field(f, "rows"), _field(f, "columns"))
    last = f.let(f"sub i64 {image}, {width}")
    has_keep = f.compare("ne", _field(f, "keep"), 0)
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), channels) as channel:
        start = f.mul(channel, pitch)
        source, to = f.at(x, start), f.at(y, start)
        with f.loop(0, batch) as b:
            begin = f.mul(b.index, image)
            factor = f.load(factors, f.add(f.mul(b.index, channels), channel), "float")
            every = f.splat(factor)
            with f.when(f.compare("sge", last, 0)), f.loop(0, image, width) as i:
                place = f.add(begin, f.smaller(i.index, last))
                product = f.let(f"fmul {f.vector} {f.load(source, place)}, {every}")
                with f.when(has_keep, [product]) as kept:
                    kept.now = [_mask(f, product, keep, place)]
                f.store(kept.now[0], to, place)
            with f.when(f.compare("slt", last, 0)), f.loop(0, image) as i:
                place = f.add(begin, i.index)
                product = f.let(f"fmul float {f.load(source, place, 'float')}, {factor}")
                f.store(product, to, place, "float")
                is_kept = f.let(f"load i32, ptr {f.at(keep, place)}, align 4")
                with f.when(f.compare("eq", is_kept, 0, "i32")):
                    f.store("0.0", to, place, "float")
        with f.loop(f.mul(batch, image), pitch) as i:
            f.store("0.0", to, i.index, "float")
    return f


def _mean(width: int) -> Function:
    """The sum of each image and channel of a map, divided by `low`; to `y`, image by image."""
    f = Function("void @mean(ptr %d)", width)
    x, y, count = _field(f, "x", "ptr"), _field(f, "y", "ptr"), _field(f, "low", "float")
    pitch, channels, batch = (_field(f, name) for name in ("pitch", "channels", "batch"))
    image, chains = f.mul(_field(f, "rows"), _field(f, "columns")), 4
    many = f.let(f"and i64 {image}, {-chains * width}")
    some = f.let(f"and i64 {image}, {-width}")
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), channels) as channel:
        source = f.at(x, f.mul(channel, pitch))
        with f.loop(0, batch) as b:
            given = f.at(source, f.mul(b.index, image))
            with f.loop(0, many, chains * width, ["zeroinitializer"] * chains) as sums:
                sums.now = [
                    f.let(f"fadd {f.vector} {total}, {f.load(given, f.add(sums.index, c * width))}")
                    for c, total in enumerate(sums.now)
                ]
            total = sums.now[0]
            for other in sums.now[1:]:
                total = f.let(f"fadd {f.vector} {total}, {other}")
            with f.loop(many, some, width, [total]) as each:
                each.now = [f.let(f"fadd {f.vector} {each.now[0]}, {f.load(given, each.index)}")]
            with f.loop(some, image, 1, each.now) as one:
                value = f.load(given, one.index, "float")
                alone = f.let(f"insertelement {f.vector} zeroinitializer, float {value}, i32 0")
                one.now = [f.let(f"fadd {f.vector} {one.now[0]}, {alone}")]
            reduce = f"call reassoc float @llvm.vector.reduce.fadd.v{width}f32"
            total = f.let(f"{reduce}(float 0.0, {f.vector} {one.now[0]})")
            result = f.let(f"fdiv float {total}, {count}")
            f.store(result, y, f.add(f.mul(b.index, channels), channel), "float")
    return f
