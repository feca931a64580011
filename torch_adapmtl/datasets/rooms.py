"""Procedural 3-D rooms with exact ground truth for five dense tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._maps import edge_map, keypoint_map
from torch_adapmtl.datasets._random import example_keys
from torch_adapmtl.datasets._raycast import describe_hits, first_hits, pixel_rays, to_camera
from torch_adapmtl.datasets._scenes import RoomScenes, sample_scenes
from torch_adapmtl.datasets._shading import shade

__all__ = ["Rooms"]

_CHANNELS = {"segmentation": 5, "depth": 1, "normal": 3, "edges": 1, "keypoints": 1}


class Rooms(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Rendered rooms with boxes and spheres, with exact targets of five dense tasks.

    A scene is a box-shaped room with up to three boxes (rotated about the vertical) and up to three
    spheres on its floor, seen by a random camera. Each surface has a random texture (checker,
    stripes, noise or plain), and one point light lights them. Scenes are rendered by ray casting,
    with one ray through the centre of each pixel, so the targets are exact:

    - `segmentation`, `(H, W)` int64: 0 floor, 1 ceiling, 2 wall, 3 box, 4 sphere.
    - `depth`, `(1, H, W)`: z-depth in metres, the distance along the camera's axis.
    - `normal`, `(3, H, W)`: the unit normal in the camera frame (x right, y down, z forward). It
      points towards the camera: its inner product with the pixel's ray is negative.
    - `edges`, `(1, H, W)`: 1 where one of the four neighbours lies on another smooth surface
      (another object, or another face of the same box or room), else 0.
    - `keypoints`, `(1, H, W)`: `max(0, 1 - d^2 / r^2)^2` for the distance `d` to the nearest
      visible keypoint (a box's corner or a sphere's centre); `r` is 6 % of the shorter side.

    Example `i` is a function of `seed` and `i` only: it is the same bit for bit in every batch and
    order. Data sets with different seeds share no scene, so use one seed to train and another to
    test.

    Args:
        size: Number of scenes.
        image_size: Height and width in pixels: one integer, or a pair. Scenes do not depend on it;
            the camera's field of view (58 to 81 degrees) spans the shorter side.
        tasks: The targets to return, in this order.
        seed: Seed of the scenes.
        device: Device to render on, which also holds the returned tensors.
        shadows: Whether objects cast shadows.
        noise: Standard deviation of the pixel noise. Images are in [0, 1].

    Raises:
        ValueError: If a size is below 1, `noise` is negative, or a task is unknown or repeated.

    Example:
        >>> rooms = Rooms(100, image_size=32, tasks=("segmentation", "depth"))
        >>> image, targets = rooms[7]
        >>> image.shape, targets["depth"].shape
        (torch.Size([3, 32, 32]), torch.Size([1, 32, 32]))
        >>> images, targets = rooms.render([7, 3, 99])
        >>> images.shape, targets["segmentation"].shape
        (torch.Size([3, 3, 32, 32]), torch.Size([3, 32, 32]))
        >>> bool((images[0] == image).all())
        True
    """

    #: The classes of the segmentation, in the order of their numbers.
    classes: tuple[str, ...] = ("floor", "ceiling", "wall", "box", "sphere")

    def __init__(
        self,
        size: int,
        *,
        image_size: int | tuple[int, int] = 64,
        tasks: Sequence[str] = ("segmentation", "depth", "normal"),
        seed: int = 0,
        device: str | torch.device = "cpu",
        shadows: bool = True,
        noise: float = 0.03,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size!r}")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size!r}")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise!r}")
        unknown = [task for task in tasks if task not in _CHANNELS]
        if isinstance(tasks, str) or unknown or len(set(tasks)) < len(tasks) or not tasks:
            raise ValueError(
                f"tasks must be different names out of {list(_CHANNELS)}, got {tasks!r}"
            )
        self.size = size
        self.image_size = (height, width)
        self.tasks = tuple(tasks)
        self.seed = seed
        self.device = torch.device(device)
        self.shadows = shadows
        self.noise = noise
        self._rendered: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def channels(self) -> dict[str, int]:
        """The number of channels that a model predicts for each task."""
        return {task: _CHANNELS[task] for task in self.tasks}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image `(3, H, W)` in [0, 1] and the targets of one scene."""
        if self._rendered is not None:
            images, targets = self._rendered
            index = self._check_indices([index])[0]
        else:
            images, targets = self.render([index])
            index = 0
        return images[index], {task: target[index] for task, target in targets.items()}

    def render(self, indices: Iterable[int] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Render some scenes at once.

        Args:
            indices: Indices of the scenes, in any order; negative ones count from the end.

        Returns:
            Images `(B, 3, H, W)` and targets, each with a leading `B`.

        Raises:
            IndexError: If an index is out of range.
        """
        scenes = self.scenes(indices)
        height, width = self.image_size
        # On a CPU, intermediate results of a chunk fit the cache of a core. A GPU needs more work.
        pixels = 1 << (16 if self.device.type == "cpu" else 22)
        chunk = max(1, pixels // (height * width))
        chunks = [
            self._render(scenes[start : start + chunk])
            for start in range(0, max(1, len(scenes)), chunk)
        ]
        images = torch.cat([image for image, _ in chunks])
        return images, {
            task: torch.cat([targets[task] for _, targets in chunks]) for task in self.tasks
        }

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Render the whole data set once: images `(size, 3, H, W)` and targets.

        The data set keeps the result, and indexing reads from it afterwards. It is returned
        without a copy, so do not change it in place.
        """
        if self._rendered is None:
            self._rendered = self.render(range(self.size))
        return self._rendered

    def scenes(self, indices: Iterable[int] | Tensor) -> RoomScenes:
        """The exact description of some scenes: room, camera, light and objects.

        Raises:
            IndexError: If an index is out of range.
        """
        checked = torch.tensor(self._check_indices(indices), dtype=torch.int64, device=self.device)
        return sample_scenes(example_keys(self.seed, checked))

    def _check_indices(self, indices: Iterable[int] | Tensor) -> list[int]:
        values = indices.tolist() if isinstance(indices, Tensor) else [int(i) for i in indices]
        for index in values:
            if not -self.size <= index < self.size:
                raise IndexError(f"index {index} is out of range: there are {self.size} scenes")
        return [index % self.size for index in values]

    @torch.no_grad()
    def _render(self, scenes: RoomScenes) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = self.image_size
        origin, ray = pixel_rays(scenes, height, width)
        depth, hit = first_hits(scenes, origin, ray)
        hits = describe_hits(scenes, origin, ray, depth, hit)

        def as_map(values: Tensor) -> Tensor:
            return values.view(len(scenes), 1, height, width)

        targets: dict[str, Tensor] = {}
        for task in self.tasks:
            if task == "segmentation":
                targets[task] = as_map(hits.segmentation)[:, 0]
            elif task == "depth":
                targets[task] = as_map(depth)
            elif task == "normal":
                normal = to_camera(scenes, hits.normal)
                targets[task] = torch.cat([as_map(n) for n in normal], dim=1)
            elif task == "edges":
                targets[task] = edge_map(as_map(hits.face))
            else:
                targets[task] = as_map(keypoint_map(scenes, height, width))
        image = shade(scenes, hits, shadows=self.shadows, noise=self.noise)
        return image.transpose(0, 1).reshape(len(scenes), 3, height, width), targets
