"""The problems at the paper's scale: its nets and image size, for one GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from examples.benchmark.data import Data, Samples, Streamed
from examples.benchmark.problem import Problem
from torch_adapmtl import Paper
from torch_adapmtl.datasets import NYUv2, RandomFlip, RandomScaleCrop, Rooms, TinyTaskonomy
from torch_adapmtl.models import (
    ASPPHead,
    MultiTaskModel,
    dilated_mobilenet_v2,
    dilated_resnet34,
    feature_channels,
)
from torch_adapmtl.tasks import Depth, Map, Normals, Segmentation, Task

__all__ = ["ENCODERS", "paper_problem"]

#: The paper's encoders, by name.
ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet34": dilated_resnet34,
    "mobilenetv2": dilated_mobilenet_v2,
}

_THREE = ("segmentation", "depth", "normal")
_SIZE = 321
_WORKERS = 8


def paper_problem(
    encoder: str, data: str, *, size: int = _SIZE, workers: int = _WORKERS
) -> Problem:
    """The paper's net on Rooms, or on a folder with NYU-v2 or Tiny-Taskonomy.

    Encoder, four-branch ASPP heads of width 1,024, 321 x 321 pixels (256 on Tiny-Taskonomy, which
    has that size), batches of 16 and 20,000 steps of Adam at 1e-3 are the paper's; the learning
    rate falls along a cosine, as in all problems here, where the paper halves it every 4,000 steps.

    Args:
        encoder: `"resnet34"` or `"mobilenetv2"`.
        data: `"rooms"`, or the path of a folder in a layout of [`NYUv2`][torch_adapmtl.datasets.NYUv2]
            or [`TinyTaskonomy`][torch_adapmtl.datasets.TinyTaskonomy].
        size: Height and width of the images.
        workers: Processes that read a folder.

    Raises:
        ValueError: If the encoder is neither.
        FileNotFoundError: If the folder holds neither data set.
    """  # noqa: E501
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {list(ENCODERS)}, got {encoder!r}")
    load, tasks, channels = _source(data, size, workers)

    def make_model() -> nn.Module:
        own = ENCODERS[encoder]()
        width = feature_channels(own)
        return MultiTaskModel(own, {task: ASPPHead(width, channels[task]) for task in tasks})

    return Problem(
        f"paper/{encoder}/{data}",
        load,
        make_model,
        lambda: {task: make() for task, make in tasks.items()},
        steps=20_000,
        batch=16,
        lr=1e-3,
        threshold_lr=2e-2,
        paper=Paper(),
    )


_Source = tuple[
    Callable[[], tuple[Data, Data]], Mapping[str, Callable[[], Task]], Mapping[str, int]
]


def _source(data: str, size: int, workers: int) -> _Source:
    """How to load the data, its tasks, and the channels that each predicts."""
    if data == "rooms":
        channels = Rooms(1, tasks=_THREE).channels
        return lambda: _rooms(size), _three(channels["segmentation"]), channels
    if (Path(data) / "taskonomy.json").is_file():
        # Mirrored only: what scaling does to codes of keypoints and edges is not known.
        train = TinyTaskonomy(data, "train", transform=RandomFlip())
        test = TinyTaskonomy(data, "test")
        weights = train.class_weights
        tasks: dict[str, Callable[[], Task]] = {
            "segmentation": lambda: Segmentation(
                train.classes, class_weights=weights, metrics=["cross_entropy"]
            ),
            "depth": lambda: Depth(["abs_error"]),
            "normal": lambda: Normals(["cosine"]),
            "keypoints": Map,
            "edges": Map,
        }
        wide = {"segmentation": train.classes, "depth": 1, "normal": 3, "keypoints": 1, "edges": 1}
        return lambda: (Streamed(train, workers), Streamed(test, workers)), tasks, wide
    trained = NYUv2(data, "train", transform=_FlipAndCrop(size))
    tested = NYUv2(data, "test", size=size)
    channels = {"segmentation": trained.classes, "depth": 1, "normal": 3}
    return (
        lambda: (Streamed(trained, workers), Streamed(tested, workers)),
        _three(trained.classes),
        channels,
    )


def _three(classes: int) -> dict[str, Callable[[], Task]]:
    return {"segmentation": lambda: Segmentation(classes), "depth": Depth, "normal": Normals}


class _FlipAndCrop:
    """The paper's augmentations for NYU-v2."""

    def __init__(self, size: int) -> None:
        self.flip, self.crop = RandomFlip(), RandomScaleCrop(size)

    def __call__(
        self, image: Tensor, targets: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.crop(*self.flip(image, targets))


@cache
def _rooms(size: int) -> tuple[Data, Data]:
    train = Rooms(1600, image_size=size, tasks=_THREE, seed=0)
    test = Rooms(400, image_size=size, tasks=_THREE, seed=1)
    return Samples(*train.tensors()), Samples(*test.tensors())
