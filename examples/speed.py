"""How much faster a sparse model runs on a CPU, against the fastest dense way to run it.

Random zeros are put into every convolution and linear layer of a model. `accelerate` runs it; so do
torch as it is, torch with batch norms folded, the same in channels-last format, `torch.compile`,
ONNX Runtime and OpenVINO, where they are installed. All run in turn in one process, on the same
input, and the medians of the processor time are compared.

    python examples/speed.py --models resnet50 resnet18 --sparsity 0.8 0.9 0.95
    python examples/speed.py --models vit_small_patch16_224 --batch 16 --threads 2
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from torch_adapmtl import accelerate

MODELS = (
    "resnet50",
    "resnet18",
    "unet_resnet18",
    "mobilenetv3_large_100",
    "vit_small_patch16_224",
)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Heads(nn.Module):
    """A timm encoder with a linear head for each task."""

    def __init__(self, name: str, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, pretrained=False, num_classes=0)
        width = getattr(self.encoder, "head_hidden_size", None) or self.encoder.num_features
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all tasks."""
        features = self.encoder(x)
        return tuple(head(features) for head in self.heads)


def make_model(name: str, sparsity: float) -> nn.Module:
    """A model in evaluation mode, with random zeros and batch norms that do something."""
    torch.manual_seed(0)
    if name == "unet_resnet18":
        model: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=13)
    else:
        model = Heads(name, (40, 10) if name.startswith("vit") else (40, 10, 3))
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1)
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """A copy with batch norms folded into the convolutions before them."""
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    for node in graph.graph.nodes:
        given = node.args[0] if node.args else None
        if node.op != "call_module" or getattr(given, "op", "") != "call_module":
            continue
        norm, layer = graph.get_submodule(node.target), graph.get_submodule(given.target)
        if type(norm) is nn.BatchNorm2d and type(layer) is nn.Conv2d and len(given.users) == 1:
            graph.set_submodule(given.target, fuse_conv_bn_eval(layer, norm))
            node.replace_all_uses_with(given)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def plain_norms(model: nn.Module) -> nn.Module:
    """A copy in which timm's batch norms with activations are torch's, to be folded."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d:
            norm = nn.BatchNorm2d(module.num_features, module.eps)
            norm.load_state_dict(
                {k: v for k, v in module.state_dict().items() if k in norm.state_dict()}
            )
            model.set_submodule(name, nn.Sequential(norm, module.drop, module.act))
    return model.eval()


def engines(
    model: nn.Module, x: Tensor, threads: int, *, torch_only: bool
) -> dict[str, Callable[[], Any]]:
    """The dense ways to run a model that work here."""
    with_norms = plain_norms(model)
    fused = folded(with_norms)
    last = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: model(x),
        "folded": lambda: fused(x),
        "channels last": lambda: last(x_last),
    }
    if torch_only:
        return ways
    try:
        compiled = torch.compile(copy.deepcopy(model))
        compiled(x)
        ways["compile"] = lambda: compiled(x)
    except Exception as error:  # such as: there is no C++ compiler
        print(f"  torch.compile does not work here: {str(error).splitlines()[0][:80]}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
        try:
            ways["onnxruntime"] = onnx_runtime(path, x, threads)
        except ImportError:
            print("  onnxruntime is not installed")
        try:
            ways["openvino"] = open_vino(path, x, threads)
        except ImportError:
            print("  openvino is not installed")
    return ways


def onnx_runtime(path: str, x: Tensor, threads: int) -> Callable[[], Any]:
    """ONNX Runtime on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def open_vino(path: str, x: Tensor, threads: int) -> Callable[[], Any]:
    """OpenVINO on a CPU, in float32."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request, given = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([given], share_inputs=True, share_outputs=True)


def measure(ways: dict[str, Callable[[], Any]], runs: int, threads: int) -> dict[str, float]:
    """Median milliseconds of each way; the ways take turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for way in ways.values():
            way()
    for _ in range(runs):
        for name, way in ways.items():
            begin = clock()
            way()
            times[name].append(1e3 * (clock() - begin))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def macs(report: Any) -> tuple[int, int]:
    """Multiply-adds of the layers, dense and those with nonzero weights."""
    dense = sum(row.weights * row.positions for row in report.layers)
    return dense, sum(row.macs for row in report.layers)


def compare(name: str, sparsity: float, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    model = make_model(name, sparsity)
    x = torch.randn(args.batch, 3, args.size, args.size)
    begin = time.perf_counter()
    fast = accelerate(model, x)
    seconds = time.perf_counter() - begin
    expected, found = tree_leaves(model(x)), tree_leaves(fast(x))
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
    ways = {"accelerate": lambda: fast(x)} | engines(
        model, x, args.threads, torch_only=args.torch_only or args.quick
    )
    times = measure(ways, args.runs, args.threads)
    dense, left = macs(fast.report())
    fastest = min((t, way) for way, t in times.items() if way != "accelerate")
    choices = list(fast.choices.values())
    return {
        "model": name,
        "sparsity": sparsity,
        "batch": args.batch,
        "size": args.size,
        "threads": args.threads,
        "ms": times,
        "fastest_dense": fastest[1],
        "speedup": round(fastest[0] / times["accelerate"], 3),
        "sparse_layers": choices.count("sparse"),
        "layers": len(choices),
        "dense_macs": dense,
        "macs": left,
        "error": error,
        "seconds_to_accelerate": round(seconds, 1),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


@torch.no_grad()
def main() -> None:
    """Compare, print a line for each model and sparsity, and append them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="names of timm, or unet_resnet18"
    )
    parser.add_argument("--sparsity", nargs="+", type=float, default=(0.8, 0.9, 0.95))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument(
        "--torch-only",
        action="store_true",
        help="no compiler and no other engine, whose threads would go on to spin after their turn",
    )
    parser.add_argument("--output", help="a file of JSON lines to append to")
    parser.add_argument("--quick", action="store_true", help="one small case, and torch alone")
    args = parser.parse_args()
    if args.quick:
        args.models, args.sparsity, args.size, args.runs = ["resnet18"], [0.9], 64, 1
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    for name in args.models:
        for sparsity in args.sparsity:
            line = compare(name, sparsity, args)
            rest = ", ".join(f"{way} {ms:.1f}" for way, ms in line["ms"].items())
            print(f"{name} {100 * sparsity:g} %: {line['speedup']:.2f} x ({rest} ms)", flush=True)
            if args.output:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
