"""How small and how fast files of sparse models are: save_sparse beside other formats.

Random zeros are put into every tensor of two or more dimensions, or trained weights are read from
files of state dicts. Each is written and read by `save_sparse`, `torch.save`, safetensors, and by
zstd, xz and zipnn applied to the safetensors file, on one thread, in processor time. All are
compared with the entropy: for each tensor of floating-point numbers, that of where its zeros are
and of the exponents of its nonzeros, and the other bits of the nonzeros as they are.

    python examples/file_size.py --models resnet18 resnet50 vit_small_patch16_224
    python examples/file_size.py --files net.pt --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from torch_adapmtl import load_sparse, save_sparse

EXPONENT_BITS = {torch.float64: 11, torch.float32: 8, torch.bfloat16: 8, torch.float16: 5}


def make_state(name: str, sparsity: float) -> dict[str, Tensor]:
    """The state dict of an untrained model with random zeros."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x[torch.rand_like(x) < sparsity] = 0
    return dict(model.state_dict())


def entropy_of(counts: Tensor) -> float:
    """Bits of all symbols, of which there are so many of each kind."""
    p = counts[counts > 0].double() / counts.sum()
    return -float((p * p.log2()).sum() * counts.sum())


def entropy(x: Tensor) -> float:
    """Bytes of a tensor: the entropy of its zeros and its exponents, and the other bits."""
    if x.dtype not in EXPONENT_BITS:
        return x.nbytes
    exponents, bits = EXPONENT_BITS[x.dtype], 8 * x.element_size()
    kept = x[x != 0]
    zeros = torch.tensor([len(kept), x.numel() - len(kept)])
    if not len(kept):
        return 0.0
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    exponent = (kept.view(integers) >> (bits - 1 - exponents)) & (2**exponents - 1)
    used = entropy_of(zeros) + entropy_of(torch.bincount(exponent.flatten().int()))
    return (used + len(kept) * (bits - exponents)) / 8


def formats() -> dict[str, tuple[Callable[[Any, Path], Any], Callable[[Path], Any]]]:
    """How to write and read each format; those whose packages are not installed are left out."""
    found: dict[str, Any] = {
        "save_sparse": (save_sparse, load_sparse),
        "torch.save": (torch.save, torch.load),
    }
    try:
        import safetensors.torch
    except ImportError:
        return found

    found["safetensors"] = (safetensors.torch.save_file, safetensors.torch.load_file)

    def packed(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Any:
        return (
            lambda state, path: path.write_bytes(pack(safetensors.torch.save(state))),
            lambda path: safetensors.torch.load(bytes(unpack(path.read_bytes()))),
        )

    try:
        import zstandard

        found["zstd"] = packed(
            zstandard.ZstdCompressor(3).compress, zstandard.ZstdDecompressor().decompress
        )
    except ImportError:
        pass
    found["xz"] = packed(lzma.compress, lzma.decompress)
    try:
        with warnings.catch_warnings():  # it uses torch.jit.script
            warnings.simplefilter("ignore")
            import zipnn

        coder = zipnn.ZipNN(bytearray_dtype="float32", threads=1)
        found["zipnn"] = packed(coder.compress, coder.decompress)
    except ImportError:
        pass
    return found


def measure(state: dict[str, Tensor], dtype: torch.dtype | None, repeats: int) -> dict[str, Any]:
    """Bytes and seconds of each format."""
    line: dict[str, Any] = {"bytes": {}, "write_s": {}, "read_s": {}}
    dense = sum(x.nbytes for x in state.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for name, (write, read) in formats().items():
            times = []
            for _ in range(repeats if name != "xz" else 1):
                begin = time.process_time()
                if name == "save_sparse":
                    save_sparse(state, path, dtype=dtype)
                else:
                    write(state, path)
                middle = time.process_time()
                read(path)
                times.append((middle - begin, time.process_time() - middle))
            line["bytes"][name] = path.stat().st_size
            writes, reads = zip(*times, strict=True)
            line["write_s"][name] = round(min(writes), 4)
            line["read_s"][name] = round(min(reads), 4)
    line["bytes"]["entropy"] = round(sum(map(entropy, state.values())))
    weights = sum(x.numel() for x in state.values())
    zeros = sum(int((x == 0).sum()) for x in state.values())
    return {"weights": weights, "sparsity": round(zeros / weights, 4), "dense": dense, **line}


def main() -> None:
    """Print a table, and write a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["resnet18"], help="names of timm")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98, 0.99]
    )
    parser.add_argument("--files", nargs="*", default=[], help="state dicts, by torch.save")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "int8"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="a file of JSON lines to append to")
    parser.add_argument("--quick", action="store_true", help="one small case")
    args = parser.parse_args()
    if args.quick:
        args.models, args.sparsity, args.files, args.repeats = (
            ["mobilenetv3_small_050"],
            [0.9],
            [],
            1,
        )
    torch.set_num_threads(1)
    cases = [
        (f"{name} {100 * sparsity:g} %", lambda n=name, s=sparsity: make_state(n, s))
        for name in args.models
        for sparsity in args.sparsity
    ]
    cases += [(Path(f).name, lambda f=f: torch.load(f, weights_only=True)) for f in args.files]
    for name, make in cases:
        state = make()
        dtype = getattr(torch, args.dtype) if args.dtype else None
        line = {"case": name, "dtype": args.dtype, **measure(state, dtype, args.repeats)}
        own = line["bytes"]["save_sparse"]
        print(
            f"{name}: {line['dense'] / own:.1f} times smaller, "
            f"{100 * (own / line['bytes']['entropy'] - 1):+.2f} % of the entropy, "
            f"written at {line['dense'] / line['write_s']['save_sparse'] / 1e6:.0f} and read at "
            f"{line['dense'] / line['read_s']['save_sparse'] / 1e6:.0f} MB/s",
            flush=True,
        )
        bits = {k: f"{8 * n / line['weights']:.2f}" for k, n in line["bytes"].items()}
        print("    bits per weight: " + ", ".join(f"{k} {v}" for k, v in bits.items()), flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
