"""Two handwritten digits in one image: the Multi-MNIST protocol on scikit-learn's scans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._random import Draws, example_keys

__all__ = ["MultiDigits"]

_TASKS = ("left", "right", "distance")
_SIZES = {"train": 10_000, "test": 2_000}
_TRAIN_SCANS = 1_347  # of 1,797: three quarters


class MultiDigits(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Two overlapping handwritten digits in one image. Tasks: both digits and their distance.

    The Multi-MNIST protocol on the 1,797 scans (8x8 pixels) that scikit-learn ships, so nothing is
    downloaded. An example takes two random scans, enlarged to 5/8 of the image: one in the upper
    left corner, one in the lower right. Each is shifted at random by up to 1/8 of the image right
    and down; where they overlap, the brighter pixel counts. The training split uses the first 1,347
    scans, the test split the last 450, so they share no scan.

    - `left`, int64: the class (0 to 9) of the upper left digit.
    - `right`, int64: the class of the lower right digit.
    - `distance`, `(1,)` float32: the distance between the centres of the two scans, scaled so that
      0 is the smallest possible and 1 the largest.

    Example `i` is a function of `seed`, `split` and `i` only, and does not depend on its batch.

    Args:
        split: `"train"` or `"test"`.
        size: Number of examples; None for 10,000 to train and 2,000 to test.
        image_size: Height and width in pixels, at least 16.
        channels: 1, or 3 for encoders that expect colour (the channels are equal).
        tasks: The targets to return, in this order.
        seed: Seed of the pairs and shifts.

    Attributes:
        sources: The indices of scikit-learn's scans that this split uses.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If an argument is out of range.

    Example:
        >>> digits = MultiDigits("test", image_size=32)
        >>> image, targets = digits[0]
        >>> image.shape, sorted(targets)
        (torch.Size([1, 32, 32]), ['distance', 'left', 'right'])
        >>> images, targets = digits.tensors()
        >>> images.shape, targets["distance"].shape
        (torch.Size([2000, 1, 32, 32]), torch.Size([2000, 1]))
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int | None = None,
        image_size: int = 32,
        channels: int = 1,
        tasks: Sequence[str] = _TASKS,
        seed: int = 0,
    ) -> None:
        if split not in _SIZES:
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, got {size!r}")
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16, got {image_size!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        unknown = [task for task in tasks if task not in _TASKS]
        if isinstance(tasks, str) or unknown or len(set(tasks)) < len(tasks) or not tasks:
            raise ValueError(f"tasks must be different names out of {list(_TASKS)}, got {tasks!r}")
        self.split = split
        self.size = _SIZES[split] if size is None else size
        self.image_size = image_size
        self.channels = channels
        self.tasks = tuple(tasks)
        self.seed = seed
        scans, labels = _load_scans()
        first, last = (0, _TRAIN_SCANS) if split == "train" else (_TRAIN_SCANS, len(scans))
        self.sources = range(first, last)
        self._labels = labels[first:last]
        self._digit_size = round(image_size * 5 / 8)
        self._scans = F.interpolate(
            scans[first:last, None],
            size=(self._digit_size, self._digit_size),
            mode="bilinear",
            align_corners=False,
        )[:, 0]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image `(channels, H, W)` in [0, 1] and the targets of one example."""
        images, targets = self.render([index])
        return images[0], {task: target[0] for task, target in targets.items()}

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Compose the whole data set: images `(size, channels, H, W)` and targets."""
        return self.render(range(self.size))

    def render(self, indices: Iterable[int] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compose some examples at once.

        Args:
            indices: Indices of the examples, in any order; negative ones count from the end.

        Returns:
            Images `(B, channels, H, W)` and targets, each with a leading `B`.

        Raises:
            IndexError: If an index is out of range.
        """
        which = torch.as_tensor(
            indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64
        )
        outside = which[(which < -self.size) | (which >= self.size)]
        if len(outside):
            raise IndexError(
                f"index {int(outside[0])} is out of range: there are {self.size} examples"
            )
        # Each split has its own random numbers, so the test split repeats no choice of training.
        stream = 2 * self.seed + (self.split == "test")
        draw = Draws(example_keys(stream, which % self.size))
        most = self.image_size // 8  # pixels that a scan is shifted by
        scans = draw.integers(len(self._scans), 2)
        shift = draw.integers(most + 1, 2, 2)  # digit, axis
        start = self.image_size - self._digit_size - most
        corner = shift + torch.tensor([[0], [start]])
        images = torch.maximum(
            self._place(scans[:, 0], corner[:, 0]), self._place(scans[:, 1], corner[:, 1])
        )
        offset = (corner[:, 1] - corner[:, 0]).double()
        near, far = (start - most) * 2**0.5, (start + most) * 2**0.5
        distance = ((offset * offset).sum(1, keepdim=True).sqrt() - near) / (far - near)
        targets = {
            "left": self._labels[scans[:, 0]],
            "right": self._labels[scans[:, 1]],
            "distance": distance.float().clamp(0, 1),
        }
        images = images[:, None].repeat(1, self.channels, 1, 1)
        return images, {task: targets[task] for task in self.tasks}

    def _place(self, scans: Tensor, corner: Tensor) -> Tensor:
        """Put each scan on an empty image, with its upper left corner at `corner` (row, column)."""
        size, extent = self._digit_size, torch.arange(self._digit_size)
        images = torch.zeros(len(scans), self.image_size, self.image_size)
        example = torch.arange(len(scans))[:, None, None]
        rows = corner[:, 0, None, None] + extent[:, None]
        columns = corner[:, 1, None, None] + extent
        images[example, rows.expand(-1, size, size), columns.expand(-1, size, size)] = self._scans[
            scans
        ]
        return images


def _load_scans() -> tuple[Tensor, Tensor]:
    """All scans `(1797, 8, 8)` in [0, 1], and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'MultiDigits needs scikit-learn; install it with pip install "torch-adapmtl[examples]"'
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    return images, torch.from_numpy(bunch.target).long()
