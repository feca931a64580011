"""Tiny-Taskonomy with five dense tasks, in the paper's layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._files import (
    Transform,
    check_files,
    check_size,
    read_image,
    read_index,
    read_numbers,
    resize_example,
)
from torch_adapmtl.datasets._transforms import RandomScaleCrop
from torch_adapmtl.datasets._units import decoded_normals

__all__ = ["TinyTaskonomy"]

_INDEX = "taskonomy.json"
_PRIOR = "semseg_prior_factor.npy"
_COLUMNS = ("image", "segmentation", "normal", "depth", "keypoints", "edges")
_NO_DEPTH = 64_500  # depth codes from here on mean that depth and normal are unknown
_PER_METRE = 512
_NEAR = 255  # codes up to here are nearer than half a metre
_TASKS = _COLUMNS[1:]
_CLIP_AT = {"keypoints": 0.005, "edges": 0.08}


class TinyTaskonomy(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Tiny-Taskonomy (Zamir et al., CVPR 2018): five tasks, in the form of the paper and AdaShare.

    Nothing is downloaded. `root` holds `taskonomy.json`, which lists for each split rows of image,
    segmentation, normal, depth, 2-D keypoints and edges, as paths from `root`; those images; and
    `semseg_prior_factor.npy`, the weight of each class in the loss.

    An example is an image `(3, H, W)` in [0, 1] and targets for
    `torch_adapmtl.tasks`:

    - `segmentation`, `(H, W)` int64: 17 classes, 255 where unknown. In the file 0 means unknown,
      and other values are the class plus one.
    - `normal`, `(3, H, W)`: of unit length, 0 where unknown. In the file 8 bits stand for -1 to 1;
      0, 255 or the middle in all channels is no direction and unknown.
    - `depth`, `(1, H, W)`: `log(1 + d) / log(2**16)` of the 16-bit code `d`, 0 where unknown. Depth
      and normal are unknown where `d` is 64,500 or more. A code of 0 is known and becomes 1e-6, so
      measure `Depth(metrics=["abs_error"])` and no relative error.
    - `keypoints` and `edges`, `(1, H, W)`: the 16-bit code / 2**16, clipped to [0, 0.005] and
      [0, 0.08] and scaled to [-1, 1].

    Args:
        root: The folder.
        split: A key of `taskonomy.json`, such as `"train"` or `"test"`.
        tasks: The targets to return, in this order.
        size: Height and width to resize every example to (targets by nearest pixel). None for the
            size of the files.
        transform: Called last, with image and targets, for instance a `RandomFlip`. A
            `RandomScaleCrop` must have `same_camera=False`, since a zoom does not divide the
            logarithm of a depth.

    Attributes:
        class_weights: The weight of each class, float32 `(17,)`, for
            [`Segmentation`][torch_adapmtl.tasks.Segmentation].

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an argument is wrong, or a file does not have the described content. The
            first example is read at once to check it.

    Example:
        >>> TinyTaskonomy("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: no/such/folder/taskonomy.json does not exist...
    """

    classes = 17

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        tasks: Sequence[str] = _TASKS,
        size: int | tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        if isinstance(tasks, str) or not tasks or any(task not in _TASKS for task in tasks):
            raise ValueError(f"tasks must be names out of {list(_TASKS)}, got {tasks!r}")
        if isinstance(transform, RandomScaleCrop) and transform.same_camera:
            raise ValueError(
                "transform is a RandomScaleCrop with same_camera=True, which would divide the "
                "depths by the zoom, but these depths are logarithms; pass "
                "RandomScaleCrop(..., same_camera=False), which does not change depths and normals"
            )
        self.root = Path(root)
        self.tasks = tuple(tasks)
        self.size = (size, size) if isinstance(size, int) else size
        self.transform = transform
        self._rows = read_index(self.root / _INDEX, split, _COLUMNS)
        check_files(self.root, self._rows, _COLUMNS)
        self.class_weights = self._read_weights()
        self[0]  # raises if a file is wrong
        self._check_depth(self.root / self._rows[0][_COLUMNS.index("depth")])

    def _read_weights(self) -> Tensor:
        path = self.root / _PRIOR
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; it holds the weight of each class")
        weights = read_numbers(path)
        if weights.shape != (self.classes,):
            raise ValueError(
                f"{path} must hold {self.classes} numbers, one for each class, found the shape "
                f"{tuple(weights.shape)}"
            )
        wrong = weights[~(weights.isfinite() & (weights >= 0))]
        if len(wrong):
            raise ValueError(f"{path} must hold finite numbers >= 0, found {wrong[0].item():g}")
        return weights

    def _check_depth(self, path: Path) -> None:
        # Of the first example only, since another one might show nothing but what is near.
        codes = read_image(path, 1, bits=16)
        codes = codes[codes < _NO_DEPTH]
        if len(codes) and 0 < int(codes.max()) <= _NEAR:
            raise ValueError(
                f"{path} must hold depths in units of 1/{_PER_METRE} metre, found codes from "
                f"{int(codes.min())} to {int(codes.max())}, at most half a metre; convert 8-bit "
                f"codes"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and the targets of one example."""
        paths = dict(zip(_COLUMNS, (self.root / n for n in self._rows[index]), strict=True))
        image = read_image(paths["image"], 3) / 255
        code = read_image(paths["depth"], 1, bits=16)
        check_size(image, {"depth": code}, paths)
        known = code < _NO_DEPTH
        targets = {}
        for task in self.tasks:
            if task == "segmentation":
                targets[task] = self._labels(paths[task])
            elif task == "depth":
                depth = (torch.log1p(code.float()) / math.log(2**16)).clamp(min=1e-6)
                targets[task] = torch.where(known, depth, 0.0)
            elif task == "normal":
                codes = read_image(paths[task], 3)
                check_size(image, {task: codes}, paths)
                targets[task] = decoded_normals(codes.masked_fill(~known, 255), paths[task])
            else:
                fraction = read_image(paths[task], 1, bits=16) / 2**16
                targets[task] = fraction.clamp(max=_CLIP_AT[task]) * (2 / _CLIP_AT[task]) - 1
        check_size(image, targets, paths)
        if self.size is not None:
            image, targets = resize_example(image, targets, self.size)
        return (image, targets) if self.transform is None else self.transform(image, targets)

    def _labels(self, path: Path) -> Tensor:
        codes = read_image(path, 1)[0].long()
        if int(codes.max()) > self.classes:
            raise ValueError(
                f"{path} must hold 0 (unknown) or a class plus one, up to {self.classes}, found "
                f"{int(codes.max())}"
            )
        return torch.where(codes == 0, 255, codes - 1)
