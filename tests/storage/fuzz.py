"""Fuzzing of `load_sparse`, by hand: python tests/storage/fuzz.py -max_total_time=600

The fuzzer, atheris, changes values of the header and of the index, and bytes of the data of a file
of a small model. The file gets the right checksum, so that what lies behind it is reached. Nothing
but an error that names the file may come of it, and then the model is unchanged.
"""

from __future__ import annotations

import copy
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sealing import parts, places, sealed, text_of, with_index
from torch import nn

PATH = Path(tempfile.gettempdir()) / "fuzzed.safetensors"


def make() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(64, 70)
    with torch.no_grad():
        first.weight[torch.rand(70, 64) < 0.8] = 0
    model = nn.Sequential(first, nn.BatchNorm1d(70), nn.Linear(70, 3))
    model.register_buffer("flag", torch.tensor([True, False]))
    return model


def change(source: Any, header: dict[str, Any], index: Any) -> None:
    """Take away a value, or put another in its place."""
    found = places(header) + places(index)
    if not found:
        return
    holder, key = found[source.ConsumeIntInRange(0, len(found) - 1)]
    other = found[source.ConsumeIntInRange(0, len(found) - 1)]
    kind = source.ConsumeIntInRange(0, 7)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = source.ConsumeIntInRange(-2, 2**63 - 1)
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += source.ConsumeIntInRange(-300, 300)
    elif kind == 3:
        holder[key] = copy.deepcopy(other[0][other[1]])
    elif kind == 4:
        holder[key] = source.ConsumeFloat()
    elif kind == 5:
        holder[key] = source.ConsumeUnicodeNoSurrogates(4)
    elif kind == 6 and isinstance(holder, list):
        holder.append(copy.deepcopy(other[0][other[1]]))
    else:
        holder[key] = source.PickValueInList([None, True, [], {}, "F32", "I8", "BOOL", "BF16"])


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["torch_adapmtl.storage"]):
        library = importlib.import_module("torch_adapmtl")
    library.save_sparse(make(), PATH)
    valid = parts(PATH.read_bytes())
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    counts = {"loaded": 0, "refused": 0}

    def once(given: bytes) -> None:
        source = atheris.FuzzedDataProvider(given)
        header, index, data = copy.deepcopy(valid)
        for _ in range(source.ConsumeIntInRange(0, 4)):
            change(source, header, index)
        content = bytearray(data)
        for _ in range(source.ConsumeIntInRange(0, 9)):
            place = source.ConsumeIntInRange(0, len(content) - 1)
            content[place] = source.ConsumeIntInRange(0, 255)
        header, content = with_index(header, index, bytes(content))
        PATH.write_bytes(sealed(text_of(header), content))
        try:
            library.load_sparse(PATH, model)
            counts["loaded"] += 1
        except ValueError as error:
            counts["refused"] += 1
            unchanged = [torch.equal(x, before[name]) for name, x in model.state_dict().items()]
            if str(PATH) not in str(error) or not all(unchanged):
                raise RuntimeError("the error names no file, or the model was changed") from error
        model.load_state_dict(before)
        if sum(counts.values()) % 10_000 == 0:
            print(counts, flush=True)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
