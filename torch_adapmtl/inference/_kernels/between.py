"""Kernels for what lies between layers: pooling and elementwise operations on maps."""

from __future__ import annotations

from .fields import FIELD, field, mask
from .ir import Function


def maximum(width: int) -> Function:
    """The largest of what lies at some offsets from each position, channel by channel.

    `nonzeros` is a list of `rows` offsets; `x_channel` the floats from one input channel to the
    next.
    """
    f = Function("void @maximum(ptr %d)", width)
    x, y, keep = (field(f, name, "ptr") for name in ("x", "y", "keep"))
    offsets, count = field(f, "nonzeros", "ptr"), field(f, "rows")
    pitch, x_channel = field(f, "pitch"), field(f, "x_channel")
    has_keep = f.compare("ne", field(f, "keep"), 0)
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), field(f, "channels")) as channel:
        source, to = f.at(x, f.mul(channel, x_channel)), f.at(y, f.mul(channel, pitch))
        with f.loop(0, pitch, width) as position:
            given = f.at(source, position.index)
            first = f.load(given, f.long(offsets, 0))
            with f.loop(1, count, 1, [first]) as tap:
                value = f.load(given, f.long(offsets, tap.index))
                pair = f"{f.vector} {tap.now[0]}, {f.vector} {value}"
                tap.now = [f.let(f"call {f.vector} @llvm.maximum.v{width}f32({pair})")]
            with f.when(has_keep, tap.now) as kept:
                kept.now = [mask(f, tap.now[0], keep, position.index)]
            f.store(kept.now[0], to, position.index)
    return f


def add(width: int) -> Function:
    """The sum of two maps of one layout, `x` and `residual`, channel by channel."""
    f = Function("void @add(ptr %d)", width)
    maps = [field(f, name, "ptr") for name in ("x", "residual", "y")]
    pitch = field(f, "pitch")
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), field(f, "channels")) as channel:
        x, residual, y = (f.at(place, f.mul(channel, pitch)) for place in maps)
        with f.loop(0, pitch, width) as i:
            a, b = f.load(x, i.index), f.load(residual, i.index)
            f.store(f.let(f"fadd {f.vector} {a}, {b}"), y, i.index)
    return f


def scale(width: int) -> Function:
    """A map times one factor for each image and channel, which lies at `odd` in that order.

    What lies around the images becomes zero, also where the factor is not finite.
    """
    f = Function("void @scale(ptr %d)", width)
    x, y, keep, factors = (field(f, name, "ptr") for name in ("x", "y", "keep", "odd"))
    pitch, channels, batch = (field(f, name) for name in ("pitch", "channels", "batch"))
    image = f.mul(field(f, "rows"), field(f, "columns"))
    last = f.let(f"sub i64 {image}, {width}")
    has_keep = f.compare("ne", field(f, "keep"), 0)
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
                    kept.now = [mask(f, product, keep, place)]
                f.store(kept.now[0], to, place)
            with f.when(f.compare("slt", last, 0)), f.loop(0, image) as i:
                place = f.add(begin, i.index)
                product = f.let(f"fmul float {f.load(source, place, 'float')}, {factor}")
                f.store(product, to, place, "float")
                with f.when(has_keep):
                    is_kept = f.let(f"load i32, ptr {f.at(keep, place)}, align 4")
                    with f.when(f.compare("eq", is_kept, 0, "i32")):
                        f.store("0.0", to, place, "float")
        with f.loop(f.mul(batch, image), pitch) as i:
            f.store("0.0", to, i.index, "float")
    return f


def mean(width: int) -> Function:
    """The sum of each image and channel of a map, divided by `low`; to `y`, image by image.

    The sums are doubles: a mean of a million equal floats would lose four digits.
    """
    f = Function("void @mean(ptr %d)", width)
    floats, f.vector = f.vector, f"<{width} x double>"
    x, y, count = field(f, "x", "ptr"), field(f, "y", "ptr"), field(f, "low", "float")
    pitch, channels, batch = (field(f, name) for name in ("pitch", "channels", "batch"))
    image = f.mul(field(f, "rows"), field(f, "columns"))
    whole = f.let(f"and i64 {image}, {-width}")
    divisor = f.let(f"fpext float {count} to double")
    with f.shared_loop(f.at("%d", FIELD["next"], "i64"), channels) as channel:
        source = f.at(x, f.mul(channel, pitch))
        with f.loop(0, batch) as b:
            given = f.at(source, f.mul(b.index, image))
            with f.loop(0, whole, width, ["zeroinitializer"]) as sums:
                loaded = f.let(f"load {floats}, ptr {f.at(given, sums.index)}, align 4")
                value = f.let(f"fpext {floats} {loaded} to {f.vector}")
                sums.now = [f.let(f"fadd {f.vector} {sums.now[0]}, {value}")]
            with f.loop(whole, image, 1, sums.now) as one:
                value = f.let(f"fpext float {f.load(given, one.index, 'float')} to double")
                alone = f.let(f"insertelement {f.vector} zeroinitializer, double {value}, i32 0")
                one.now = [f.let(f"fadd {f.vector} {one.now[0]}, {alone}")]
            reduce = f"call reassoc double @llvm.vector.reduce.fadd.v{width}f64"
            total = f.let(f"{reduce}(double 0.0, {f.vector} {one.now[0]})")
            result = f.let(f"fptrunc double {f.let(f'fdiv double {total}, {divisor}')} to float")
            f.store(result, y, f.add(f.mul(b.index, channels), channel), "float")
    return f
