"""NYU-v2 with three dense tasks, in either of two common layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._files import (
    Transform,
    check_files,
    check_size,
    read_array,
    read_image,
    read_index,
    resize_example,
)
from torch_adapmtl.datasets._units import decoded_normals, metres, unit_normals

__all__ = ["NYUv2"]

_INDEX = "nyu_v2_3task.json"
_COLUMNS = ("image", "segmentation", "normal", "depth")
_FOLDERS = ("image", "label", "normal", "depth")
_UNKNOWN_CLASS = 255
_TOLERANCE = 0.01  # by which the pixels of a resized image may exceed [0, 1]


class NYUv2(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """NYU-v2 (Silberman et al., ECCV 2012): segmentation, depth and surface normals.

    Nothing is downloaded. `root` is a folder in one of two layouts, which its files identify:

    - The paper's layout has an index `nyu_v2_3task.json` with keys `train` and `test`. Each lists
      rows of image, segmentation, normal and depth, as paths from `root`. The segmentation is an
      8-bit image of 40 classes (255: unknown). Normals are an 8-bit image that stands for -1 to 1
      (unknown: 0, 255 or the middle in all channels). Depth is a `.npy` file in metres (up to 3e-5:
      unknown).
    - The layout of MTAN and LibMTL has folders `train` and `val`. Each holds `image/N.npy`
      (H, W, 3, from 0 to 1), `label/N.npy` (13 classes, -1: unknown), `depth/N.npy` (H, W, 1, in
      metres) and `normal/N.npy` (H, W, 3, from -1 to 1; 0: unknown).

    In both, an example is an image `(3, H, W)` in [0, 1] and targets for
    `torch_adapmtl.tasks`: `segmentation` `(H, W)` int64, 255 where unknown;
    `normal` `(3, H, W)`, of unit length, 0 where unknown; `depth` `(1, H, W)` in metres, 0 where
    unknown. Depths and normals that are not finite are unknown. A file in another unit (colours to
    255, depths in millimetres, normals as numbers from 0 to 1) is refused.

    Args:
        root: The folder.
        split: `"train"` or `"test"` (the folder `val` of the second layout).
        size: Height and width to resize every example to (targets by nearest pixel); the paper
            resizes its test set to 321. None for the size of the files.
        transform: Called last, with image and targets, for instance a `RandomScaleCrop`.

    Attributes:
        classes: Number of classes of the segmentation: 40 or 13.

    Raises:
        FileNotFoundError: If `root` has neither layout, or a file is missing.
        ValueError: If `split` is unknown, or a file does not have the described content. The first
            example is read at once to check it.

    Example:
        >>> NYUv2("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: no/such/folder holds neither nyu_v2_3task.json...
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        size: int | tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        self.root = Path(root)
        self.size = (size, size) if isinstance(size, int) else size
        self.transform = transform
        self._has_index = (self.root / _INDEX).is_file()
        if self._has_index:
            self.classes = 40
            self._rows = read_index(self.root / _INDEX, split, _COLUMNS)
        else:
            self.classes = 13
            folder = self.root / ("train" if split == "train" else "val")
            if not (folder / "image").is_dir():
                raise FileNotFoundError(
                    f"{self.root} holds neither {_INDEX} nor the folder {folder.name}/image"
                )
            names = sorted(
                (path.name for path in (folder / "image").glob("*.npy")),
                key=lambda name: (len(name), name),
            )
            if not names:
                raise FileNotFoundError(f"{folder / 'image'} holds no .npy files")
            self._rows = [[f"{folder.name}/{kind}/{n}" for kind in _FOLDERS] for n in names]
        check_files(self.root, self._rows, _COLUMNS)
        self[0]  # raises if a file is wrong

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and the targets of one example."""
        paths = [self.root / name for name in self._rows[index]]
        read: Any = self._from_images if self._has_index else self._from_arrays
        image, targets = read(*paths)
        check_size(image, targets, dict(zip(_COLUMNS, paths, strict=True)))
        if self.size is not None:
            image, targets = resize_example(image, targets, self.size)
        return (image, targets) if self.transform is None else self.transform(image, targets)

    def _from_images(
        self, image: Path, segmentation: Path, normal: Path, depth: Path
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return read_image(image, 3) / 255, {
            "segmentation": self._labels(read_image(segmentation, 1)[0], segmentation),
            "depth": metres(read_array(depth, 1), depth),
            "normal": decoded_normals(read_image(normal, 3), normal),
        }

    def _from_arrays(
        self, image: Path, label: Path, normal: Path, depth: Path
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels = read_array(label, None)
        return _colours(read_array(image, 3), image), {
            "segmentation": self._labels(labels.masked_fill(labels == -1, _UNKNOWN_CLASS), label),
            "depth": metres(read_array(depth, 1), depth),
            "normal": unit_normals(read_array(normal, 3), normal),
        }

    def _labels(self, labels: Tensor, path: Path) -> Tensor:
        # A NaN fails all comparisons.
        valid = (labels >= 0) & (labels < self.classes) & (labels % 1 == 0)
        wrong = labels[(labels != _UNKNOWN_CLASS) & ~valid]
        if len(wrong):
            raise ValueError(
                f"{path} must hold classes 0 to {self.classes - 1} or unknown pixels, found "
                f"{wrong[0].item():g}"
            )
        return labels.long()


def _colours(image: Tensor, path: Path) -> Tensor:
    low, high = image.min().item(), image.max().item()
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise ValueError(
            f"{path} must hold numbers from 0 to 1, found {low:g} to {high:g}; divide 8-bit values "
            "by 255"
        )
    return image.clamp(0, 1)
