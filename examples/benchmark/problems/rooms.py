"""Problems on rendered rooms: dense prediction with residual and depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from examples.benchmark.problems.resnet import resnet18
from torch_adapmtl.datasets import Rooms
from torch_adapmtl.models import ASPPHead, DenseHead, MultiTaskModel, feature_channels
from torch_adapmtl.tasks import Depth, Map, Normals, Segmentation, Task

__all__ = ["rooms_problems"]

_ROOM_TASKS: Mapping[str, Callable[[], Task]] = {
    "segmentation": lambda: Segmentation(5),
    "depth": Depth,
    "normal": Normals,
    "edges": Map,
    "keypoints": Map,
}
_BLUR = {"edges": 2, "keypoints": 4}  # standard deviation in pixels


def _mobilenet() -> nn.Module:
    import timm

    encoder: nn.Module = timm.create_model(
        "mobilenetv2_050", pretrained=False, features_only=True, out_indices=(3,), output_stride=8
    )
    return encoder


def _dense_resnet18(*channels: int) -> Callable[[], nn.Module]:
    """The same up to its third stage, with a map of 1/8 of the image's size."""
    return resnet18(*channels, features_only=True, out_indices=(3,), output_stride=8)


def _rooms(
    name: str,
    tasks: tuple[str, ...],
    make_encoder: Callable[[], nn.Module],
    make_head: Callable[[int, int], nn.Module],
) -> Problem:
    def load() -> tuple[Samples, Samples]:
        train = Samples(*Rooms(1600, image_size=40, tasks=tasks, seed=0).tensors())
        test = Samples(*Rooms(400, image_size=40, tasks=tasks, seed=1).tensors())
        return _smoothed(train, train), _smoothed(test, train)

    def make_model() -> nn.Module:
        encoder = make_encoder()
        width = feature_channels(encoder)
        channels = Rooms(1, tasks=tasks).channels
        return MultiTaskModel(encoder, {task: make_head(width, channels[task]) for task in tasks})

    return Problem(
        name,
        load,
        make_model,
        lambda: {task: _ROOM_TASKS[task]() for task in tasks},
        steps=250,
        batch=12,
    )


def _smoothed(samples: Samples, train: Samples) -> Samples:
    """Blur edges and keypoints, in units of their deviation in the training set.

    Sharp as Rooms has them they are zero almost everywhere, and the best that L1 can find is zero.
    """
    targets = dict(samples.targets)
    for task in targets.keys() & _BLUR:
        targets[task] = _blurred(samples, task) / _blurred(train, task).std()
    return Samples(samples.inputs, targets)


def _blurred(samples: Samples, task: str) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    sigma = _BLUR[task]
    size = 6 * sigma + 1
    blurred: Tensor = gaussian_blur(samples.targets[task], [size, size], [sigma, sigma])
    return blurred


def _aspp(hidden: int) -> Callable[[int, int], nn.Module]:
    return partial(ASPPHead, hidden=hidden, dilations=(1, 2), dropout=0.0)


_THREE = ("segmentation", "depth", "normal")


def rooms_problems() -> tuple[Problem, ...]:
    """Three and five tasks, and three with depthwise convolutions."""
    narrow = _dense_resnet18(24, 48, 96, 192)
    return (
        _rooms("rooms3", _THREE, narrow, _aspp(96)),
        _rooms("rooms5", (*_THREE, "edges", "keypoints"), narrow, _aspp(64)),
        _rooms("rooms3 mobilenet", _THREE, _mobilenet, DenseHead),
    )
