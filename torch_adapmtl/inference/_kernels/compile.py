"""The kernels, compiled in the process for the processor that is there."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .fields import WORKS
from .source import source


@dataclass(frozen=True)
class Kernels:
    """The compiled code.

    Attributes:
        width: Number of floats in a vector.
        run: Does the work that a call describes, in as many threads as it says.
        run_all: Does so for so many calls that lie one after the other.
        works: The address of each work.
        parallel: The address of the function that starts a team of threads; 0 if there is none.
        engine: Keeps the code alive.
    """

    width: int
    run: Callable[[Any], None]
    run_all: Callable[[Any, int], None]
    works: dict[str, int]
    parallel: int
    engine: Any


@functools.cache
def host_width() -> int:
    """How many floats a vector of this processor holds."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


def assembly(width: int, triple: str | None = None, cpu: str = "", features: str = "") -> Any:
    """The kernels for a processor: LLVM's module and target machine."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple or llvm.get_process_triple())
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    module = llvm.parse_assembly(source(width))
    module.verify()
    return module, machine


_lock = threading.Lock()


def kernels(width: int) -> Kernels:
    """Compile the kernels for this processor: 0.2 to 0.4 s, once in a process."""
    with _lock:  # plans hold addresses of code, so there must never be a second engine
        return _compiled(width)


@functools.cache
def _compiled(width: int) -> Kernels:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    if width == 16:  # LLVM would use half of the registers
        features += ",-prefer-256-bit"
    module, machine = assembly(width, None, llvm.get_host_cpu_name(), features)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    run_all = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(
        engine.get_function_address("run_all")
    )
    works = {name: engine.get_function_address(name) for name in WORKS}
    return Kernels(width, run, run_all, works, _team(), engine)


def _team() -> int:
    """The address of the function that starts a team of the OpenMP threads that torch uses."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # another OpenMP library, or another system
        return 0
