"""Reading the files of a data set, with errors that say which file, and what was expected."""

from __future__ import annotations

import json
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_adapmtl.datasets._transforms import resize_nearest

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "check_files",
    "check_size",
    "listed",
    "read_array",
    "read_image",
    "read_numbers",
    "resized",
]


def listed(path: Path, split: str, columns: Sequence[str]) -> list[list[str]]:
    """The rows that a JSON file lists under the key of a split, one file name for each column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, has no such key, or a row is not of as many file names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it lists the files of each split")
    try:
        index = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(index, Mapping) or split not in index:
        keys = list(index) if isinstance(index, Mapping) else type(index).__name__
        raise ValueError(f"{path} has no key {split!r}; it has {keys}")
    rows = index[split]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: {split!r} must be a list of rows, and not empty")
    for number, row in enumerate(rows):
        names = isinstance(row, list) and all(isinstance(name, str) for name in row)
        if not names or len(row) != len(columns):
            raise ValueError(
                f"{path}: row {number} of {split!r} must hold {len(columns)} file names "
                f"({', '.join(columns)}), found {row!r}"
            )
    return rows


def check_files(root: Path, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Raise a FileNotFoundError for the first file that is missing."""
    for number, row in enumerate(rows):
        for column, name in zip(columns, row, strict=True):
            if not (root / name).is_file():
                raise FileNotFoundError(
                    f"{root / name} does not exist: the {column} of example {number}"
                )


def read_image(path: Path, channels: int, bits: int = 8) -> Tensor:
    """The pixels of an image file, `(channels, H, W)`, int32.

    Raises:
        ValueError: If it is no image, or a damaged one, or has other channels or another depth.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as file:
            pixels = numpy.array(_of_mode(file, path, channels, bits)).astype("int32")
    except (OSError, SyntaxError) as error:  # Pillow's for what is cut short, and for broken PNGs
        raise ValueError(f"{path} is no image that can be read: {error}") from error
    found = torch.from_numpy(pixels)
    return found[None] if found.ndim == 2 else found.movedim(-1, 0)


def _of_mode(image: Image.Image, path: Path, channels: int, bits: int) -> Image.Image:
    """The image without a palette of colours or an alpha channel, if it is of the right kind."""
    deep = image.mode in ("I;16", "I;16B", "I")
    if deep != (bits == 16):
        raise ValueError(f"{path} must be an image of {bits} bits, found mode {image.mode!r}")
    wanted = "L" if channels == 1 else "RGB"
    if deep or image.mode == wanted:
        return image
    if channels == 1 and image.mode == "P":
        return image  # an index is a class, whatever its colour
    if channels == 1 or image.mode != "RGBA":
        raise ValueError(
            f"{path} must be an image of {channels} channel(s), found mode {image.mode!r}"
        )
    return image.convert("RGB")


def read_numbers(path: Path) -> Tensor:
    """A `.npy` file as float32, of whatever shape it has.

    Raises:
        ValueError: If it is no such file, or not of numbers.
    """
    import numpy

    try:
        # not numpy.load, which takes archives and pickles too, and has another error for each
        with path.open("rb") as file:
            array = numpy.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:  # numpy parses the header
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} is no .npy file of numbers: its elements are of {array.dtype}")
    return torch.from_numpy(array.astype("float32"))


def read_array(path: Path, channels: int | None) -> Tensor:
    """A `.npy` file as `(channels, H, W)`, or `(H, W)` if `channels` is None; float32.

    Raises:
        ValueError: If it is no such file or has another shape.
    """
    found = read_numbers(path)
    if channels is None or channels == 1:
        flat = found[..., 0] if found.ndim == 3 and found.shape[-1] == 1 else found
        if flat.ndim == 2:
            return flat if channels is None else flat[None]
    elif found.ndim == 3 and found.shape[-1] == channels:
        return found.movedim(-1, 0).contiguous()
    expected = "(H, W)" if channels is None else f"(H, W, {channels})"
    raise ValueError(f"{path} must hold an array of shape {expected}, found {tuple(found.shape)}")


def check_size(image: Tensor, targets: Mapping[str, Tensor], paths: Mapping[str, Path]) -> None:
    """Raise a ValueError if a target has another height or width than its image."""
    for task, target in targets.items():
        if target.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"{paths[task]} is of {tuple(target.shape[-2:])} pixels, its image "
                f"{paths['image']} of {tuple(image.shape[-2:])}"
            )


def resized(
    image: Tensor, targets: Mapping[str, Tensor], size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The image (bilinear) and the targets (nearest pixel) at another size."""
    small = F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return small, {task: resize_nearest(target, list(size)) for task, target in targets.items()}
