"""Augmentations that change an image and its dense targets together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORE", "KINDS", "RandomFlip", "RandomScaleCrop", "resize_nearest"]

#: The kind of each known task's target, which says how augmentations change it.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "segmentation": "labels",
        "depth": "depth",
        "normal": "normal",
        "edges": "map",
        "keypoints": "map",
    }
)
#: The value of unknown pixels in a target of each kind. Losses and metrics ignore these pixels.
IGNORE: Mapping[str, float] = MappingProxyType(
    {"labels": 255, "depth": 0, "normal": 0, "map": math.nan}
)


class _JointTransform(ABC):
    """A random transform that changes the image and every target of an example alike."""

    def __init__(self, kinds: Mapping[str, str] | None) -> None:
        self.kinds = {**KINDS, **(kinds or {})}
        for task, kind in self.kinds.items():
            if kind != "none" and kind not in IGNORE:
                raise ValueError(
                    f"kinds[{task!r}] must be one of {[*IGNORE, 'none']}, got {kind!r}"
                )

    def __call__(
        self,
        image: Tensor,
        targets: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform an example, or each example of a batch independently.

        The arguments are not changed. Tensors that the transform does not change are returned
        without a copy.

        Args:
            image: `(C, H, W)`, or a batch `(B, C, H, W)`.
            targets: The targets by task: labels `(H, W)`, others `(C, H, W)`; with a leading `B` in
                a batch.
            generator: A CPU generator for the random numbers; None for torch's default one.

        Returns:
            The image and the targets.

        Raises:
            ValueError: If the kind of a task is unknown, or a target's size is not the image's.
        """
        self._check(image, targets)
        if image.ndim == 3:
            return self._transform(image, dict(targets), generator)
        examples = [
            self._transform(image[i], {task: t[i] for task, t in targets.items()}, generator)
            for i in range(len(image))
        ]
        images = torch.stack([example_image for example_image, _ in examples])
        return images, {
            task: torch.stack([example_targets[task] for _, example_targets in examples])
            for task in targets
        }

    @abstractmethod
    def _transform(
        self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform one example at random."""

    def _check(self, image: Tensor, targets: Mapping[str, Tensor]) -> None:
        if image.ndim not in (3, 4):
            raise ValueError(
                f"image must be (C, H, W) or (B, C, H, W), got the shape {tuple(image.shape)}"
            )
        for task, target in targets.items():
            if task not in self.kinds:
                raise ValueError(
                    f"the kind of the target of task {task!r} is unknown; pass "
                    f"kinds={{{task!r}: ...}} with one of {[*IGNORE, 'none']}"
                )
            if self.kinds[task] == "none":
                continue
            dims = image.ndim - (self.kinds[task] == "labels")
            if target.ndim != dims or target.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"targets[{task!r}] has the shape {tuple(target.shape)}, which does not match "
                    f"an image of shape {tuple(image.shape)}"
                )


class RandomFlip(_JointTransform):
    """Mirror image and targets left to right, with probability `p`.

    A mirrored normal map also changes the sign of its x component.

    Args:
        p: The probability.
        kinds: The kinds of further tasks' targets: `"labels"`, `"depth"`, `"normal"`, `"map"` (any
            other dense target) or `"none"` (not changed). `KINDS` holds those of known tasks.

    Raises:
        ValueError: If `p` is not in [0, 1] or a kind is unknown.

    Example:
        >>> import torch
        >>> normal = torch.tensor([[[0.6, 0.0]], [[0.0, 0.0]], [[-0.8, -1.0]]])
        >>> image, targets = RandomFlip(p=1.0)(torch.zeros(3, 1, 2), {"normal": normal})
        >>> targets["normal"][0]
        tensor([[-0.0000, -0.6000]])
    """

    def __init__(self, p: float = 0.5, *, kinds: Mapping[str, str] | None = None) -> None:
        super().__init__(kinds)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p!r}")
        self.p = p

    def _transform(
        self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if float(torch.rand((), generator=generator)) >= self.p:
            return image, targets
        flipped = {}
        for task, target in targets.items():
            kind = self.kinds[task]
            flipped[task] = target if kind == "none" else target.flip(-1)
            if kind == "normal":
                sign = target.new_tensor([-1.0, 1.0, 1.0])[:, None, None]
                flipped[task] = flipped[task] * sign
        return image.flip(-1), flipped


class RandomScaleCrop(_JointTransform):
    """Zoom by a random factor, then crop or pad to a fixed size at a random position.

    The paper's protocol is a scale of 0.5 to 1.5 and a crop of 321 x 321. Images are resized
    bilinearly, targets by nearest pixel. Padding is 0 in the image and `IGNORE` in the targets: 255
    for labels, 0 for depth and normals, NaN for other maps.

    An image zoomed by `s` equals one that the same camera takes of a scene compressed along its
    axis, with every depth divided by `s`. So depth is divided by `s`, and the z of normals is
    multiplied by `s` before they are scaled to unit length (with depth divided alone, the normals
    would not be those of the depth). With `same_camera=False` depth and normals keep their values,
    which is exact for a camera whose focal length is `s` times longer. Sizes are whole pixels, so
    `s` is computed from the resized image, for each axis. A crop that is not centred moves the
    principal point by its offset; the targets do not depend on it.

    Args:
        size: Height and width of the result: an integer or a pair.
        scale: The smallest and the largest zoom; it is drawn uniformly between them.
        same_camera: Whether depth and normals change with the zoom, as if the camera stayed the
            same; otherwise they keep their values.
        kinds: The kinds of further tasks' targets, as for `RandomFlip`.

    Raises:
        ValueError: If `size` or `scale` is out of range or a kind is unknown.

    Example:
        >>> import torch
        >>> crop = RandomScaleCrop(4, scale=(2.0, 2.0))
        >>> image, targets = crop(
        ...     torch.zeros(3, 4, 4), {"depth": torch.full((1, 4, 4), 3.0)}
        ... )
        >>> image.shape, targets["depth"].unique()
        (torch.Size([3, 4, 4]), tensor([1.5000]))
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.5, 1.5),
        *,
        same_camera: bool = True,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(kinds)
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1, got {size!r}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(
                f"scale must be (smallest, largest) with 0 < smallest <= largest, got {scale!r}"
            )
        self.scale = scale
        self.same_camera = same_camera

    def _transform(
        self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        low, high = self.scale
        draws = [float(u) for u in torch.rand(3, generator=generator)]
        zoom = low + draws[0] * (high - low)
        scaled = [max(1, round(extent * zoom)) for extent in image.shape[-2:]]
        # The crop's first row and column; negative where the zoomed image is smaller than the crop.
        start = [
            _offset(old - new, u) for old, new, u in zip(scaled, self.size, draws[1:], strict=True)
        ]
        zoomed = F.interpolate(
            image[None], size=scaled, mode="bilinear", align_corners=False, antialias=True
        )[0]
        transformed = {}
        down, across = (new / old for new, old in zip(scaled, image.shape[-2:], strict=True))
        for task, target in targets.items():
            kind = self.kinds[task]
            if kind == "none":
                transformed[task] = target
                continue
            resized = resize_nearest(target, scaled)
            if self.same_camera and kind == "depth":
                resized = resized / across
            elif self.same_camera and kind == "normal":
                # The scene's (x, y, z) becomes (x, y * down / across, z / across); normals change
                # by the inverse transpose of that.
                factors = resized.new_tensor([1.0, across / down, across])
                resized = F.normalize(resized * factors[:, None, None], dim=0)
            transformed[task] = self._crop(resized, start, IGNORE[kind])
        return self._crop(zoomed, start, 0), transformed

    def _crop(self, values: Tensor, start: list[int], fill: float) -> Tensor:
        """Crop to `size` from row and column `start`, padded with `fill` outside of `values`."""
        (height, width), (top, left) = self.size, start
        out = values.new_full((*values.shape[:-2], height, width), fill)
        inner = values[..., max(top, 0) : top + height, max(left, 0) : left + width]
        row, column = max(-top, 0), max(-left, 0)
        out[..., row : row + inner.shape[-2], column : column + inner.shape[-1]] = inner
        return out


def _offset(most: int, uniform: float) -> int:
    """An integer from 0 to `most` (which may be negative), both included, by a number in [0, 1)."""
    offset = min(int(uniform * (abs(most) + 1)), abs(most))
    return offset if most >= 0 else -offset


def resize_nearest(values: Tensor, size: list[int]) -> Tensor:
    """Resize `(..., H, W)` to another height and width, with the nearest pixel's values."""
    rows, columns = (
        (((torch.arange(new, device=values.device) + 0.5) * (old / new)).long()).clamp(max=old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]
