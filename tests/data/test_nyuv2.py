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
    as_codes,
    rendered,
    with_changed_array,
    with_first_number,
    with_image,
    with_maps,
)

from torch_adapmtl.datasets import NYUv2, RandomFlip, TinyTaskonomy


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


# --- units ---


def _nearest(array: Any, unit: float) -> Any:
    return (array * unit).round()


WRONG_DEPTHS: dict[str, tuple[Any, str]] = {
    "16-bit millimetres": (lambda d: _nearest(d, 1000).astype(np.uint16), "whole numbers from "),
    "millimetres": (lambda d: d * 1000, ""),
    "centimetres": (lambda d: d * 100, ""),
    "8-bit codes": (lambda d: _nearest(d / 10, 255).astype(np.uint8), "whole numbers from "),
    "codes over the range": (
        lambda d: _nearest((d - d.min()) / (d.max() - d.min()), 255),
        "whole numbers from ",
    ),
}
LAYOUTS = pytest.mark.parametrize("layout", ["indexed_nyuv2", "arrays_nyuv2"])


@LAYOUTS
@pytest.mark.parametrize("unit", WRONG_DEPTHS)
def test_depths_in_another_unit_are_refused(
    layout: str, unit: str, request: pytest.FixtureRequest
) -> None:
    change, found = WRONG_DEPTHS[unit]
    root = request.getfixturevalue(layout)
    for seed in range(5):
        depth, normals = rendered(seed)
        normals = as_codes(normals) if layout == "indexed_nyuv2" else normals
        with_maps(layout, depth, normals)(root)
        NYUv2(root)
        with_maps(layout, change(depth), normals)(root)
        file = "0_d.npy" if layout == "indexed_nyuv2" else "depth.0.npy"
        remedy = "divide millimetres by 1000, and turn codes into metres"
        match = rf"{file} must hold depths in metres, found {found}[\d.]+ to [\d.]+; {remedy}"
        with pytest.raises(ValueError, match=match):
            NYUv2(root)


WRONG_NORMALS: dict[str, tuple[str, Any, str]] = {
    "from 0 to 1": ("arrays_nyuv2", lambda n: (n + 1) / 2, r"2 \* code - 1"),
    "8-bit codes": ("arrays_nyuv2", as_codes, r"code / 127\.5 - 1"),
    "codes as floats": ("arrays_nyuv2", lambda n: (n + 1) * 127.5, r"code / 127\.5 - 1"),
    "0 or 1": (
        "indexed_nyuv2",
        lambda n: ((n + 1) / 2).round().astype(np.uint8),
        r"codes from 0 to 1 for lengths of 1\.7 to 1\.7; save normals as \(normal \+ 1\) \* 127\.5",
    ),
}


@pytest.mark.parametrize("unit", WRONG_NORMALS)
def test_normals_in_another_unit_are_refused(unit: str, request: pytest.FixtureRequest) -> None:
    layout, change, remedy = WRONG_NORMALS[unit]
    root = request.getfixturevalue(layout)
    file = "0_n.png" if layout == "indexed_nyuv2" else "normal.0.npy"
    for seed in range(5):
        depth, normals = rendered(seed)
        with_maps(layout, depth, change(normals))(root)
        with pytest.raises(ValueError, match=rf"{file} must hold normals of unit.*{remedy}"):
            NYUv2(root)


def _with(array: Any, value: Any, share: float) -> Any:
    """The array with a value in the first rows."""
    changed = array.copy()
    changed[: round(share * len(array))] = value
    return changed


RIGHT_DEPTHS: dict[str, Any] = {
    "a room": lambda d: d,
    "a street": lambda d: d * 10,
    "a wall as far as a cathedral is long": lambda d: np.full_like(d, 49.0),
    "a plane in whole metres": lambda d: np.full_like(d, 20.0),
    "whole metres up to ten": lambda d: d.round(),
    "a sky": lambda d: _with(d, 10_000.0, 0.4),
    "a sky of no distance": lambda d: _with(d, np.inf, 0.9),
    "mostly unknown": lambda d: _with(d, 0.0, 0.9),
    "unknown": np.zeros_like,
    "unknown as minus one": lambda d: np.full_like(d, -1),
    "unknown as whole numbers": lambda d: np.zeros_like(d, np.uint16),
    "not a number": lambda d: np.full_like(d, np.nan),
    "half precision": lambda d: d.astype(np.float16),
}


@LAYOUTS
@pytest.mark.parametrize("kind", RIGHT_DEPTHS)
def test_depths_in_metres_are_kept(layout: str, kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    depth, normals = rendered(0)
    changed = RIGHT_DEPTHS[kind](depth)
    with_maps(layout, changed, as_codes(normals) if layout == "indexed_nyuv2" else normals)(root)
    found = NYUv2(root)[0][1]["depth"][0].numpy()
    known = np.isfinite(changed) & (changed > 3e-5)
    assert np.array_equal(found, np.where(known, changed.astype(np.float32), 0))


RIGHT_NORMALS: dict[str, Any] = {
    "a room": lambda n: n,
    "half precision": lambda n: n.astype(np.float16),
    "a wall seen along a diagonal": lambda n: np.full_like(n, 3**-0.5),
    "a wall in front": lambda n: np.full_like(n, (0, 0, 1)),
    "smoothed": lambda n: (n + np.roll(n, 1, 1)) / 2,
    "of another length": lambda n: 3 * n,
    "mostly unknown": lambda n: _with(n, 0, 0.9),
    "unknown": np.zeros_like,
    "not a number": lambda n: np.full_like(n, np.nan),
}


@pytest.mark.parametrize("kind", RIGHT_NORMALS)
def test_normals_of_any_length_are_kept(arrays_nyuv2: Path, kind: str) -> None:
    depth, normals = rendered(0)
    changed = RIGHT_NORMALS[kind](normals)
    with_maps("arrays_nyuv2", depth, changed)(arrays_nyuv2)
    found = NYUv2(arrays_nyuv2)[0][1]["normal"]
    lengths = np.linalg.norm(changed.astype(np.float32), axis=-1, keepdims=True)
    known = np.isfinite(lengths) & (lengths > 1e-3)
    expected = np.where(known, changed / np.where(known, lengths, 1), 0)
    torch.testing.assert_close(
        found, torch.from_numpy(expected).float().movedim(-1, 0), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("layout", ["indexed_nyuv2", "taskonomy"])
@pytest.mark.parametrize("code", [0, 127, 128, 255, "noise", "mostly 0"])
def test_codes_of_no_direction_are_unknown(
    layout: str, code: Any, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(layout)
    depth, normals = rendered(0)
    codes = as_codes(normals)
    if code == "noise":  # as of a compressed image
        noise = np.random.default_rng(0).normal(0, 8, codes.shape)
        codes = (codes + noise).clip(0, 255).astype(np.uint8)
        share = 0.0
    elif code == "mostly 0":
        codes, share = _with(codes, 0, 0.75), 0.75
    else:
        codes, share = np.full_like(codes, code), 1.0
    metres = depth if layout == "indexed_nyuv2" else (depth * 512).astype(np.uint16)
    with_maps(layout, metres, codes)(root)
    data: Any = NYUv2(root) if layout == "indexed_nyuv2" else TinyTaskonomy(root)
    found = data[0][1]["normal"].norm(dim=0)
    assert (found == 0).float().mean().item() == share
    torch.testing.assert_close(found[found > 0], torch.ones_like(found[found > 0]))


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
