"""Functions in LLVM IR, written a statement at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Values:
    """Values that a loop or a condition may replace: assign to `now` inside, read it after."""

    def __init__(self, now: Sequence[str], index: str = "") -> None:
        self.now = list(now)
        self.index = index


class Function:
    """A function of LLVM IR; `str` gives its text.

    Values are named `%v0`, `%v1`, ... as they come, blocks `b0`, `b1`, ...

    Args:
        signature: Linkage, result, name and parameters.
        width: Number of floats in a vector.
    """

    def __init__(self, signature: str, width: int) -> None:
        self.width = width
        self.vector = f"<{width} x float>"
        self._lines = [f"define {signature} {{", "entry:"]
        self._block = "entry"
        self._names = 0

    def __str__(self) -> str:
        return "\n".join([*self._lines, "  ret void", "}"])

    def do(self, statement: str) -> None:
        """Append a statement without a result."""
        self._lines.append(f"  {statement}")

    def let(self, expression: str) -> str:
        """Append a statement, and return the name of its result."""
        name = f"%v{self._names}"
        self._names += 1
        self.do(f"{name} = {expression}")
        return name

    def at(self, pointer: str, index: str | int, kind: str = "float") -> str:
        """The address of an element."""
        return self.let(f"getelementptr {kind}, ptr {pointer}, i64 {index}")

    def load(self, pointer: str, index: str | int = 0, kind: str = "") -> str:
        """Load an element; by default the vector that begins at the float of that index."""
        address = self.at(pointer, index, kind or "float")
        return self.let(f"load {kind or self.vector}, ptr {address}, align 4")

    def store(self, value: str, pointer: str, index: str | int = 0, kind: str = "") -> None:
        """Store an element; by default a vector, from the float of that index on."""
        address = self.at(pointer, index, kind or "float")
        self.do(f"store {kind or self.vector} {value}, ptr {address}, align 4")

    def long(self, pointer: str, index: str | int) -> str:
        """Load a 32-bit integer, as one of 64 bits."""
        return self.let(f"sext i32 {self.load(pointer, index, 'i32')} to i64")

    def add(self, a: str | int, b: str | int) -> str:
        """The sum of two integers."""
        return self.let(f"add i64 {a}, {b}")

    def mul(self, a: str | int, b: str | int) -> str:
        """The product of two integers."""
        return self.let(f"mul i64 {a}, {b}")

    def smaller(self, a: str | int, b: str | int) -> str:
        """The smaller of two integers."""
        return self.let(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def compare(self, how: str, a: str | int, b: str | int, kind: str = "i64") -> str:
        """Compare integers or pointers."""
        return self.let(f"icmp {how} {kind} {a}, {b}")

    def splat(self, scalar: str) -> str:
        """A vector of one float."""
        first = self.let(f"insertelement {self.vector} poison, float {scalar}, i32 0")
        zeros = f"<{self.width} x i32> zeroinitializer"
        return self.let(f"shufflevector {self.vector} {first}, {self.vector} poison, {zeros}")

    def constant(self, number: float) -> str:
        """A vector of one number, which is rounded to a float."""
        (rounded,) = struct.unpack("f", struct.pack("f", number))
        (bits,) = struct.unpack("Q", struct.pack("d", rounded))
        return f"<{', '.join([f'float 0x{bits:016X}'] * self.width)}>"

    def branch(self, condition: str, yes: str, no: str) -> None:
        """End a block."""
        self.do(f"br i1 {condition}, label %{yes}, label %{no}")

    def block(self, name: str) -> None:
        """Begin a block, to which the one before goes on unless it has ended."""
        self._lines.append(f"{name}:")
        self._block = name

    @contextmanager
    def loop(
        self, begin: str | int, end: str | int, step: int = 1, carried: Sequence[str] = ()
    ) -> Iterator[Values]:
        """Run over `begin`, `begin + step`, ... below `end`, with vectors that change."""
        before, (body, after, done) = self._block, self._labels("body", "after", "done")
        self.branch(self.compare("slt", begin, end), body, done)
        self.block(body)
        following = f"%{after}.next"
        kind, index = self.vector, f"%{body}.index"
        self.do(f"{index} = phi i64 [{begin}, %{before}], [{following}, %{after}]")
        changed = [f"%{after}.{i}" for i in range(len(carried))]
        current = [
            self.let(f"phi {kind} [{old}, %{before}], [{new}, %{after}]")
            for old, new in zip(carried, changed, strict=True)
        ]
        values = Values(current, index)
        yield values
        last = self._block
        self.do(f"br label %{after}")
        self.block(after)
        for new, value in zip(changed, values.now, strict=True):
            self.do(f"{new} = phi {kind} [{value}, %{last}]")
        self.do(f"{following} = add i64 {index}, {step}")
        self.branch(self.compare("slt", following, end), body, done)
        self.block(done)
        values.now = [
            self.let(f"phi {kind} [{old}, %{before}], [{new}, %{after}]")
            for old, new in zip(carried, changed, strict=True)
        ]

    @contextmanager
    def when(self, condition: str, carried: Sequence[str] = ()) -> Iterator[Values]:
        """Run what follows only on a condition; it may replace vectors."""
        before, (then, done) = self._block, self._labels("then", "done")
        self.branch(condition, then, done)
        self.block(then)
        values = Values(carried)
        yield values
        last = self._block
        self.do(f"br label %{done}")
        self.block(done)
        values.now = [
            self.let(f"phi {self.vector} [{old}, %{before}], [{new}, %{last}]")
            for old, new in zip(carried, values.now, strict=True)
        ]

    @contextmanager
    def shared_loop(self, counter: str, count: str) -> Iterator[str]:
        """Run over numbers below `count` that several threads take from a counter."""
        take, some, done = self._labels("take", "some", "done")
        self.do(f"br label %{take}")
        self.block(take)
        item = self.let(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        self.branch(self.compare("slt", item, count), some, done)
        self.block(some)
        yield item
        self.do(f"br label %{take}")
        self.block(done)

    def _labels(self, *names: str) -> list[str]:
        self._names += 1
        return [f"b{self._names}.{name}" for name in names]
