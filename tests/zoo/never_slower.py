"""Whether an accelerated model is ever slower than the model, over the zoo and some batch sizes.

    cd tests && python -m zoo.never_slower --batches 1 16 --output ../docs/assets/never_slower.jsonl

Both take turns on one thread; a line is written for each model and batch size, and what the file
holds already is not done again. Models come in a random order, so that the lines so far are a
sample. Those that do not run with a batch of that size are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerating import LAYERS, pruned
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_adapmtl import accelerate

from . import ENTRIES, SAMPLE, Entry

SECONDS = 0.3  # for each comparison


def resized(inputs: Any, batch: int) -> Any:
    """The inputs with as many images as `batch`, those that there are again and again."""
    return tree_map(
        lambda x: x[torch.arange(batch) % len(x)] if isinstance(x, Tensor) and x.dim() else x,
        inputs,
    )


def call(model: Any, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def compare(entry: Entry, batch: int) -> dict[str, Any]:
    """One line."""
    torch.manual_seed(0)
    model, inputs = pruned(entry.make()), resized(entry.inputs(), batch)
    call(model, inputs)
    fast = accelerate(model, inputs)
    times: dict[str, list[float]] = {"model": [], "accelerated": []}
    for _ in range(3):
        call(fast, inputs)
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(times["model"]) < 9:
        for name, part in (("model", model), ("accelerated", fast)):
            start = time.process_time()
            call(part, inputs)
            times[name].append(time.process_time() - start)
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {
        "model": entry.name,
        "batch": batch,
        "ms": {name: round(value, 3) for name, value in ms.items()},
        "ratio": round(ms["model"] / ms["accelerated"], 3),
        "sparse_layers": list(fast.choices.values()).count("sparse"),
        "layers": len(fast.choices),
    }


@torch.no_grad()
def main() -> None:
    """Compare, and append the lines to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--zoo", choices=("sample", "whole"), default="whole")
    parser.add_argument("--output", required=True, help="a file of JSON lines to append to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = set()
    if Path(args.output).exists():
        lines = map(json.loads, Path(args.output).read_text(encoding="utf-8").splitlines())
        done = {(line["model"], line["batch"]) for line in lines}
    for entry in random.Random(0).sample(list(ENTRIES), len(ENTRIES)):
        if args.zoo == "sample" and entry.name not in SAMPLE:
            continue
        if not any(isinstance(module, LAYERS) for module in entry.make().modules()):
            continue
        for batch in args.batches:
            if (entry.name, batch) in done:
                continue
            try:
                line = compare(entry, batch)
            except Exception as error:  # such as a batch norm of one image, or no package
                print(f"{entry.name} at {batch}: {str(error).splitlines()[0][:80]}", flush=True)
                continue
            print(f"{entry.name} at {batch}: {line['ratio']}", flush=True)
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
