"""What a training step costs with AdapMTL: time and peak memory, as ratios to the dense model.

Copies of a net are trained on random inputs: dense, with AdapMTL in each of the three parts of a
run (pruned weights are trained; they are not; the zeros are fixed), and with the plain formula of
the paper, whose zeros are counted on the host after every step as in the authors' code. Each copy
has a process of its own; their steps are interleaved, so that conditions are the same. On a CPU the
time is that of the processor.

The nets: the paper's (an encoder and three ASPP heads, 91 or 157 million weights), and three small
ones, where the operations that do not depend on the number of weights count most: a RegNetY of
133,000 weights on 64 images of 32 px in channels-last format, an MLP of three layers on 256
samples, and a GRU cell that is called twenty times, on 64 sequences.

    python examples/overhead.py --net resnet34 --batch 2 --size 65
    python examples/overhead.py --net mlp --steps 200
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_adapmtl import Adaptive, SparsitySchedule, apply_adapmtl
from torch_adapmtl.models import (
    ASPPHead,
    MultiTaskModel,
    dilated_mobilenet_v2,
    dilated_resnet34,
    feature_channels,
)

TASKS = {"segmentation": 40, "normal": 3, "depth": 1}
SMALL = ("regnety", "mlp", "gru")
PARTS = {  # schedules with which a whole run consists of one part
    "regrow": SparsitySchedule(start=0.0, end=0.0, regrow_until=0.9),
    "no regrowth": SparsitySchedule(start=0.0, end=0.0, regrow_until=0.0),
    "fixed": SparsitySchedule(start=0.0, end=0.0, fix_at=0.0),
}
VARIANTS = ("dense", *PARTS, "plain")


class TwoHeads(nn.Module):
    """A body and two linear heads."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 4), "b": nn.Linear(width, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of each head."""
        h = self.body(x)
        return {task: head(h) for task, head in self.heads.items()}


class Recurrent(nn.Module):
    """A GRU cell that is called for each element of a sequence."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state, of shape (batch, width)."""
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for element in x.unbind(1):
            h = self.cell(element, h)
        return h


def build(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Build the net, and a batch of inputs."""
    if args.net == "regnety":
        from timm.models.regnet import RegNet, RegNetCfg

        config = RegNetCfg(depth=14, w0=8, wa=6.0, wm=2.0, group_size=8, se_ratio=0.25)
        body = RegNet(config, num_classes=0)
        net = TwoHeads(body, body.num_features).to(memory_format=torch.channels_last)
        return net, torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    if args.net == "mlp":
        layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        body = nn.Sequential(*layers, nn.Linear(512, 256), nn.ReLU())
        return TwoHeads(body, 256), torch.randn(256, 256)
    if args.net == "gru":
        return TwoHeads(Recurrent(32, 256), 256), torch.randn(64, 20, 32)
    encoder = dilated_resnet34() if args.net == "resnet34" else dilated_mobilenet_v2()
    width = feature_channels(encoder)
    heads = {t: ASPPHead(width, channels, hidden=args.hidden) for t, channels in TASKS.items()}
    return MultiTaskModel(encoder, heads), torch.randn(args.batch, 3, args.size, args.size)


def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the tasks against constant targets."""
    if "a" in outputs:
        return {task: out.float().sub(1).square().mean() for task, out in outputs.items()}
    segmentation, normal, depth = (outputs[task].float() for task in TASKS)
    classes = segmentation.new_zeros(segmentation[:, 0].shape, dtype=torch.long)
    return {
        "segmentation": F.cross_entropy(segmentation, classes),
        "normal": 1 - F.cosine_similarity(normal, torch.ones_like(normal), dim=1).mean(),
        "depth": depth.sub(1).abs().mean(),
    }


class PlainThreshold(nn.Module):
    """The formula of the paper, without optimisations."""

    def __init__(self, score: nn.Parameter) -> None:
        super().__init__()
        self.score = score

    def forward(self, weight: Tensor) -> Tensor:
        """Return sign(w) relu(|w| - sigmoid(s))."""
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.score))


def make_step(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that does one training step of the variant."""
    torch.manual_seed(0)
    model, inputs = build(args)
    model, inputs = model.to(args.device), inputs.to(args.device)
    finish: Callable[[], None] = lambda: None  # noqa: E731
    combine: Callable[[dict[str, Tensor]], Tensor] = lambda parts: sum(parts.values())  # type: ignore[return-value,assignment]  # noqa: E731
    if variant in PARTS:
        pruner = apply_adapmtl(
            model,
            target_sparsity=0.9,
            total_steps=args.total_steps,
            method=Adaptive(reach=args.reach, schedule=PARTS[variant]),
            example_inputs=inputs[:2],
            prunable={nn.GRUCell: "weight_*"},
        )
        combine, finish = pruner.loss, pruner.step
    elif variant == "plain":
        finish = attach_plain(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    forward = torch.compile(model) if args.compile else model
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)

    def step() -> None:
        with autocast:
            outputs = forward(inputs)
        combine(losses(outputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        finish()

    # The first step trains all weights, as in a run, so that no second moment of Adam is zero: on
    # some processors the square root of zero takes many times as long as that of other numbers.
    step()
    while variant in PARTS and not pruner.sparsity() > 0.85:  # until the first update
        finish()
    return step


def attach_plain(model: nn.Module) -> Callable[[], None]:
    """Put the plain formula on every weight; return the authors' count of zeros."""
    kinds = (nn.Conv2d, nn.Linear, nn.GRUCell)
    places = [
        (module, name)
        for module in model.modules()
        if isinstance(module, kinds)
        for name in ("weight", "weight_ih", "weight_hh")
        if hasattr(module, name)
    ]
    score = nn.Parameter(torch.tensor(-5.0, device=next(model.parameters()).device))
    for module, name in places:
        parametrize.register_parametrization(module, name, PlainThreshold(score), unsafe=True)

    def count() -> None:
        zeros = total = 0
        for module, name in places:
            weight = getattr(module, name).detach().cpu()
            zeros += int((weight == 0).sum())
            total += weight.numel()

    return count


def take_steps(variant: str, args: argparse.Namespace, pipe: Any) -> None:
    """Do a step of the variant whenever a message comes, and send its seconds."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    step = make_step(variant, args)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    pipe.send(None)
    while pipe.recv():
        start = clock()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        pipe.send(clock() - start)


def measure_time(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Interleave the variants' steps; return milliseconds and ratios to dense."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        pipes[variant], theirs = context.Pipe()
        context.Process(target=take_steps, args=(variant, args, theirs), daemon=True).start()
        pipes[variant].recv()
    for turn in range(args.warmup + args.steps):
        for variant, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if turn >= args.warmup:
                times[variant].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    dense = times["dense"]
    return {
        variant: {
            "ms": 1000 * statistics.median(seconds),
            # The median does not show the rare updates; the ratio of the sums includes them.
            "ratio_median": statistics.median(a / b for a, b in zip(seconds, dense, strict=True)),
            "ratio_total": sum(seconds) / sum(dense),
        }
        for variant, seconds in times.items()
    }


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each variant in MiB, each measured in a new process."""
    # The C library returns freed tensors to the system, so that the peak of the process is that of
    # its tensors. Otherwise it would depend on the order of the allocations.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for variant in VARIANTS:
        with context.Pool(1) as pool:
            peaks[variant] = pool.apply(peak_memory, (variant, args))
    return peaks


def peak_memory(variant: str, args: argparse.Namespace) -> float:
    """Run a few steps; return the peak memory in MiB, of the process or of CUDA's tensors."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    step = make_step(variant, args)
    for _ in range(12):  # past the first update of the thresholds
        step()
        gc.collect()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    nets = ("resnet34", "mobilenetv2", *SMALL)
    parser.add_argument("--net", choices=nets, default="resnet34")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=65, help="height and width of the images")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the ASPP heads")
    parser.add_argument(
        "--reach", type=float, help="see Adaptive; inf for the paper's soft threshold"
    )
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument(
        "--total-steps",
        type=int,
        default=10_000,
        help="of the run that the steps belong to; there are some 250 updates in a long run",
    )
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's choice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", help="append the figures as one line to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny net: to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.net, args.hidden, args.size = "mobilenetv2", 32, 33
        args.steps, args.warmup, args.no_memory = 2, 1, True
    if args.threads:
        torch.set_num_threads(args.threads)

    weights = sum(p.numel() for p in build(args)[0].parameters())
    times = measure_time(args)
    memory = {} if args.no_memory else measure_memory(args)
    mode = "compiled" if args.compile else "eager"
    print(
        f"{args.net}, {weights / 1e6:.2f} M parameters, batch {args.batch} of {args.size} px "
        f"(the small nets have their own), {mode}, {args.device}, torch {torch.__version__}"
    )
    print(f"{'':13}{'ms':>10}{'median':>10}{'total':>10}{'peak MiB':>12}{'extra / weights':>18}")
    for variant in VARIANTS:
        row = times[variant]
        line = f"{variant:13}{row['ms']:10.1f}{row['ratio_median']:10.3f}{row['ratio_total']:10.3f}"
        if memory:
            extra = (memory[variant] - memory["dense"]) / (4 * weights / 2**20)
            line += f"{memory[variant]:12.0f}{extra:18.2f}"
        print(line)
    if args.json:
        record = {
            **{name: value for name, value in vars(args).items() if name != "json"},
            "torch": torch.__version__, "parameters": weights,
            "threads": torch.get_num_threads(), "times": times, "peak_mib": memory,
        }  # fmt: skip
        with open(args.json, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
