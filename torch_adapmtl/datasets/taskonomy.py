"""Tiny-Taskonomy with five dense tasks, as the paper reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._files import (
    check_files,
    check_size,
    listed,
    read_image,
    read_numbers,
    resized,
)
from torch_adapmtl.datasets._transforms import RandomScaleCrop

__all__ = ["TinyTaskonomy"]

_INDEX = "taskonomy.json"
_PRIOR = "semseg_prior_factor.npy"
_COLUMNS = ("image", "segmentation", "normal", "depth", "keypoints", "edges")
_FAR = 64_500  # depth codes from here on stand for nothing
_TASKS = _COLUMNS[1:]
_HIGHEST = {"keypoints": 0.005, "edges": 0.08}

Transform = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class TinyTaskonomy(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Tiny-Taskonomy (Zamir et al., CVPR 2018): five tasks, as the paper and AdaShare read them.

    Nothing is downloaded. `root` holds `taskonomy.json`, which lists under each split rows of
    image, segmentation, normal, depth, 2-D keypoints and edges, as paths from `root`; those images;
    and `semseg_prior_factor.npy`, the weight of each class in the loss.

    An example is an image `(3, H, W)` in [0, 1], and targets as
    [`torch_adapmtl.tasks`][torch_adapmtl.tasks] take them:

    - `segmentation`, `(H, W)` int64: 17 classes, 255 where unknown (0 in the file; else the class
      plus one).
    - `normal`, `(3, H, W)`: 8 bits stand for -1 to 1; brought to unit length; 0 where unknown.
    - `depth`, `(1, H, W)`: `log(1 + d) / log(2**16)` of the 16-bit code d; 0 where it is unknown
      (from 64,500 on; normals are unknown there too). A code of 0, which is known, becomes 1e-6:
      measure `Depth(metrics=["abs_error"])`, no error relative to it.
    - `keypoints` and `edges`, `(1, H, W)`: the 16-bit code / 2**16, clipped to [0, 0.005] and
      [0, 0.08] and scaled to [-1, 1].

    Args:
        root: The folder.
        split: A key of `taskonomy.json`, such as `"train"` or `"test"`.
        tasks: Which targets to give, in which order.
        size: Height and width that every example is resized to (targets by nearest pixel); None to
            leave them.
        transform: Called with image and targets last, for instance a `RandomFlip`. A
            `RandomScaleCrop` must have `same_camera=False`: these depths are logarithms, which no
            zoom divides.

    Attributes:
        class_weights: The weight of each class, float32 `(17,)`, for
            [`Segmentation`][torch_adapmtl.tasks.Segmentation].

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an argument is wrong, or a file is not as described above; the first example
            is read at once to see that.

    Example:
        >>> TinyTaskonomy("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: no/such/folder/taskonomy.json does not exist; it lists the files of...
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
                "transform: RandomScaleCrop would divide depths by the zoom, but these are "
                "logarithms of them; pass RandomScaleCrop(..., same_camera=False), which leaves "
                "depths and normals as they are"
            )
        self.root = Path(root)
        self.tasks = tuple(tasks)
        self.size = (size, size) if isinstance(size, int) else size
        self.transform = transform
        self._rows = listed(self.root / _INDEX, split, _COLUMNS)
        check_files(self.root, self._rows, _COLUMNS)
        self.class_weights = self._weights()
        self[0]

    def _weights(self) -> Tensor:
        path = self.root / _PRIOR
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; it holds the weight of each class")
        weights = read_numbers(path)
        if weights.shape != (self.classes,):
            raise ValueError(
                f"{path} must hold {self.classes} numbers, one a class, found the shape "
                f"{tuple(weights.shape)}"
            )
        wrong = weights[~(weights.isfinite() & (weights >= 0))]
        if len(wrong):
            raise ValueError(f"{path} must hold numbers of 0 or more, found {wrong[0].item():g}")
        return weights

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and the targets of one example."""
        paths = dict(zip(_COLUMNS, (self.root / n for n in self._rows[index]), strict=True))
        image = read_image(paths["image"], 3) / 255
        code = read_image(paths["depth"], 1, bits=16)
        check_size(image, {"depth": code}, paths)
        known = code < _FAR
        found = {}
        for task in self.tasks:
            if task == "segmentation":
                found[task] = self._labels(paths[task])
            elif task == "depth":
                depth = (torch.log1p(code.float()) / math.log(2**16)).clamp(min=1e-6)
                found[task] = torch.where(known, depth, 0.0)
            elif task == "normal":
                vectors = read_image(paths[task], 3) / 127.5 - 1
                check_size(image, {task: vectors}, paths)
                found[task] = F.normalize(vectors, dim=0) * known
            else:
                share = read_image(paths[task], 1, bits=16) / 2**16
                found[task] = share.clamp(max=_HIGHEST[task]) * (2 / _HIGHEST[task]) - 1
        check_size(image, found, paths)
        if self.size is not None:
            image, found = resized(image, found, self.size)
        return (image, found) if self.transform is None else self.transform(image, found)

    def _labels(self, path: Path) -> Tensor:
        codes = read_image(path, 1)[0].long()
        if int(codes.max()) > self.classes:
            raise ValueError(
                f"{path} must hold 0 (unknown) or a class plus one, up to {self.classes}, found "
                f"{int(codes.max())}"
            )
        return torch.where(codes == 0, 255, codes - 1)
