"""Missing, damaged and wrong files are refused at once, by errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from folders import (
    DEPTH,
    LABELS,
    Damage,
    truncated,
    with_array,
    with_bytes,
    with_image,
    with_index,
    without,
)

from torch_adapmtl.datasets import NYUv2

INDEX = "nyu_v2_3task.json"
NOT_NUMBERS = "0_d.npy is not a .npy file of numbers"
NOT_AN_IMAGE = "0_n.png cannot be read as an image"
HALF_A_HEADER = b"{'descr': ('<f4',\n"


def _archive(root: Path) -> None:
    np.savez(root / "depth.npz", DEPTH)
    (root / "depth.npz").replace(root / "train/0_d.npy")


FAULTS: dict[str, tuple[Damage, str]] = {
    "no split": (
        with_index(INDEX, lambda index: {"test": index["test"]}),
        rf"{INDEX} has no key 'train'; it has \['test'\]",
    ),
    "no rows": (
        with_index(INDEX, lambda index: {"train": []}),
        f"{INDEX}: 'train' must be a list of one or more rows",
    ),
    "a short row": (
        with_index(INDEX, lambda index: {"train": [["a.png"]]}),
        r"row 0 of 'train' must hold 4 file names .*found \['a.png'\]",
    ),
    "a row of numbers": (
        with_index(INDEX, lambda index: {"train": [*index["train"], [1, 2, 3, 4]]}),
        rf"{INDEX}: row 2 of 'train' must hold 4 file names .*found \[1, 2, 3, 4\]",
    ),
    "half a JSON file": (with_bytes(INDEX, b"{"), f"{INDEX} is not valid JSON"),
    "no text": (with_bytes(INDEX, b"\xff\xfe"), f"{INDEX} is not valid JSON"),
    "a grey image": (
        with_image("train/0_n.png", LABELS),
        r"0_n.png must be an image of 3 channel\(s\), found mode 'L'",
    ),
    "a deep image": (
        with_image("train/0_seg.png", LABELS.astype(np.uint16)),
        "0_seg.png must be an image of 8 bits, found mode 'I;16'",
    ),
    "no image": (with_bytes("train/0_n.png", b"normals"), NOT_AN_IMAGE),
    "half an image": (truncated("train/0_n.png", -30), NOT_AN_IMAGE),
    "a broken image": (truncated("train/0_n.png", 12), NOT_AN_IMAGE),
    "a vector": (
        with_array("train/0_d.npy", DEPTH[0]),
        r"0_d.npy must hold an array of shape \(H, W, 1\), found \(3,\)",
    ),
    "another size": (
        with_array("train/0_d.npy", DEPTH.T),
        r"train.0_d.npy must have the height and width of its image .*train.0_rgb.png, \(2, 3\), "
        r"found \(3, 2\)",
    ),
    "no array": (with_bytes("train/0_d.npy", b"metres"), NOT_NUMBERS),
    "half a header": (
        with_bytes(
            "train/0_d.npy",
            b"\x93NUMPY\x01\x00" + len(HALF_A_HEADER).to_bytes(2, "little") + HALF_A_HEADER,
        ),
        NOT_NUMBERS,
    ),
    "an empty file": (with_bytes("train/0_d.npy", b""), NOT_NUMBERS),
    "an archive": (_archive, NOT_NUMBERS),
    "a pickled object": (
        with_array("train/0_d.npy", np.array([[None]])),
        f"{NOT_NUMBERS}: Object arrays cannot be loaded",
    ),
    "an array of words": (
        with_array("train/0_d.npy", np.array([["far", "near"]])),
        f"{NOT_NUMBERS}: its dtype is <U4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused(indexed_nyuv2: Path, fault: str) -> None:
    damage, match = FAULTS[fault]
    damage(indexed_nyuv2)
    with pytest.raises(ValueError, match=match):
        NYUv2(indexed_nyuv2)


def test_a_missing_file_is_named_with_its_example(indexed_nyuv2: Path) -> None:
    without("train/1_d.npy")(indexed_nyuv2)
    with pytest.raises(FileNotFoundError, match=r"1_d.npy does not exist: the depth of example 1$"):
        NYUv2(indexed_nyuv2)
