"""Reading the files of a data set, with errors that name the file and what it must hold."""

from __future__ import annotations

import json
import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_adapmtl.datasets._transforms import resize_nearest

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Transform",
    "check_files",
    "check_size",
    "read_array",
    "read_image",
    "read_index",
    "read_numbers",
    "resize_example",
]

#: Changes an image and its targets together.
Transform = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def read_index(path: Path, split: str, columns: Sequence[str]) -> list[list[str]]:
    """Read the rows of a split from a JSON file. A row holds one file name for each column.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not valid JSON, lacks the split, or a row has another form.
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
        raise ValueError(f"{path}: {split!r} must be a list of one or more rows")
    for number, row in enumerate(rows):
        is_names = isinstance(row, list) and all(isinstance(name, str) for name in row)
        if not is_names or len(row) != len(columns):
            raise ValueError(
                f"{path}: row {number} of {split!r} must hold {len(columns)} file names "
                f"({', '.join(columns)}), found {row!r}"
            )
    return rows


def check_files(root: Path, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Raise a FileNotFoundError that names the first missing file, if any is missing."""
    for number, row in enumerate(rows):
        for column, name in zip(columns, row, strict=True):
            if not (root / name).is_file():
                raise FileNotFoundError(
                    f"{root / name} does not exist: the {column} of example {number}"
                )


def read_image(path: Path, channels: int, bits: int = 8) -> Tensor:
    """Read the pixels of an image file, `(channels, H, W)`, int32.

    Args:
        path: The file.
        channels: 1 or 3. The alpha channel of a colour image is dropped.
        bits: Bits of a pixel in each channel: 8, or 16 for an image of one channel.

    Raises:
        ValueError: If the file cannot be read as an image, or has other channels or bits.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as file:
            array = numpy.array(_checked_mode(file, path, channels, bits)).astype("int32")
    # Pillow raises an OSError for a truncated file and a SyntaxError for a broken PNG.
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)


def _checked_mode(image: Image.Image, path: Path, channels: int, bits: int) -> Image.Image:
    """The image without its alpha channel. Raises a ValueError if channels or bits differ."""
    deep = image.mode in ("I;16", "I;16B", "I")
    if deep != (bits == 16):
        raise ValueError(f"{path} must be an image of {bits} bits, found mode {image.mode!r}")
    if deep or image.mode == ("L" if channels == 1 else "RGB"):
        return image
    if channels == 1 and image.mode == "P":
        return image  # its pixels are indices into a palette, which stand for classes
    if channels == 1 or image.mode != "RGBA":
        raise ValueError(
            f"{path} must be an image of {channels} channel(s), found mode {image.mode!r}"
        )
    return image.convert("RGB")


def read_numbers(path: Path) -> Tensor:
    """Read a `.npy` file as float32, in the shape that it has.

    Raises:
        ValueError: If it is not a `.npy` file of numbers.
    """
    import numpy

    try:
        # numpy.load would read archives and pickles too, with other errors for each.
        with path.open("rb") as file:
            array = numpy.lib.format.read_array(file, allow_pickle=False)
    # The last two come from the header, which numpy parses as Python code.
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} is not a .npy file of numbers: its dtype is {array.dtype}")
    return torch.from_numpy(array.astype("float32"))


def read_array(path: Path, channels: int | None) -> Tensor:
    """Read a `.npy` file as `(channels, H, W)`, or `(H, W)` if `channels` is None; float32.

    Raises:
        ValueError: If it is not a `.npy` file of numbers or has another shape.
    """
    array = read_numbers(path)
    if channels is None or channels == 1:
        plane = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        if plane.ndim == 2:
            return plane if channels is None else plane[None]
    elif array.ndim == 3 and array.shape[-1] == channels:
        return array.movedim(-1, 0).contiguous()
    expected = "(H, W)" if channels is None else f"(H, W, {channels})"
    raise ValueError(f"{path} must hold an array of shape {expected}, found {tuple(array.shape)}")


def check_size(image: Tensor, targets: Mapping[str, Tensor], paths: Mapping[str, Path]) -> None:
    """Raise a ValueError if a target has another height or width than its image."""
    for task, target in targets.items():
        if target.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"{paths[task]} must have the height and width of its image {paths['image']}, "
                f"{tuple(image.shape[-2:])}, found {tuple(target.shape[-2:])}"
            )


def resize_example(
    image: Tensor, targets: Mapping[str, Tensor], size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Resize the image (bilinear) and the targets (nearest pixel) to height and width."""
    resized = F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized, {task: resize_nearest(target, list(size)) for task, target in targets.items()}
