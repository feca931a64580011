"""One source of IR, compiled for the processors that it is meant for."""

from __future__ import annotations

import re

import pytest

from torch_adapmtl.inference._kernels.compile import assembly, host_width, kernels
from torch_adapmtl.inference._kernels.convolve import MOST_VECTORS
from torch_adapmtl.inference._kernels.fields import WORKS

X86 = "x86_64-unknown-linux-gnu"
# Floats in a vector, the processor, and a multiply-add of its vectors in its assembly.
TARGETS = {
    "NEON": (4, "aarch64-unknown-linux-gnu", "neoverse-n1", r"fmla\s+v\d+\.4s, v\d+\.4s"),
    "NEON on macOS": (4, "arm64-apple-macosx", "apple-m1", r"fmla\.4s\s+v\d+, v\d+"),
    "AVX2": (8, X86, "haswell", r"vfmadd\d+ps\s.*%ymm"),
    "AVX-512": (16, X86, "skylake-avx512", r"vfmadd\d+ps\s.*%zmm"),
}


@pytest.fixture(scope="module", params=TARGETS)
def assembled(request: pytest.FixtureRequest) -> tuple[int, str, str]:
    """Width, assembly, and the pattern of a multiply-add."""
    width, triple, processor, pattern = TARGETS[request.param]
    features = "-prefer-256-bit" if width == 16 else ""
    module, machine = assembly(width, triple, processor, features)
    module.verify()
    return width, machine.emit_assembly(module), pattern


def bodies(text: str) -> dict[str, str]:
    """The assembly of each function, by its name."""
    parts = re.split(r"^_?(\w+):.*$", text, flags=re.MULTILINE)[1:]
    names, code = parts[::2], parts[1::2]
    found: dict[str, str] = {}
    for name, body in zip(names, code, strict=True):
        if not name.startswith(("LBB", "Lfunc", "LCPI", "Ltmp")):
            found[name] = body
        elif found:
            found[next(reversed(found))] += f"\n.{name}:\n{body}"
    return found


def test_all_works_are_there(assembled: tuple[int, str, str]) -> None:
    width, text, _ = assembled
    functions = bodies(text)
    assert {*WORKS, "run"} <= {*functions}
    assert {f"strip{n}" for n in range(1, MOST_VECTORS[width] + 1)} <= {*functions}


def test_strips_multiply_and_add_in_one_instruction(assembled: tuple[int, str, str]) -> None:
    width, text, pattern = assembled
    functions = bodies(text)
    for count in range(1, MOST_VECTORS[width] + 1):
        assert len(re.findall(pattern, functions[f"strip{count}"])) >= count
    assert not re.search(r"\b(call|bl)\s+_?fmaf?\b", text)  # what LLVM falls back to


def test_a_nonzero_reads_its_inputs_and_nothing_else(assembled: tuple[int, str, str]) -> None:
    """The loop over nonzeros of the longest strip keeps its sums in registers: it stores nothing.

    Spilled sums would double what the loop moves.
    """
    width, text, pattern = assembled
    body = bodies(text)[f"strip{MOST_VECTORS[width]}"]
    blocks = re.split(r"^\.?L\w+:.*$", body, flags=re.MULTILINE)
    loops = [block for block in blocks if len(re.findall(pattern, block)) >= MOST_VECTORS[width]]
    assert loops
    stores = r"^\s+(vmov[au]ps\s+%[yz]mm\d+, .*\(|st[rp]\s+q\d+)"
    for loop in loops:
        assert not re.search(stores, loop, flags=re.MULTILINE)


def test_this_processor_has_kernels() -> None:
    compiled = kernels(host_width())
    assert compiled is kernels(host_width())
    assert {*compiled.works} == {*WORKS}
    assert all(compiled.works.values())
