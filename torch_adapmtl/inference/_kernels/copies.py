"""Kernels that bring images into maps, and out of them."""

from __future__ import annotations

from .fields import FIELD, field
from .ir import Function


def copy() -> Function:
    """Copy images of any strides into a map, every `x_step`-th column (1 or 2), channel by channel.

    In the map, the rows from `first_row` to `last_row` of each image and their columns from
    `first_column` to `last_column` are copied, from `x` on; the rest of the channel is `fill`.
    """
    f = Function("void @copy(ptr %d)", 8)
    x, y, pitch = field(f, "x", "ptr"), field(f, "y", "ptr"), field(f, "pitch")
    batch, rows, columns = (field(f, name) for name in ("batch", "rows", "columns"))
    first_row, last_row = field(f, "first_row"), field(f, "last_row")
    first_column, last_column = field(f, "first_column"), field(f, "last_column")
    x_channel, x_image, x_row = (field(f, f"x_{name}") for name in ("channel", "image", "row"))
    by_two = f.compare("eq", field(f, "x_step"), 2)
    by_one = f.compare("ne", field(f, "x_step"), 2)
    count, image = f.let(f"sub i64 {last_column}, {first_column}"), f.mul(rows, columns)
    corner = f.add(f.mul(first_row, columns), first_column)
    height = f.let(f"sub i64 {last_row}, {first_row}")
    fill = f.splat(field(f, "fill", "float"))
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), field(f, "channels")) as channel:
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


def deinterleave() -> Function:
    """Copy images into two maps of every second column, channel by channel.

    The even columns go to the map at `y`, the odd ones to that at `odd`. In both, the rows from
    `first_row` to `last_row` are written; from the columns `evens` and `odds` on, all
    `x_columns` columns; the rest is `fill`.
    """
    f = Function("void @deinterleave(ptr %d)", 8)
    x, even, odd = (field(f, name, "ptr") for name in ("x", "y", "odd"))
    pitch, fill = field(f, "pitch"), f.splat(field(f, "fill", "float"))
    batch, rows, columns = (field(f, name) for name in ("batch", "rows", "columns"))
    x_channel, x_image, x_row = (field(f, f"x_{name}") for name in ("channel", "image", "row"))
    width, evens, odds = (field(f, name) for name in ("x_columns", "evens", "odds"))
    first_row, image = field(f, "first_row"), f.mul(rows, columns)
    height = f.let(f"sub i64 {field(f, 'last_row')}, {first_row}")
    pairs = f.let(f"lshr i64 {width}, 1")
    last = f.let(f"sub i64 {pairs}, 8")
    is_odd = f.compare("ne", f.let(f"and i64 {width}, 1"), 0)
    picks = [", ".join(f"i32 {2 * e + odd_one}" for e in range(8)) for odd_one in (0, 1)]
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), field(f, "channels")) as channel:
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


def interleave() -> Function:
    """Put the columns of two images of any strides in turn into one map, channel by channel.

    The even columns come from `x`, the odd ones from `odd`. Their rows become every `x_step`-th row
    of the images of the map, from `y` on. The rest of the channel becomes zero if `fill` is not 0.
    """
    f = Function("void @interleave(ptr %d)", 8)
    even, odd, y = (field(f, name, "ptr") for name in ("x", "odd", "y"))
    pitch, clear = field(f, "pitch"), f.compare("ne", field(f, "fill"), 0)
    batch, rows, columns = (field(f, name) for name in ("batch", "rows", "columns"))
    x_channel, x_image, x_row = (field(f, f"x_{name}") for name in ("channel", "image", "row"))
    width, height = field(f, "x_columns"), field(f, "last_row")
    image, apart = f.mul(rows, columns), f.mul(columns, field(f, "x_step"))
    before, last = f.mul(field(f, "first_row"), columns), f.let(f"sub i64 {width}, 8")
    picks = [", ".join(f"i32 {half + e // 2 + 8 * (e % 2)}" for e in range(8)) for half in (0, 4)]
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), field(f, "channels")) as channel:
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


def transpose(width: int) -> Function:
    """Transpose a matrix of `rows` by `columns`, both at least `width`, in square tiles.

    The last tiles overlap the ones before, so that none is smaller.
    """
    f = Function("void @transpose(ptr %d)", width)
    x, y = field(f, "x", "ptr"), field(f, "y", "ptr")
    rows, columns = field(f, "rows"), field(f, "columns")
    pitch, x_row = field(f, "pitch"), field(f, "x_row")
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
