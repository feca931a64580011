"""The kernels: LLVM IR, compiled in the process."""
