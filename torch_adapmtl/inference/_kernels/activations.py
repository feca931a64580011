"""Activations of values in registers, and smooth ones of values in memory, in LLVM IR.

The exponential is ``2^n * 2^f`` with an integer ``n`` and ``f`` between -1/2 and 1/2, for which the
power series has an error of 2e-8. The error function is formula 7.1.26 of Abramowitz and Stegun,
*Handbook of Mathematical Functions*, with an error of 1.5e-7.
"""

from __future__ import annotations

import math

from .ir import Function

NONE, CLAMP, HARDSWISH, SILU, GELU, GELU_TANH = range(6)


def clamp(f: Function, value: str, low: str, high: str) -> str:
    """`value` between `low` and `high`; a NaN fails both comparisons and stays."""
    for how, limit in (("olt", low), ("ogt", high)):
        beyond = f.let(f"fcmp {how} {f.vector} {value}, {limit}")
        value = f.let(f"select <{f.width} x i1> {beyond}, {f.vector} {limit}, {f.vector} {value}")
    return value


def hardswish(f: Function, value: str) -> str:
    """``value * clamp(value + 3, 0, 6) / 6``."""
    gate = clamp(f, _do(f, "fadd", value, f.constant(3)), f.constant(0), f.constant(6))
    return _do(f, "fmul", _do(f, "fmul", value, gate), f.constant(1 / 6))


def smooth(width: int) -> Function:
    """Apply SiLU or one of both forms of GELU to vectors in memory.

    A function of its own, called for values that were just stored: in registers, there would be no
    room for it beside the sums.
    """
    f = Function("internal void @smooth(ptr %y, i64 %floats, i64 %kind) noinline", width)
    for kind, function in ((SILU, _silu), (GELU, _gelu), (GELU_TANH, _gelu_tanh)):
        with f.when(f.compare("eq", "%kind", kind)), f.loop(0, "%floats", width) as i:
            f.store(function(f, f.load("%y", i.index)), "%y", i.index)
    return f


def _do(f: Function, how: str, a: str, b: str) -> str:
    return f.let(f"{how} {f.vector} {a}, {b}")


def _multiply_add(f: Function, a: str, b: str, c: str) -> str:
    vectors = ", ".join(f"{f.vector} {value}" for value in (a, b, c))
    return f.let(f"call {f.vector} @llvm.fma.v{f.width}f32({vectors})")


def _polynomial(f: Function, x: str, coefficients: list[float]) -> str:
    """The highest power comes first."""
    total = f.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = _multiply_add(f, total, x, f.constant(coefficient))
    return total


def _exp(f: Function, x: str) -> str:
    ints = f"<{f.width} x i32>"
    power = _do(f, "fmul", x, f.constant(1 / math.log(2)))
    power = clamp(f, power, f.constant(-126), f.constant(128))  # 2^128 is infinity
    # Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
    magic = f.constant(1.5 * 2**23)
    shifted = _do(f, "fadd", power, magic)
    fraction = _do(f, "fsub", power, _do(f, "fsub", shifted, magic))
    series = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]
    result = _polynomial(f, fraction, series)
    # The exponent of a float begins at bit 23; what lay above is shifted out.
    exponent = f.let(
        f"shl {ints} {f.let(f'bitcast {f.vector} {shifted} to {ints}')}, {_ints(f, 23)}"
    )
    bits = f.let(f"add {ints} {f.let(f'bitcast {f.vector} {result} to {ints}')}, {exponent}")
    return f.let(f"bitcast {ints} {bits} to {f.vector}")


def _ints(f: Function, number: int) -> str:
    return f"<{', '.join([f'i32 {number}'] * f.width)}>"


def _times_sigmoid(f: Function, x: str, minus_y: str) -> str:
    """``x * sigmoid(y)``."""
    return _do(f, "fdiv", x, _do(f, "fadd", _exp(f, minus_y), f.constant(1)))


def _silu(f: Function, x: str) -> str:
    return _times_sigmoid(f, x, _do(f, "fmul", x, f.constant(-1)))


def _gelu_tanh(f: Function, x: str) -> str:
    """``tanh(z)`` is ``2 * sigmoid(2 * z) - 1``."""
    scale = -2 * math.sqrt(2 / math.pi)
    square = _do(f, "fmul", x, x)
    factor = _multiply_add(f, square, f.constant(0.044715 * scale), f.constant(scale))
    return _times_sigmoid(f, x, _do(f, "fmul", x, factor))


def _gelu(f: Function, x: str) -> str:
    """`x` times the normal distribution function, from the tail beyond the size of `x`."""
    size = f.let(f"call {f.vector} @llvm.fabs.v{f.width}f32({f.vector} {x})")
    z = _do(f, "fmul", size, f.constant(math.sqrt(0.5)))
    scaled = _multiply_add(f, z, f.constant(0.3275911), f.constant(1))
    t = _do(f, "fdiv", f.constant(1), scaled)
    coefficients = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0]
    tail = _polynomial(f, t, [c / 2 for c in coefficients])
    falling = _exp(f, _do(f, "fmul", z, _do(f, "fmul", z, f.constant(-1))))
    tail = _do(f, "fmul", tail, falling)
    above = f.let(f"fcmp ogt {f.vector} {x}, {f.constant(0)}")
    rest = _do(f, "fsub", f.constant(1), tail)
    share = f.let(f"select <{f.width} x i1> {above}, {f.vector} {rest}, {f.vector} {tail}")
    return _do(f, "fmul", x, share)
