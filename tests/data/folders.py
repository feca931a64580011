"""Small folders in the layouts of NYU-v2 and Tiny-Taskonomy, and ways to damage their files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

HEIGHT, WIDTH = 2, 3
COLOURS = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3) * 10
# Code 204 is 0.6, 102 is -0.2, 230 about 0.804.
NORMALS = np.full((HEIGHT, WIDTH, 3), (128, 0, 128), dtype=np.uint8)
NORMALS[0, 0] = (204, 128, 230)
NORMALS[1, 2] = 255  # unknown
NORMALS[0, 2] = (128, 128, 255)  # known, though one channel is 255
DEPTH = np.array([[1.5, 2.0, 3e-5], [0.5, 0.0, 4.0]], dtype=np.float32)
LABELS = np.array([[0, 39, 255], [5, 5, 7]], dtype=np.uint8)

Damage = Callable[[Path], Any]


def write_indexed_nyuv2(root: Path) -> None:
    """NYU-v2 in the layout of the paper's code."""
    index: dict[str, Any] = {}
    for split in ("train", "test"):
        (root / split).mkdir()
        index[split] = []
        for i in range(2):
            names = [f"{split}/{i}_{kind}" for kind in ("rgb.png", "seg.png", "n.png", "d.npy")]
            Image.fromarray(COLOURS + i).save(root / names[0])
            Image.fromarray(LABELS).save(root / names[1])
            Image.fromarray(NORMALS).save(root / names[2])
            np.save(root / names[3], DEPTH)
            index[split].append(names)
    (root / "nyu_v2_3task.json").write_text(json.dumps(index))


def write_arrays_nyuv2(root: Path) -> None:
    """NYU-v2 in the layout of MTAN and LibMTL."""
    for split, count in (("train", 11), ("val", 2)):
        for kind in ("image", "label", "depth", "normal"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            normals = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
            normals[0, 0] = (0.6, 0.0, -0.8)
            for kind, array in {
                "image": COLOURS / 255.0,
                "label": np.array([[0, 12, -1], [i, 3, 3]], dtype=np.float32),
                "depth": DEPTH[..., None],
                "normal": normals,
            }.items():
                np.save(root / split / kind / f"{i}.npy", array)


def write_taskonomy(root: Path) -> None:
    """Tiny-Taskonomy in the layout of the paper's code."""
    images = {
        "rgb": COLOURS,
        "seg": np.array([[0, 1, 17], [4, 4, 0]], dtype=np.uint8),
        "n": NORMALS,
        "d": np.array([[0, 999, 64_499], [64_500, 65_535, 7]], dtype=np.uint16),
        "k": np.array([[0, 164, 327], [328, 400, 65_535]], dtype=np.uint16),
        "e": np.array([[0, 2_621, 5_242], [5_243, 6_000, 65_535]], dtype=np.uint16),
    }
    index: dict[str, Any] = {}
    for split in ("train", "test"):
        (root / split).mkdir()
        names = [f"{split}/0_{kind}.png" for kind in images]
        for name, array in zip(names, images.values(), strict=True):
            Image.fromarray(array).save(root / name)
        index[split] = [names]
    (root / "taskonomy.json").write_text(json.dumps(index))
    np.save(root / "semseg_prior_factor.npy", np.linspace(0.5, 2, 17))


def without(name: str) -> Damage:
    """Deletes a file."""
    return lambda root: (root / name).unlink()


def with_bytes(name: str, content: bytes) -> Damage:
    """Replaces the content of a file."""
    return lambda root: (root / name).write_bytes(content)


def truncated(name: str, end: int) -> Damage:
    """Keeps the bytes of a file up to `end`, as in a slice."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:end])


def with_array(name: str, array: Any) -> Damage:
    """Replaces a `.npy` file."""
    return lambda root: np.save(root / name, array)


def with_image(name: str, array: Any) -> Damage:
    """Replaces an image."""
    return lambda root: Image.fromarray(array).save(root / name)


def with_changed_array(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes the content of a `.npy` file."""
    return lambda root: np.save(root / name, change(np.load(root / name)))


def with_first_number(name: str, value: float) -> Damage:
    """Changes the first number of a `.npy` file."""

    def change(array: Any) -> Any:
        array.flat[0] = value
        return array

    return with_changed_array(name, change)


def with_index(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes the content of a JSON file."""

    def write(root: Path) -> None:
        (root / name).write_text(json.dumps(change(json.loads((root / name).read_text()))))

    return write


def rendered(seed: int) -> tuple[Any, Any]:
    """Depth `(H, W)` in metres and unit normals `(H, W, 3)` of a room, float32."""
    from torch_adapmtl.datasets import Rooms

    _, targets = Rooms(1, image_size=(24, 32), tasks=("depth", "normal"), seed=seed)[0]
    return targets["depth"][0].numpy(), targets["normal"].movedim(0, -1).numpy()


def with_maps(layout: str, depth: Any, normals: Any) -> Damage:
    """Replaces depth and normals of the first example, and its image and labels by others of the
    same size. Normals become 8-bit images in the layouts that have them, if they are integers.
    """
    height, width = depth.shape

    def write(root: Path) -> None:
        colours = np.full((height, width, 3), 90, np.uint8)
        labels = np.full((height, width), 3, np.uint8)
        if layout == "arrays_nyuv2":
            np.save(root / "train/image/0.npy", colours / 255.0)
            np.save(root / "train/label/0.npy", labels)
            np.save(root / "train/depth/0.npy", depth[..., None])
            np.save(root / "train/normal/0.npy", normals)
            return
        Image.fromarray(colours).save(root / "train/0_rgb.png")
        Image.fromarray(labels).save(root / "train/0_seg.png")
        Image.fromarray(normals).save(root / "train/0_n.png")
        if layout == "indexed_nyuv2":
            np.save(root / "train/0_d.npy", depth)
        else:
            for kind in ("d", "k", "e"):
                Image.fromarray(depth).save(root / f"train/0_{kind}.png")

    return write


def as_codes(normals: Any) -> Any:
    """Normals as 8-bit codes."""
    return ((normals + 1) * 127.5).round().astype(np.uint8)


def known_pixels(task: str, target: torch.Tensor) -> torch.Tensor:
    """Where a target `(C, H, W)`, or labels `(H, W)`, is known: `(H, W)`."""
    if task == "segmentation":
        return target != 255
    if task == "normal":
        return target.norm(dim=0) > 0.5
    return target[0] > 0 if task == "depth" else ~target[0].isnan()


NOT_FINITE = (math.nan, math.inf)
