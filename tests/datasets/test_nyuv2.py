"""NYU-v2 from small folders in both layouts, by hand-computed values."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import (
    HEIGHT,
    LABELS,
    NOT_FINITE,
    WIDTH,
    Damage,
    with_changed_array,
    with_first_number,
    with_image,
)

from torch_adapmtl.datasets import NYUv2, RandomFlip


def test_the_papers_layout(indexed_nyuv2: Path) -> None:
    data = NYUv2(indexed_nyuv2, "test")
    assert (len(data), data.classes) == (2, 40)
    image, targets = data[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([31.0, 41.0, 51.0]) / 255)
    assert targets["segmentation"].tolist() == [[0, 39, 255], [5, 5, 7]]
    assert targets["segmentation"].dtype == torch.int64
    assert targets["depth"][0].tolist() == [[1.5, 2.0, 0.0], [0.5, 0.0, 4.0]]
    normal = targets["normal"]
    assert not normal[:, 1, 2].any()  # unknown
    expected = torch.tensor([204 / 127.5 - 1, 128 / 127.5 - 1, 230 / 127.5 - 1])
    torch.testing.assert_close(normal[:, 0, 0], expected / expected.norm())
    lengths = normal.norm(dim=0).flatten()[:-1]
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_the_layout_of_libmtl(arrays_nyuv2: Path) -> None:
    data = NYUv2(arrays_nyuv2, "train")
    assert (len(data), data.classes) == (11, 13)
    image, targets = data[10]  # files are in the order of their numbers, so 10 is the last
    assert targets["segmentation"].tolist() == [[0, 12, 255], [10, 3, 3]]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([0.0, 10.0, 20.0]) / 255)
    assert targets["depth"][0].tolist() == [[1.5, 2.0, 0.0], [0.5, 0.0, 4.0]]
    torch.testing.assert_close(targets["normal"][:, 0, 0], torch.tensor([0.6, 0.0, -0.8]))
    assert not targets["normal"][:, 1].any()
    assert len(NYUv2(arrays_nyuv2, "test")) == 2


def test_a_transform_is_applied(arrays_nyuv2: Path) -> None:
    data = NYUv2(arrays_nyuv2, transform=RandomFlip(1.0))
    _, targets = data[0]
    torch.testing.assert_close(targets["normal"][:, 0, 2], torch.tensor([-0.6, 0.0, -0.8]))
    assert targets["segmentation"].tolist() == [[255, 12, 0], [3, 3, 0]]
    again = pickle.loads(pickle.dumps(data))[0][1]  # as the workers of a DataLoader receive it
    assert all(torch.equal(again[task], targets[task]) for task in targets)


@pytest.mark.parametrize("size", [4, (4, 6)])
def test_examples_are_resized(indexed_nyuv2: Path, size: Any) -> None:
    image, targets = NYUv2(indexed_nyuv2, size=size)[0]
    shape = (size, size) if isinstance(size, int) else size
    assert image.shape[-2:] == shape
    assert all(target.shape[-2:] == shape for target in targets.values())
    # The nearest pixels: rows 0, 0, 1, 1, and columns 0, 1, 1, 2 or each twice.
    columns = [0, 1, 1, 2] if shape[1] == 4 else [0, 0, 1, 1, 2, 2]
    rows = [[[0, 39, 255], [5, 5, 7]][row] for row in (0, 0, 1, 1)]
    assert targets["segmentation"].tolist() == [[row[k] for k in columns] for row in rows]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_depths_and_normals_that_are_not_finite_are_unknown(
    arrays_nyuv2: Path, value: float
) -> None:
    for kind in ("normal", "depth"):
        with_first_number(f"train/{kind}/0.npy", value)(arrays_nyuv2)
    _, targets = NYUv2(arrays_nyuv2)[0]
    for task in ("normal", "depth"):
        assert not targets[task][:, 0, 0].any()
        assert targets[task].isfinite().all()


FAULTS: dict[str, tuple[Damage, str]] = {
    "8-bit colours": (
        with_changed_array("train/image/0.npy", lambda image: np.float32(image * 255)),
        "image.0.npy must hold numbers from 0 to 1, found 0 to 170; divide 8-bit values by 255",
    ),
    "negative colours": (
        with_changed_array("train/image/0.npy", lambda image: np.float32(image - 0.5)),
        r"image.0.npy must hold numbers from 0 to 1, found -0\.5 to 0\.1",
    ),
    "a colour of NaN": (
        with_first_number("train/image/0.npy", math.nan),
        "image.0.npy must hold numbers from 0 to 1, found nan",
    ),
    **{
        f"class {value}": (
            with_first_number("train/label/0.npy", value),
            rf"label.0.npy must hold classes 0 to 12 or unknown pixels, found {value:g}$",
        )
        for value in (2.7, 13.0, -2.0, math.nan, math.inf)
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_numbers_are_refused(arrays_nyuv2: Path, fault: str) -> None:
    damage, match = FAULTS[fault]
    damage(arrays_nyuv2)
    with pytest.raises(ValueError, match=match):
        NYUv2(arrays_nyuv2)


def test_a_class_above_39_is_refused(indexed_nyuv2: Path) -> None:
    with_image("train/0_seg.png", LABELS + 40)(indexed_nyuv2)
    with pytest.raises(
        ValueError, match=r"0_seg.png must hold classes 0 to 39 or unknown pixels, found 40"
    ):
        NYUv2(indexed_nyuv2)


def test_a_folder_in_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds neither nyu_v2_3task\.json nor the folder train"
    ):
        NYUv2(tmp_path)
    (tmp_path / "train" / "image").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"train.image holds no .npy files"):
        NYUv2(tmp_path)
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'val\''):
        NYUv2(tmp_path, "val")
