"""Example inputs: given by the user, or made from the encoder found in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["REMEDY", "call_arguments", "made_inputs"]

REMEDY = (
    "pass example_inputs= as the training loop gives them to the model: a tensor, a tuple of "
    "positional arguments or a dict of keyword arguments"
)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that `example_inputs` stands for."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, found {type(example_inputs).__name__}; if the model takes that as its one "
        "argument, pass (inputs,)"
    )


def made_inputs(model: nn.Module) -> tuple[str, list[Tensor]]:
    """Batches of two images to try in turn, for the outermost timm or SMP encoder in `model`.

    Returns:
        A description of the encoder for messages, and the batches. They are drawn without touching
        the global random number generator.

    Raises:
        ValueError: If there is no such encoder.
    """
    for name, module in model.named_modules():
        shapes = list(dict.fromkeys(_shapes(module)))
        if shapes:
            tensor = next((p for p in module.parameters() if p.is_floating_point()), None)
            device = torch.device("cpu") if tensor is None else tensor.device
            dtype = torch.float32 if tensor is None else tensor.dtype
            kind = f"{name or 'the model'} ({type(module).__name__})"
            return kind, [_image(shape).to(device, dtype) for shape in shapes]
    raise ValueError(
        "example_inputs is None and the model holds no timm or segmentation-models-pytorch encoder "
        f"to make them from; {REMEDY}"
    )


def _image(shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator, device="cpu")


def _shapes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Channels, height and width worth trying with an encoder; none if it is not one."""
    channels = vars(module).get("_in_channels")
    stride = getattr(module, "output_stride", None) if isinstance(channels, int) else None
    if isinstance(channels, int) and isinstance(stride, int):  # SMP
        for size in (max(64, 2 * stride), 128):
            yield channels, size, size
        for child in module.modules():  # a timm model inside, which may insist on its size
            for _, height, width in _timm_shapes(child):
                yield channels, height, width
    else:
        yield from _timm_shapes(module)


def _timm_shapes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    config = getattr(module, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None or len(size) != 3:
        return
    # timm keeps the published input size also when a model is made for another, or other channels.
    # The model's own size comes first, then those of its parts: the embedding of patches has any
    # name, and there may be several.
    own = [getattr(m, "img_size", None) for m in module.modules()]
    sizes = [tuple(s) for s in own if isinstance(s, tuple | list) and len(s) == 2]
    sizes.append(tuple(size[1:]))
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = [size[0], first.in_channels if first is not None else size[0]]
    for height, width in sizes:
        for count in channels:
            yield count, height, width
