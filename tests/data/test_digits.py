"""`MultiDigits`: which scans an example shows, its targets, independence of the batch, errors."""

from __future__ import annotations

import math
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from torch_adapmtl.datasets import MultiDigits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@cache
def digits(split: str, size: int = 300) -> MultiDigits:
    return MultiDigits(split, size=size, seed=4)


@cache
def all_scans() -> tuple[Tensor, Tensor]:
    """All scans, enlarged as for images of 32 x 32, `(1797, 20, 20)`, and their classes."""
    bunch = sklearn_datasets.load_digits()
    scans = torch.from_numpy(bunch.images).float() / 16
    enlarged = F.interpolate(scans[:, None], (20, 20), mode="bilinear", align_corners=False)
    return enlarged[:, 0], torch.from_numpy(bunch.target)


def scans_that_fit(image: Tensor, first: int) -> list[tuple[int, tuple[int, int]]]:
    """Scans and corners from row and column `first` on of which no pixel is above the image's."""
    scans = all_scans()[0]
    corners = [(top, left) for top in range(first, first + 5) for left in range(first, first + 5)]
    fitting = []
    for top, left in corners:
        above = (scans - image[top : top + 20, left : left + 20]).amax((1, 2)) > 1e-6
        fitting += [(scan, (top, left)) for scan in torch.nonzero(~above).flatten().tolist()]
    return fitting


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_example_is_two_scans_of_its_split_and_the_targets_describe_them(split: str) -> None:
    scans, labels = all_scans()
    data = digits(split)
    for index in range(5):
        image, targets = data[index]
        pairs = []
        for first, at in scans_that_fit(image[0], 0):
            for second, there in scans_that_fit(image[0], 8):
                canvas = torch.zeros(2, 32, 32)
                canvas[0, at[0] : at[0] + 20, at[1] : at[1] + 20] = scans[first]
                canvas[1, there[0] : there[0] + 20, there[1] : there[1] + 20] = scans[second]
                if (canvas.amax(0) - image[0]).abs().max() < 1e-6:
                    pairs.append((first, second, math.dist(at, there)))
        assert pairs
        for first, second, apart in pairs:
            assert first in data.sources
            assert second in data.sources
            assert labels[first] == targets["left"]
            assert labels[second] == targets["right"]
            low, high = 4 * math.sqrt(2), 12 * math.sqrt(2)
            assert float(targets["distance"]) == pytest.approx((apart - low) / (high - low))


def test_train_and_test_share_no_scan_and_no_image() -> None:
    train, test = digits("train"), digits("test")
    assert not set(train.sources) & set(test.sources)
    assert (len(train.sources), len(test.sources)) == (1347, 450)
    assert len(all_scans()[0].flatten(1).unique(dim=0)) == 1797  # no scan occurs twice
    images = torch.cat([train.tensors()[0], test.tensors()[0]]).flatten(1)
    assert len(images.unique(dim=0)) == 600


def test_shapes_ranges_and_distributions() -> None:
    images, targets = MultiDigits("train", size=3000).tensors()
    assert images.shape == (3000, 1, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    for task in ("left", "right"):
        assert targets[task].dtype == torch.int64
        assert (torch.bincount(targets[task], minlength=10) > 200).all()
    distance = targets["distance"]
    assert distance.shape == (3000, 1)
    assert distance.dtype == torch.float32
    assert 0 <= distance.min() < 0.1
    assert 0.9 < distance.max() <= 1
    assert 0.1 < distance.std() < 0.3
    # The targets are uncorrelated.
    table = torch.stack([targets["left"].float(), targets["right"].float(), distance[:, 0]])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 0.08


@cache
def one_by_one() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [digits("test", 30)[index] for index in range(30)]


@settings(max_examples=20)
@given(st.lists(st.integers(-30, 29), max_size=12))
def test_an_example_does_not_depend_on_its_batch(indices: list[int]) -> None:
    images, targets = digits("test", 30).render(indices)
    assert len(images) == len(indices)
    for place, index in enumerate(indices):
        image, alone = one_by_one()[index]
        assert torch.equal(images[place], image)
        assert all(torch.equal(targets[task][place], alone[task]) for task in alone)


def test_options() -> None:
    grey, colour = MultiDigits(size=5, channels=1)[3][0], MultiDigits(size=5, channels=3)[3][0]
    assert torch.equal(grey.expand(3, -1, -1), colour)
    assert not torch.equal(grey, MultiDigits(size=5, seed=1)[3][0])
    assert list(MultiDigits(size=5, tasks=("right", "distance"))[0][1]) == ["right", "distance"]
    for image_size in (16, 33, 64):
        image, targets = MultiDigits("test", image_size=image_size, size=2)[1]
        assert image.shape == (1, image_size, image_size)
        assert 0 <= float(targets["distance"]) <= 1
    assert (len(MultiDigits()), len(MultiDigits("test"))) == (10_000, 2_000)
    assert sum(len(images) for images, _ in DataLoader(digits("test"), batch_size=64)) == 300


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r'split must be "train" or "test", got \'val\''):
        MultiDigits("val")
    with pytest.raises(ValueError, match="image_size must be at least 16, got 8"):
        MultiDigits(image_size=8)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        MultiDigits(channels=2)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        MultiDigits(size=0)
    with pytest.raises(ValueError, match="tasks must be different names out of"):
        MultiDigits(tasks=("left", "left"))
    with pytest.raises(IndexError, match="index 300 is out of range: there are 300 examples"):
        digits("train")[300]


def test_the_error_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[examples\]"'):
        MultiDigits()
