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

#: What a target means to an augmentation, by the name of its task.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "segmentation": "labels",
        "depth": "depth",
        "normal": "normal",
        "edges": "map",
        "keypoints": "map",
    }
)
#: What padding writes into a target of each kind, for losses and metrics to leave out.
IGNORE: Mapping[str, float] = MappingProxyType(
    {"labels": 255, "depth": 0, "normal": 0, "map": math.nan}
)


class _Joint(ABC):
    """One random choice per example, applied to the image and to every target."""

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
        """Transform an example or a batch, each example of it by its own choice.

        The arguments stay as they are. What a choice leaves alone is returned as it is, not copied.

        Args:
            image: `(C, H, W)`, or a batch `(B, C, H, W)`.
            targets: By task: labels `(H, W)`, others `(C, H, W)`; with a leading `B` in a batch.
            generator: A CPU generator to draw from; torch's own by default.

        Returns:
            Image and targets.

        Raises:
            ValueError: If a task's kind is not known, or a target's size is not the image's.
        """
        self._check(image, targets)
        if image.ndim == 3:
            return self._one(image, dict(targets), generator)
        examples = [
            self._one(image[i], {task: t[i] for task, t in targets.items()}, generator)
            for i in range(len(image))
        ]
        images = torch.stack([one for one, _ in examples])
        return images, {task: torch.stack([own[task] for _, own in examples]) for task in targets}

    @abstractmethod
    def _one(
        self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform one example by one random choice."""

    def _check(self, image: Tensor, targets: Mapping[str, Tensor]) -> None:
        if image.ndim not in (3, 4):
            raise ValueError(
                f"image must be (C, H, W) or (B, C, H, W), got the shape {tuple(image.shape)}"
            )
        for task, target in targets.items():
            if task not in self.kinds:
                raise ValueError(
                    f"what the target of task {task!r} means is not known; say it with "
                    f"kinds={{{task!r}: ...}}, one of {[*IGNORE, 'none']}"
                )
            if self.kinds[task] == "none":
                continue
            dims = image.ndim - (self.kinds[task] == "labels")
            if target.ndim != dims or target.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"targets[{task!r}] has the shape {tuple(target.shape)}, which does not fit "
                    f"an image of shape {tuple(image.shape)}"
                )


class RandomFlip(_Joint):
    """Mirror image and targets left to right, with probability `p`.

    A mirrored normal map also changes the sign of its x component.

    Args:
        p: The probability.
        kinds: What the targets of further tasks mean: `"labels"`, `"depth"`, `"normal"`, `"map"`
            (any other dense target) or `"none"` (left alone). `KINDS` has the known ones.

    Raises:
        ValueError: If `p` is not in [0, 1] or a kind is not known.

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

    def _one(
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


class RandomScaleCrop(_Joint):
    """Zoom by a random factor, then cut out (or pad to) a fixed size at a random place.

    The protocol of the paper's data: scale 0.5 to 1.5, crop 321 x 321. Images are resized
    bilinearly, targets by nearest pixel. What padding adds is 0 in the image and `IGNORE` in
    the targets: 255 for labels, 0 for depth and normals, NaN for other maps.

    A picture zoomed by `s` looks like one taken by the same camera of a scene that is pressed
    together along its axis, every depth divided by `s`. So depth is divided by `s`, as usual, and
    normals are turned to fit: their z is multiplied by `s` and their length restored (dividing only
    depth tilts every surface). With `same_camera=False` depth and normals keep their values, which
    is as exact for a camera whose focal length is `s` times longer. Sizes are whole pixels: `s` is
    the ratio that came out, for each axis. Either way a crop off the middle moves the principal
    point, by the crop's offset; targets do not depend on it.

    Args:
        size: Height and width to return: an integer or a pair.
        scale: The least and the greatest zoom; one is drawn uniformly.
        same_camera: Whether the zoom is explained by the scene or by the camera.
        kinds: What the targets of further tasks mean, as for `RandomFlip`.

    Raises:
        ValueError: If `size` or `scale` is out of range or a kind is not known.

    Example:
        >>> import torch
        >>> crop = RandomScaleCrop(4, scale=(2.0, 2.0))
        >>> image, targets = crop(torch.zeros(3, 4, 4), {"depth": torch.full((1, 4, 4), 3.0)})
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
            raise ValueError(f"scale must be (least, greatest) with 0 < least, got {scale!r}")
        self.scale = scale
        self.same_camera = same_camera

    def _one(
        self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        low, high = self.scale
        chance = [float(u) for u in torch.rand(3, generator=generator)]
        zoom = low + chance[0] * (high - low)
        scaled = [max(1, round(extent * zoom)) for extent in image.shape[-2:]]
        # Where the crop begins; before the picture (negative) where the picture is smaller.
        start = [
            _between(have - want, u)
            for have, want, u in zip(scaled, self.size, chance[1:], strict=True)
        ]
        zoomed = F.interpolate(
            image[None], size=scaled, mode="bilinear", align_corners=False, antialias=True
        )[0]
        out = {}
        down, across = (new / old for new, old in zip(scaled, image.shape[-2:], strict=True))
        for task, target in targets.items():
            kind = self.kinds[task]
            if kind == "none":
                out[task] = target
                continue
            near = resize_nearest(target, scaled)
            if self.same_camera and kind == "depth":
                near = near / across
            elif self.same_camera and kind == "normal":
                # The inverse transpose of pressing (x, y, z) to (x, y * down / across, z / across).
                turn = near.new_tensor([1.0, across / down, across])
                near = F.normalize(near * turn[:, None, None], dim=0)
            out[task] = self._cut(near, start, IGNORE[kind])
        return self._cut(zoomed, start, 0), out

    def _cut(self, values: Tensor, start: list[int], fill: float) -> Tensor:
        (height, width), (top, left) = self.size, start
        out = values.new_full((*values.shape[:-2], height, width), fill)
        inner = values[..., max(top, 0) : top + height, max(left, 0) : left + width]
        row, column = max(-top, 0), max(-left, 0)
        out[..., row : row + inner.shape[-2], column : column + inner.shape[-1]] = inner
        return out


def _between(spare: int, chance: float) -> int:
    """An integer from 0 to `spare` (which may be negative), both included."""
    place = min(int(chance * (abs(spare) + 1)), abs(spare))
    return place if spare >= 0 else -place


def resize_nearest(values: Tensor, size: list[int]) -> Tensor:
    """The nearest pixel of `values` (…, H, W) for each pixel at another size."""
    rows, columns = (
        (((torch.arange(new, device=values.device) + 0.5) * (old / new)).long()).clamp(max=old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]
