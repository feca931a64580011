"""Tiny-Taskonomy from a small folder, by hand-computed values."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import (
    HEIGHT,
    LABELS,
    WIDTH,
    Damage,
    with_array,
    with_bytes,
    with_image,
    without,
)

from torch_adapmtl.datasets import RandomFlip, RandomScaleCrop, TinyTaskonomy


def test_images_targets_and_class_weights(taskonomy: Path) -> None:
    data = TinyTaskonomy(taskonomy, "test")
    assert len(data) == 1
    image, targets = data[0]
    assert list(targets) == ["segmentation", "normal", "depth", "keypoints", "edges"]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert targets["segmentation"].tolist() == [[255, 0, 16], [3, 3, 255]]
    codes = [0, 999, 64_499, None, None, 7]
    expected = [
        0.0 if code is None else max(math.log(1 + code) / math.log(2**16), 1e-6) for code in codes
    ]
    torch.testing.assert_close(targets["depth"].flatten(), torch.tensor(expected))
    assert targets["depth"][0, 0, 0] > 0  # the code 0 is known
    known = targets["normal"].norm(dim=0).flatten() > 0.5
    assert known.tolist() == [True, True, True, False, False, False]
    for task, most, middle in (("keypoints", 0.005, 164), ("edges", 0.08, 2_621)):
        values = targets[task].flatten()
        assert values[0] == -1
        assert values[4] == values[5] == 1
        assert values[1].item() == pytest.approx(2 * middle / 2**16 / most - 1, abs=1e-6)
    torch.testing.assert_close(data.class_weights, torch.linspace(0.5, 2, 17))
    assert list(TinyTaskonomy(taskonomy, tasks=["edges", "depth"])[0][1]) == ["edges", "depth"]


def test_examples_are_resized(taskonomy: Path) -> None:
    image, targets = TinyTaskonomy(taskonomy, size=(4, 6))[0]
    _, original = TinyTaskonomy(taskonomy)[0]
    assert image.shape == (3, 4, 6)
    for task, target in targets.items():
        twice = original[task].repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert torch.equal(target, twice)


def test_a_transform_is_applied(taskonomy: Path) -> None:
    data = TinyTaskonomy(taskonomy, transform=RandomFlip(1.0))
    _, targets = data[0]
    _, original = TinyTaskonomy(taskonomy)[0]
    assert torch.equal(targets["edges"], original["edges"].flip(-1))
    again = pickle.loads(pickle.dumps(data))[0][1]  # as the workers of a DataLoader receive it
    assert all(torch.equal(again[task], targets[task]) for task in targets)


def test_a_zoom_does_not_divide_the_logarithm_of_a_depth(taskonomy: Path) -> None:
    with pytest.raises(ValueError, match=r"depths are logarithms; pass .* same_camera=False"):
        TinyTaskonomy(taskonomy, transform=RandomScaleCrop(2))
    original = TinyTaskonomy(taskonomy)[0][1]["depth"]
    crop = RandomScaleCrop(2 * HEIGHT, scale=(2.0, 2.0), same_camera=False)
    zoomed = TinyTaskonomy(taskonomy, transform=crop)[0][1]["depth"]
    assert set(zoomed.unique().tolist()) <= set(original.unique().tolist())


FAULTS: dict[str, tuple[Damage, type[Exception], str]] = {
    "no class weights": (
        without("semseg_prior_factor.npy"),
        FileNotFoundError,
        "semseg_prior_factor.npy does not exist; it holds the weight of each class",
    ),
    "16 class weights": (
        with_array("semseg_prior_factor.npy", np.ones(16)),
        ValueError,
        r"must hold 17 numbers, one for each class, found the shape \(16,\)",
    ),
    **{
        f"class weights of {value}": (
            with_array("semseg_prior_factor.npy", np.full(17, value)),
            ValueError,
            f"semseg_prior_factor.npy must hold finite numbers >= 0, found {value:g}",
        )
        for value in (-1.0, math.nan, math.inf)
    },
    "class weights that are text": (
        with_bytes("semseg_prior_factor.npy", b"weights"),
        ValueError,
        "semseg_prior_factor.npy is not a .npy file of numbers",
    ),
    "no index": (
        without("taskonomy.json"),
        FileNotFoundError,
        "taskonomy.json does not exist; it lists the files of each split",
    ),
    "a depth of 8 bits": (
        with_image("train/0_d.png", LABELS),
        ValueError,
        "0_d.png must be an image of 16 bits, found mode 'L'",
    ),
    "a depth of another size": (
        with_image("train/0_d.png", np.ones((2, 4), np.uint16)),
        ValueError,
        r"train.0_d.png must have the height and width of its image .*train.0_rgb.png, \(2, 3\), "
        r"found \(2, 4\)",
    ),
    "depths of 8 bits in 16": (
        with_image("train/0_d.png", np.array([[3, 0, 99], [255, 65_535, 7]], np.uint16)),
        ValueError,
        "0_d.png must hold depths in units of 1/512 metre, found codes from 0 to 255, at most half "
        "a metre; convert 8-bit codes",
    ),
    "normals that are 0 or 1": (
        with_image("train/0_n.png", np.eye(3, dtype=np.uint8)[[[0, 1, 2], [2, 1, 0]]]),
        ValueError,
        r"0_n.png must hold normals of unit length as 8-bit codes, found codes from 0 to 1 for "
        r"lengths of 1\.7 to 1\.7; save normals as \(normal",
    ),
    "a class above 17": (
        with_image("train/0_seg.png", LABELS),
        ValueError,
        r"0 \(unknown\) or a class plus one, up to 17, found 255",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_refused(taskonomy: Path, fault: str) -> None:
    damage, error, match = FAULTS[fault]
    damage(taskonomy)
    with pytest.raises(error, match=match):
        TinyTaskonomy(taskonomy)


@pytest.mark.parametrize("codes", [0, 256, 64_499, 64_500, 65_535])
def test_depths_that_are_near_far_or_unknown(taskonomy: Path, codes: int) -> None:
    with_image("train/0_d.png", np.full((HEIGHT, WIDTH), codes, np.uint16))(taskonomy)
    _, targets = TinyTaskonomy(taskonomy)[0]
    assert bool((targets["depth"] > 0).all()) == (codes < 64_500)


def test_normals_where_the_depth_is_unknown_are_not_looked_at(taskonomy: Path) -> None:
    normals = np.full((HEIGHT, WIDTH, 3), 1, np.uint8)
    normals[0, 0] = (128, 128, 255)
    depth = np.full((HEIGHT, WIDTH), 65_535, np.uint16)
    depth[0, 0] = 999
    with_image("train/0_n.png", normals)(taskonomy)
    with_image("train/0_d.png", depth)(taskonomy)
    known = TinyTaskonomy(taskonomy)[0][1]["normal"].norm(dim=0) > 0.5
    assert known.tolist() == [[True, False, False], [False, False, False]]


def test_unknown_tasks_are_refused(taskonomy: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks must be names out of .* got \['shading'\]"):
        TinyTaskonomy(taskonomy, tasks=["shading"])
