"""NYU-v2 and Tiny-Taskonomy, from small files in exactly their layouts, by hand-computed values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchmetrics")

import numpy as np
from PIL import Image

from examples.benchmark import paper_problem, paper_scale, run
from torch_adapmtl.datasets import NYUv2, RandomFlip, RandomScaleCrop, TinyTaskonomy
from torch_adapmtl.tasks import Depth, Map, Normals, Segmentation

HEIGHT, WIDTH = 2, 3
COLOURS = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3) * 10
# Code 204 is 0.6, 102 is -0.2, 230 about 0.804; the last pixel is unknown.
NORMALS = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
NORMALS[0, 0] = (204, 128, 230)
NORMALS[1, 2] = 255
NORMALS[0, 2] = (128, 128, 255)  # known, though a channel is at its end
DEPTH = np.array([[1.5, 2.0, 3e-5], [0.5, 0.0, 4.0]], dtype=np.float32)
LABELS = np.array([[0, 39, 255], [5, 5, 7]], dtype=np.uint8)


KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "segmentation": lambda t: t != 255,
    "normal": lambda t: t.norm(dim=1) > 0.5,
    "depth": lambda t: t[:, 0] > 0,
}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """The layout of the paper's code."""
    index: dict[str, Any] = {}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        index[split] = []
        for i in range(2):
            names = [f"{split}/{i}_{kind}" for kind in ("rgb.png", "seg.png", "n.png", "d.npy")]
            Image.fromarray(COLOURS + i).save(tmp_path / names[0])
            Image.fromarray(LABELS).save(tmp_path / names[1])
            Image.fromarray(NORMALS).save(tmp_path / names[2])
            np.save(tmp_path / names[3], DEPTH)
            index[split].append(names)
    (tmp_path / "nyu_v2_3task.json").write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """The layout of MTAN and LibMTL."""
    for split, count in (("train", 11), ("val", 2)):
        for kind in ("image", "label", "depth", "normal"):
            (tmp_path / split / kind).mkdir(parents=True)
        for i in range(count):
            labels = np.array([[0, 12, -1], [i, 3, 3]], dtype=np.float32)
            normals = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
            normals[0, 0] = (0.6, 0.0, -0.8)
            for kind, array in {
                "image": COLOURS / 255.0,
                "label": labels,
                "depth": DEPTH[..., None],
                "normal": normals,
            }.items():
                np.save(tmp_path / split / kind / f"{i}.npy", array)
    return tmp_path


@pytest.fixture
def taskonomy(tmp_path: Path) -> Path:
    index: dict[str, Any] = {}
    depth = np.array([[0, 999, 64_499], [64_500, 65_535, 7]], dtype=np.uint16)
    maps = {
        "keypoints": np.array([[0, 164, 327], [328, 400, 65_535]], dtype=np.uint16),
        "edges": np.array([[0, 2_621, 5_242], [5_243, 6_000, 65_535]], dtype=np.uint16),
    }
    labels = np.array([[0, 1, 17], [4, 4, 0]], dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        names = [f"{split}/0_{kind}.png" for kind in ("rgb", "seg", "n", "d", "k", "e")]
        images = [COLOURS, labels, NORMALS, depth, maps["keypoints"], maps["edges"]]
        for name, array in zip(names, images, strict=True):
            Image.fromarray(array).save(tmp_path / name)
        index[split] = [names]
    (tmp_path / "taskonomy.json").write_text(json.dumps(index))
    np.save(tmp_path / "semseg_prior_factor.npy", np.linspace(0.5, 2, 17))
    return tmp_path


def test_nyuv2_as_the_paper_reads_it(listed: Path) -> None:
    data = NYUv2(listed, "test")
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


def test_nyuv2_as_libmtl_has_it(arrays: Path) -> None:
    data = NYUv2(arrays, "train")
    assert (len(data), data.classes) == (11, 13)
    image, targets = data[10]  # by number, not by letter: 10 is the last
    assert targets["segmentation"].tolist() == [[0, 12, 255], [10, 3, 3]]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([0.0, 10.0, 20.0]) / 255)
    assert targets["depth"][0].tolist() == [[1.5, 2.0, 0.0], [0.5, 0.0, 4.0]]
    torch.testing.assert_close(targets["normal"][:, 0, 0], torch.tensor([0.6, 0.0, -0.8]))
    assert not targets["normal"][:, 1].any()
    assert len(NYUv2(arrays, "test")) == 2


def test_a_mirrored_normal_points_the_other_way(arrays: Path) -> None:
    _, targets = NYUv2(arrays, transform=RandomFlip(1.0))[0]
    torch.testing.assert_close(targets["normal"][:, 0, 2], torch.tensor([-0.6, 0.0, -0.8]))
    assert targets["segmentation"].tolist() == [[255, 12, 0], [3, 3, 0]]


def test_taskonomy_by_hand(taskonomy: Path) -> None:
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
    assert known.tolist() == [True, True, True, False, False, True]
    for task, most in (("keypoints", 0.005), ("edges", 0.08)):
        found = targets[task].flatten()
        assert found[0] == -1
        assert found[4] == found[5] == 1
        middle = {"keypoints": 164, "edges": 2_621}[task] / 2**16
        assert found[1].item() == pytest.approx(2 * middle / most - 1, abs=1e-6)
    torch.testing.assert_close(data.class_weights, torch.linspace(0.5, 2, 17))
    assert list(TinyTaskonomy(taskonomy, tasks=["edges", "depth"])[0][1]) == ["edges", "depth"]


def test_no_zoom_divides_the_logarithm_of_a_depth(taskonomy: Path) -> None:
    with pytest.raises(ValueError, match=r"logarithms of them; pass .* same_camera=False"):
        TinyTaskonomy(taskonomy, transform=RandomScaleCrop(2))
    plain = TinyTaskonomy(taskonomy)[0][1]["depth"]
    crop = RandomScaleCrop(2 * HEIGHT, scale=(2.0, 2.0), same_camera=False)
    zoomed = TinyTaskonomy(taskonomy, transform=crop)[0][1]["depth"]
    assert set(zoomed.unique().tolist()) <= set(plain.unique().tolist())


def test_the_tasks_take_what_the_data_sets_give(taskonomy: Path) -> None:
    """Also after a crop that pads: unknown pixels count in neither loss nor metric."""
    torch.manual_seed(0)
    crop = RandomScaleCrop(6, scale=(1.0, 1.0), same_camera=False)
    data = TinyTaskonomy(taskonomy, transform=crop)
    _, targets = data[0]
    tasks = {
        "segmentation": Segmentation(17, class_weights=data.class_weights),
        "normal": Normals(),
        "depth": Depth(),
        "keypoints": Map(),
        "edges": Map(),
    }
    channels = {"segmentation": 17, "normal": 3}
    for name, task in tasks.items():
        target = targets[name][None]
        prediction = torch.randn(1, channels.get(name, 1), 6, 6, requires_grad=True)
        loss = task.loss(prediction, target)
        loss.backward()
        reached = prediction.grad.abs().sum(1)[0] > 0
        known = KNOWN.get(name, lambda t: ~t[:, 0].isnan())(target)[0]
        assert torch.equal(reached, known)
        assert 0 < int(known.sum()) <= 6
        task.update(prediction.detach(), target)
        assert all(math.isfinite(value) for value in task.compute().values())


@pytest.mark.parametrize("size", [4, (4, 6)])
def test_examples_are_resized(listed: Path, size: Any) -> None:
    image, targets = NYUv2(listed, size=size)[0]
    shape = (size, size) if isinstance(size, int) else size
    assert image.shape[-2:] == shape
    assert all(target.shape[-2:] == shape for target in targets.values())
    # The nearest pixels: rows 0, 0, 1, 1, and columns 0, 1, 1, 2 or each twice.
    columns = [0, 1, 1, 2] if shape[1] == 4 else [0, 0, 1, 1, 2, 2]
    rows = [[[0, 39, 255], [5, 5, 7]][row] for row in (0, 0, 1, 1)]
    assert targets["segmentation"].tolist() == [[row[k] for k in columns] for row in rows]


def test_taskonomy_is_resized(taskonomy: Path) -> None:
    image, targets = TinyTaskonomy(taskonomy, size=(4, 6))[0]
    _, plain = TinyTaskonomy(taskonomy)[0]
    assert image.shape == (3, 4, 6)
    for task, target in targets.items():
        twice = plain[task].repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert torch.equal(target, twice)


def _without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def _index(change: Callable[[Any], Any], name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return write


def _cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def _header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _archive(root: Path) -> None:
    np.savez(root / "depth.npz", DEPTH)
    (root / "depth.npz").replace(root / "train/0_d.npy")


NYU_FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "file": (_without("train/1_d.npy"), FileNotFoundError, "1_d.npy does not exist: the depth of"),
    "key": (
        _index(lambda index: {"test": index["test"]}, "nyu_v2_3task.json"),
        ValueError,
        r"nyu_v2_3task.json has no key 'train'; it has \['test'\]",
    ),
    "row": (
        _index(lambda index: {"train": [["a.png"]]}, "nyu_v2_3task.json"),
        ValueError,
        "row 0 of 'train' must hold 4 file names .*found",
    ),
    "numbers": (
        _index(lambda index: {"train": [*index["train"], [1, 2, 3, 4]]}, "nyu_v2_3task.json"),
        ValueError,
        r"nyu_v2_3task.json: row 2 of 'train' must hold 4 file names .*found \[1, 2, 3, 4\]",
    ),
    "json": (
        lambda root: (root / "nyu_v2_3task.json").write_text("{"),
        ValueError,
        "nyu_v2_3task.json is not valid JSON",
    ),
    "text": (
        lambda root: (root / "nyu_v2_3task.json").write_bytes(b"\xff\xfe"),
        ValueError,
        "nyu_v2_3task.json is not valid JSON",
    ),
    "class": (
        lambda root: Image.fromarray(LABELS + 40).save(root / "train/0_seg.png"),
        ValueError,
        "0_seg.png must hold classes 0 to 39 or unknown pixels, found 40",
    ),
    "channels": (
        lambda root: Image.fromarray(LABELS).save(root / "train/0_n.png"),
        ValueError,
        r"0_n.png must be an image of 3 channel\(s\), found mode 'L'",
    ),
    "shape": (
        lambda root: np.save(root / "train/0_d.npy", DEPTH[0]),
        ValueError,
        r"0_d.npy must hold an array of shape \(H, W, 1\), found \(3,\)",
    ),
    "size": (
        lambda root: np.save(root / "train/0_d.npy", DEPTH.T),
        ValueError,
        r"train.0_d.npy is of \(3, 2\) pixels, its image .*train.0_rgb.png of \(2, 3\)",
    ),
    "array": (
        lambda root: (root / "train/0_d.npy").write_text("metres"),
        ValueError,
        "0_d.npy is no .npy file of numbers",
    ),
    "half a header": (
        lambda root: (root / "train/0_d.npy").write_bytes(_header(b"{'descr': ('<f4',\n")),
        ValueError,
        "0_d.npy is no .npy file of numbers",
    ),
    "nothing": (
        lambda root: (root / "train/0_d.npy").write_bytes(b""),
        ValueError,
        "0_d.npy is no .npy file of numbers",
    ),
    "archive": (
        _archive,
        ValueError,
        "0_d.npy is no .npy file of numbers",
    ),
    "words": (
        lambda root: np.save(root / "train/0_d.npy", np.array([["far", "near"]])),
        ValueError,
        "0_d.npy is no .npy file of numbers: its elements are of <U4",
    ),
    "no image": (
        lambda root: (root / "train/0_n.png").write_text("normals"),
        ValueError,
        "0_n.png is no image that can be read",
    ),
    "half an image": (
        lambda root: _cut(root / "train/0_n.png", -30),
        ValueError,
        "0_n.png is no image that can be read",
    ),
    "a broken image": (
        lambda root: _cut(root / "train/0_n.png", 12),
        ValueError,
        "0_n.png is no image that can be read",
    ),
}


@pytest.mark.parametrize("fault", NYU_FAULTS)
def test_faults_of_nyuv2_are_found_at_once(listed: Path, fault: str) -> None:
    break_it, error, match = NYU_FAULTS[fault]
    break_it(listed)
    with pytest.raises(error, match=match):
        NYUv2(listed)


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda root: np.save(root / name, change(np.load(root / name)))


def _set(value: float) -> Callable[[Any], Any]:
    """Changes the first number of an array."""

    def change(array: Any) -> Any:
        array.flat[0] = value
        return array

    return change


ARRAY_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "range": (
        _changed("train/image/0.npy", lambda image: np.float32(image * 255)),
        "image.0.npy must hold numbers from 0 to 1, found 0 to 170; divide .* by 255",
    ),
    "negative": (
        _changed("train/image/0.npy", lambda image: np.float32(image - 0.5)),
        r"image.0.npy must hold numbers from 0 to 1, found -0\.5 to 0\.1",
    ),
    "not finite": (
        _changed("train/image/0.npy", _set(math.nan)),
        "image.0.npy must hold numbers from 0 to 1, found nan",
    ),
    **{
        f"class {value}": (
            _changed("train/label/0.npy", _set(value)),
            rf"label.0.npy must hold classes 0 to 12 or unknown pixels, found {value:g}$",
        )
        for value in (2.7, 13.0, -2.0, math.nan, math.inf)
    },
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_faults_of_arrays_are_found_at_once(arrays: Path, fault: str) -> None:
    break_it, match = ARRAY_FAULTS[fault]
    break_it(arrays)
    with pytest.raises(ValueError, match=match):
        NYUv2(arrays)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_unknown(arrays: Path, value: float) -> None:
    """A NaN that a mask hides in the loss would still be in its gradient."""
    for kind in ("normal", "depth"):
        _changed(f"train/{kind}/0.npy", _set(value))(arrays)
    _, targets = NYUv2(arrays)[0]
    for name, task in {"normal": Normals(), "depth": Depth()}.items():
        target = targets[name][None]
        assert not target[..., 0, 0].any()
        assert target.isfinite().all()
        prediction = torch.ones_like(target, requires_grad=True)
        task.loss(prediction, target).backward()
        assert prediction.grad.isfinite().all()


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


TASKONOMY_FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "prior": (_without("semseg_prior_factor.npy"), FileNotFoundError, "the weight of each class"),
    "weights": (
        lambda root: np.save(root / "semseg_prior_factor.npy", np.ones(16)),
        ValueError,
        r"must hold 17 numbers, one a class, found the shape \(16,\)",
    ),
    **{
        f"weight {value}": (
            lambda root, value=value: np.save(root / "semseg_prior_factor.npy", np.full(17, value)),
            ValueError,
            f"semseg_prior_factor.npy must hold numbers of 0 or more, found {value:g}",
        )
        for value in (-1.0, math.nan, math.inf)
    },
    "unreadable": (
        lambda root: (root / "semseg_prior_factor.npy").write_text("weights"),
        ValueError,
        "semseg_prior_factor.npy is no .npy file of numbers",
    ),
    "index": (_without("taskonomy.json"), FileNotFoundError, "taskonomy.json does not exist"),
    "bits": (
        lambda root: Image.fromarray(LABELS).save(root / "train/0_d.png"),
        ValueError,
        "0_d.png must be an image of 16 bits, found mode 'L'",
    ),
    "size": (
        lambda root: Image.fromarray(np.ones((2, 4), np.uint16)).save(root / "train/0_d.png"),
        ValueError,
        r"train.0_d.png is of \(2, 4\) pixels, its image .*train.0_rgb.png of \(2, 3\)",
    ),
    "class": (
        lambda root: Image.fromarray(LABELS).save(root / "train/0_seg.png"),
        ValueError,
        r"0 \(unknown\) or a class plus one, up to 17, found 255",
    ),
}


@pytest.mark.parametrize("fault", TASKONOMY_FAULTS)
def test_faults_of_taskonomy_are_found_at_once(taskonomy: Path, fault: str) -> None:
    break_it, error, match = TASKONOMY_FAULTS[fault]
    break_it(taskonomy)
    with pytest.raises(error, match=match):
        TinyTaskonomy(taskonomy)


def test_unknown_tasks_of_taskonomy(taskonomy: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks must be names out of .* got \['shading'\]"):
        TinyTaskonomy(taskonomy, tasks=["shading"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("layout", "channels"),
    [
        ("listed", {"segmentation": 40, "depth": 1, "normal": 3}),
        ("arrays", {"segmentation": 13, "depth": 1, "normal": 3}),
        ("taskonomy", {"segmentation": 17, "depth": 1, "normal": 3, "keypoints": 1, "edges": 1}),
    ],
)
def test_the_benchmark_takes_what_folders_hold(
    layout: str, channels: dict[str, int], workers: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    problem = paper_problem("resnet34", str(folder), size=4, workers=workers)
    train, test = problem.load()
    assert problem.name == f"paper/resnet34/{folder}"
    tasks = problem.make_tasks()
    assert list(tasks) == list(channels)
    for inputs, targets in (next(iter(train.shuffled(1, 0))), next(iter(test.in_order(1)))):
        assert inputs.shape[:2] == (1, 3)
        for name, task in tasks.items():
            prediction = torch.rand(1, channels[name], *inputs.shape[-2:])
            assert task.loss(prediction, targets[name]).isfinite()
            task.update(prediction, targets[name])
    with torch.device("meta"):
        model = problem.make_model()
        shapes = {name: out.shape[1] for name, out in model(torch.zeros(1, 3, 33, 33)).items()}
    assert shapes == channels


@pytest.mark.parametrize("layout", ["listed", "taskonomy"])
def test_the_benchmark_trains_on_folders(
    layout: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = functools.partial(paper_scale.ASPPHead, hidden=8)
    monkeypatch.setattr(paper_scale, "ASPPHead", narrow)
    folder = request.getfixturevalue(layout)
    (index,) = folder.glob("*.json")
    rows = json.loads(index.read_text())
    index.write_text(json.dumps({split: own * 2 for split, own in rows.items()}))
    problem = paper_problem("mobilenetv2", str(folder), size=33, workers=0)
    short = dataclasses.replace(problem, steps=3, batch=2)
    line = run(short, "AdapMTL", 0.9, seed=0, bf16=True)
    assert line["zeros"] == round(0.9 * line["weights"])
    assert list(line["metrics"]) == list(problem.make_tasks())
