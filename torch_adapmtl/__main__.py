"""The command line: small files of sparse models, without code.

python -m torch_adapmtl inspect model.safetensors
python -m torch_adapmtl pack model.pt model.safetensors --dtype bfloat16
python -m torch_adapmtl unpack model.safetensors model.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_adapmtl.run.plain import plain_state_dict
from torch_adapmtl.storage import SparseFile, load_sparse, save_sparse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the result is the exit status, 1 for an error, which is printed."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_adapmtl", description="Small files of sparse models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show what a file of save_sparse holds")
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true", help="as JSON instead of a table")
    inspect.set_defaults(run=_inspect)

    pack = commands.add_parser("pack", help="write a state dict of torch.save as a small file")
    pack.add_argument("model", help="file of torch.save")
    pack.add_argument("file", help="file to write")
    pack.add_argument("--key", help="where the state dict is in a checkpoint, such as state_dict")
    pack.add_argument("--dtype", choices=("bfloat16", "float16", "int8"), help="of the values")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser("unpack", help="write a state dict with all its zeros")
    unpack.add_argument("file", help="file of save_sparse")
    unpack.add_argument(
        "out", help="file to write: of safetensors if it ends so, otherwise of torch.save"
    )
    unpack.set_defaults(run=_unpack)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    file = SparseFile.read(args.file)
    print(json.dumps(file.to_dict()) if args.json else f"{file}\n\n{file.table()}")


def _pack(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(save_sparse(_state_dict(args.model, args.key), args.file, dtype=dtype))


def _state_dict(path: str, key: str | None) -> Mapping[str, Any]:
    with open(path, "rb"):
        pass  # an OSError that names the file
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for what it did not write
        raise ValueError(
            f"{path} holds more than tensors, or is no file of torch.save, or was cut off: save "
            "model.state_dict() instead of the model"
        ) from error
    if key is not None:
        if not isinstance(found, Mapping) or key not in found:
            raise ValueError(f"{path} has no {key!r}: {_names(found)}")
        found = found[key]
    tensors = isinstance(found, Mapping) and all(
        isinstance(x, torch.Tensor) for x in found.values()
    )
    if not tensors:
        raise ValueError(
            f"{path} holds no state dict but {_names(found)}: name its place with --key"
        )
    return plain_state_dict(found)  # without a pruner, if it was saved during a run


def _names(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    return f"a dict with {', '.join(map(repr, list(found)[:9]))}"


def _unpack(args: argparse.Namespace) -> None:
    state = load_sparse(args.file)
    try:
        _write(state, args.out)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{args.out} cannot be written: {str(error).splitlines()[0]}") from error


def _write(state: Mapping[str, torch.Tensor], out: str) -> None:
    if out.endswith(".safetensors"):
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise ValueError(
                "writing a safetensors file needs the package: pip install safetensors"
            ) from None
        # It wants no two tensors in one memory.
        save_file({name: x.clone() for name, x in state.items()}, out)
    else:
        torch.save(state, out)


if __name__ == "__main__":
    sys.exit(main())
