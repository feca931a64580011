"""Answer requests with a shipped model, in a process that has torch and torch_adapmtl only.

The model is read from a small file. With `--accelerate` its zeros are passed over, which needs the
extra `fast`. Requests are single images, answered one after the other.

    python examples/serve.py digits.safetensors images.pt answers.pt --accelerate
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from torch_adapmtl import accelerate, load_sparse

CHANNELS = (32, 64, 128, 256)
TASKS = {"left": 10, "right": 10, "distance": 1}


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, outputs, height / stride, width / stride)."""
        return torch.relu(self.body(x) + self.around(x))


class Digits(nn.Module):
    """Reads two digits and their distance."""

    def __init__(self) -> None:
        super().__init__()
        blocks, inputs = [], 1
        for outputs in CHANNELS:
            blocks += [Block(inputs, outputs, 2), Block(outputs, outputs, 1)]
            inputs = outputs
        self.encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, width))
                for task, width in TASKS.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores of ten digits, twice, and a distance."""
        features = self.encoder(x)
        return {task: head(features) for task, head in self.heads.items()}


@torch.no_grad()
def main() -> None:
    """Load the model, answer, and say how long the answers took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="file of save_sparse")
    parser.add_argument("images", nargs="?", help="file of torch.save: shape (n, 1, 32, 32)")
    parser.add_argument("answers", nargs="?", help="file to write")
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random weights and images")
    args = parser.parse_args()
    if not args.quick and args.images is None:
        parser.error("name the file of the model and the file of the images")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    model, images = Digits().eval(), torch.randn(2, 1, 32, 32)
    if not args.quick:
        load_sparse(args.model, model)
        images = torch.load(args.images, weights_only=True)
    served = accelerate(model, images[:1]) if args.accelerate else model
    answers, times = [], []
    for request in images.split(1):
        begin = time.perf_counter()
        answers.append(served(request))
        times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    typical, slow = (times[int(share * (len(times) - 1))] for share in (0.5, 0.99))
    print(f"{len(times)} requests: {typical:.2f} ms each, 99 % of them within {slow:.2f} ms")
    if args.answers:
        outputs = {task: torch.cat([a[task] for a in answers]) for task in TASKS}
        torch.save({"outputs": outputs, "ms": typical}, args.answers)
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
