"""Procedural 3-D rooms with exact ground truth for five dense tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torch_adapmtl.datasets._maps import edge_map, keypoint_map
from torch_adapmtl.datasets._random import example_keys
from torch_adapmtl.datasets._raycast import nearest, pixel_rays, surfaces, to_camera
from torch_adapmtl.datasets._scenes import RoomScenes, sample_scenes
from torch_adapmtl.datasets._shading import shade

__all__ = ["Rooms"]

_CHANNELS = {"segmentation": 5, "depth": 1, "normal": 3, "edges": 1, "keypoints": 1}


class Rooms(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Rooms with boxes and spheres in them, seen by a random camera: five dense tasks.

    A scene is a box-shaped room with up to three boxes (turned about the vertical) and up to
    three spheres on its floor, each surface with a random texture (checker, stripes, noise or
    plain), lit by one point light. It is rendered by ray casting, one ray through the centre
    of each pixel, so the targets are exact:

    - `segmentation`, `(H, W)` int64: 0 floor, 1 ceiling, 2 wall, 3 box, 4 sphere.
    - `depth`, `(1, H, W)`: z-depth in metres, the distance along the camera's axis.
    - `normal`, `(3, H, W)`: the unit normal in the camera frame (x right, y down, z forward), on
      the side that the camera sees (`normal` times the pixel's ray is negative).
    - `edges`, `(1, H, W)`: 1 where one of the four neighbours lies on another smooth surface
      (another object, or another face of the same box or room), else 0.
    - `keypoints`, `(1, H, W)`: `max(0, 1 - d^2 / r^2)^2` for the distance `d` to the nearest
      visible keypoint (a box's corner or a sphere's centre); `r` is 6 % of the shorter side.

    Example `i` is a function of `seed` and `i` alone: bit for bit the same whatever the batch
    and the order in which it is rendered. Sets with different seeds share no scene, so use
    one seed to train and another to test.

    Args:
        size: Number of scenes.
        image_size: Height and width in pixels: one integer, or a pair. The scene stays the
            same; its field of view (58 to 81 degrees) spans the shorter side.
        tasks: Which targets to give, in which order.
        seed: Which rooms.
        device: Where to render and where the tensors lie.
        shadows: Whether objects cast shadows.
        noise: Standard deviation of the pixel noise; images are in [0, 1].

    Raises:
        ValueError: If a size is below 1, `noise` negative, or a task unknown or repeated.

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
        self._all: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def channels(self) -> dict[str, int]:
        """How many channels a model needs to predict each task."""
        return {task: _CHANNELS[task] for task in self.tasks}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image `(3, H, W)` in [0, 1] and the targets of one scene."""
        if self._all is not None:
            images, targets = self._all
            index = self._checked([index])[0]
        else:
            images, targets = self.render([index])
            index = 0
        return images[index], {task: target[index] for task, target in targets.items()}

    def render(self, indices: Iterable[int] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Render some scenes at once.

        Args:
            indices: Which, in any order; negative ones count from the end.

        Returns:
            Images `(B, 3, H, W)` and targets, each with a leading `B`.

        Raises:
            IndexError: If an index is out of range.
        """
        scenes = self.scenes(indices)
        height, width = self.image_size
        # Intermediate results of one chunk fit the cache of a core; a GPU wants more work.
        pixels = 1 << (16 if self.device.type == "cpu" else 22)
        chunk = max(1, pixels // (height * width))
        parts = [
            self._render(scenes[start : start + chunk])
            for start in range(0, max(1, len(scenes)), chunk)
        ]
        images = torch.cat([image for image, _ in parts])
        return images, {
            task: torch.cat([targets[task] for _, targets in parts]) for task in self.tasks
        }

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Render the whole set, once: images `(size, 3, H, W)` and targets.

        The result is kept, and indexing reads from it from then on. It is not a copy: leave
        it as it is.
        """
        if self._all is None:
            self._all = self.render(range(self.size))
        return self._all

    def scenes(self, indices: Iterable[int] | Tensor) -> RoomScenes:
        """The exact description of some scenes: room, camera, light, objects.

        Raises:
            IndexError: If an index is out of range.
        """
        where = torch.tensor(self._checked(indices), dtype=torch.int64, device=self.device)
        return sample_scenes(example_keys(self.seed, where))

    def _checked(self, indices: Iterable[int] | Tensor) -> list[int]:
        values = indices.tolist() if isinstance(indices, Tensor) else [int(i) for i in indices]
        for index in values:
            if not -self.size <= index < self.size:
                raise IndexError(f"index {index} is out of range: there are {self.size} scenes")
        return [index % self.size for index in values]

    @torch.no_grad()
    def _render(self, scenes: RoomScenes) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = self.image_size
        origin, ray = pixel_rays(scenes, height, width)
        depth, what = nearest(scenes, origin, ray)
        hits = surfaces(scenes, origin, ray, depth, what)

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
