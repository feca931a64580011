"""Example inputs: the user's, or images made for the encoder in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMS", "call_arguments", "encoder_images"]

FORMS = "a tensor, a tuple of positional arguments or a dict of keyword arguments"


def call_arguments(example_inputs: Any, argument: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that `example_inputs` stands for.

    Raises:
        TypeError: If it is of another type; the error calls it `argument`.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        f"{argument} must be {FORMS}, found {type(example_inputs).__name__}; if the model takes "
        "that as its one argument, pass (inputs,)"
    )


def encoder_images(model: nn.Module) -> tuple[str, list[Tensor]]:
    """Return a description of the outermost timm or SMP encoder in `model` and images for it.

    Returns:
        The encoder's name and type, for errors, and batches of two images to try in turn. Making
        them does not advance the global random number generator.

    Raises:
        ValueError: If the model holds no such encoder.
    """
    for name, module in model.named_modules():
        shapes = list(dict.fromkeys(_shapes(module)))
        if shapes:
            tensor = next((p for p in module.parameters() if p.is_floating_point()), None)
            device = torch.device("cpu") if tensor is None else tensor.device
            dtype = torch.float32 if tensor is None else tensor.dtype
            encoder = f"{name or 'the model'} ({type(module).__name__})"
            return encoder, [_images(shape).to(device, dtype) for shape in shapes]
    raise ValueError(
        "example_inputs is None and the model holds no timm or segmentation-models-pytorch encoder "
        "to make images for; pass example_inputs=, what the training loop gives the model: "
        f"{FORMS}"
    )


def _images(shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator, device="cpu")


def _shapes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Yield the channels, height and width to try with an encoder; none if it is not one."""
    channels = vars(module).get("_in_channels")
    stride = getattr(module, "output_stride", None) if isinstance(channels, int) else None
    if isinstance(channels, int) and isinstance(stride, int):  # SMP
        for size in (max(64, 2 * stride), 128):
            yield channels, size, size
        for child in module.modules():  # a timm model inside may insist on its image size
            for _, height, width in _timm_shapes(child):
                yield channels, height, width
    else:
        yield from _timm_shapes(module)


def _timm_shapes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    config = getattr(module, "pretrained_cfg", None)
    published = config.get("input_size") if isinstance(config, Mapping) else None
    if published is None or len(published) != 3:
        return
    # `pretrained_cfg` has the published size even if the model was made for other images. Where a
    # model has its actual size varies: in itself, or in a part such as the patch embedding.
    image_sizes = [getattr(part, "img_size", None) for part in module.modules()]
    sizes = [tuple(s) for s in image_sizes if isinstance(s, tuple | list) and len(s) == 2]
    sizes.append(tuple(published[1:]))
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = [published[0], first.in_channels if first is not None else published[0]]
    for height, width in sizes:
        for count in channels:
            yield count, height, width
