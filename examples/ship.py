"""Train, prune, save small, serve: the way of a model from training to a process that answers.

The problem is that of the quickstart: pairs of digits, three tasks. The network of serve.py is
trained dense and pruned; the pruned one is saved in a small file, loaded by another process, which
answers requests, accelerated and exported to ONNX, and quantised to int8 with its zeros kept. Each
step says how large the file is, how long an image takes on one thread, and how well it does.

    python -m examples.ship --folder shipped
    python -m examples.ship --quick
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.quickstart import evaluate, predict, train
from examples.serve import TASKS, Digits
from torch_adapmtl import accelerate, apply_adapmtl, load_sparse, save_sparse, sparsity
from torch_adapmtl.datasets import MultiDigits

Outputs = dict[str, Tensor]


class Table:
    """Prints a line for each step."""

    def __init__(self, images: Tensor, targets: Outputs, runs: int) -> None:
        self.batches, self.targets, self.runs = (images[:1], images[:16]), targets, runs
        print(
            f"{'':<26}{'MB':>8}{'ms for 1':>10}{'for 16':>8}{'left %':>8}{'right %':>9}"
            f"{'distance %':>12}"
        )

    @torch.no_grad()
    def add(self, step: str, file: Path, model: Callable[[Tensor], Any], outputs: Outputs) -> None:
        """Print a line: measure the time that one image and 16 images take."""
        medians = []
        for images in self.batches:
            times = []
            for _ in range(self.runs):
                begin = time.perf_counter()
                model(images)
                times.append(1e3 * (time.perf_counter() - begin))
            medians.append(sorted(times)[self.runs // 2])
        self.line(step, file, medians, outputs)

    def line(self, step: str, file: Path, times: Sequence[float], outputs: Outputs) -> None:
        """Print the size of a file, milliseconds, and the metrics."""
        metrics = [next(iter(m.values())) for m in evaluate(outputs, self.targets).values()]
        left, right, distance = metrics
        one, many = (*(f"{ms:.2f}" for ms in times), "")[:2]
        print(
            f"{step:<26}{file.stat().st_size / 1e6:8.3f}{one:>10}{many:>8}"
            f"{left:8.2f}{right:9.2f}{distance:12.2f}",
            flush=True,
        )


def serve(file: Path, images: Tensor, folder: Path, *options: str) -> tuple[list[float], Outputs]:
    """Milliseconds that another process takes for a request, and its answers."""
    torch.save(images, folder / "images.pt")
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, script, file, folder / "images.pt", folder / "answers.pt"]
    subprocess.run([*command, *options], stdout=subprocess.DEVNULL, check=True)
    found = torch.load(folder / "answers.pt", weights_only=True)
    return [found["ms"]], found["outputs"]


def export(model: nn.Module, image: Tensor, path: Path) -> None:
    """Write a model for ONNX Runtime, which takes any number of images."""
    torch.onnx.export(
        model,
        (image.repeat(2, 1, 1, 1),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["x"],
        output_names=[*TASKS],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def onnx_model(path: Path) -> Callable[[Tensor], Outputs]:
    """A function that runs an exported model on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Outputs:
        outputs = session.run([*TASKS], {"x": x.numpy()})
        return {task: torch.from_numpy(y) for task, y in zip(TASKS, outputs, strict=True)}

    return run


def quantise(path: Path, out: Path, images: Tensor) -> float:
    """Quantise an exported model to int8; return the share of zeros among its weights."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images.split(50))

        def get_next(self) -> Any:
            x = next(self.left, None)
            return None if x is None else {"x": x.numpy()}

    prepared = out.with_suffix(".prepared")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    # A weight of 0 is quantised to 0, because the scales of weights are symmetric.
    quantize_static(
        prepared,
        out,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        extra_options={"WeightSymmetric": True},
    )
    prepared.unlink()
    weights = [
        torch.from_numpy(onnx.numpy_helper.to_array(x).copy())
        for x in onnx.load(out).graph.initializer
        if x.data_type == onnx.TensorProto.INT8 and len(x.dims) > 1
    ]
    return sparsity(weights)


def main() -> None:
    """Take each step, and print a line for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--folder", default="shipped", help="where the files are written")
    parser.add_argument("--quick", action="store_true", help="a few steps, on little data")
    args = parser.parse_args()
    steps, sizes, runs = args.steps, (10_000, 2_000), 51
    if args.quick:
        steps, sizes, runs = 3, (200, 50), 1
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = MultiDigits("train", size=sizes[0])
    images, targets = MultiDigits("test", size=sizes[1]).tensors()
    image = images[:1]

    models = {}
    for name in ("dense", "sparse"):
        torch.manual_seed(0)
        models[name] = model = Digits()
        pruner = None
        if name == "sparse":
            pruner = apply_adapmtl(
                model,
                target_sparsity=args.sparsity,
                total_steps=steps,
                example_inputs=image,
            )
        train(model, data, steps, 0, pruner)
        if pruner:
            pruner.finalize()
        torch.save(model.eval().state_dict(), folder / f"{name}.pt")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    print()
    table = Table(images, targets, runs)
    for name, model in models.items():
        table.add(f"{name}, torch.save", folder / f"{name}.pt", model, predict(model, images))
    sparse = models["sparse"]

    small = folder / "sparse.safetensors"
    save_sparse(sparse, small)
    loaded = load_sparse(small, Digits()).eval()
    table.add("save_sparse", small, loaded, predict(loaded, images))
    for dtype in (torch.bfloat16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        path = folder / f"{name}.safetensors"
        save_sparse(sparse, path, dtype=dtype)
        loaded = load_sparse(path, Digits()).eval()
        table.add(f"save_sparse, {name}", path, loaded, predict(loaded, images))

    fast = accelerate(sparse, image)
    table.add("accelerated", small, fast, predict(fast, images))
    table.line("serve.py, another process", small, *serve(small, images, folder))
    table.line("serve.py --accelerate", small, *serve(small, images, folder, "--accelerate"))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(sparse, image, folder / "sparse.onnx")
            run = onnx_model(folder / "sparse.onnx")
            table.add("ONNX Runtime", folder / "sparse.onnx", run, run(images))
            zeros = quantise(folder / "sparse.onnx", folder / "int8.onnx", images[:200])
            run = onnx_model(folder / "int8.onnx")
            table.add("ONNX Runtime, int8", folder / "int8.onnx", run, run(images))
        print(f"\nint8: {100 * zeros:.2f} % of the weights are zero")
    except ImportError as error:
        print(f"\nThe steps with ONNX are left out: {error}")
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
