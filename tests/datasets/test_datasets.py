"""Rooms against plain geometry in float64, and the digits' protocol."""

from __future__ import annotations

import copy
import math
import pickle
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from torch_adapmtl.datasets import MultiDigits, Rooms
from torch_adapmtl.datasets._random import bell_triples, mix, rough_uniform, uniform

ALL = ("segmentation", "depth", "normal", "edges", "keypoints")
SCENES = 24
BOXES = range(3)
SPHERES = range(3, 6)


@cache
def rooms(image_size: int | tuple[int, int] = (48, 60)) -> Rooms:
    return Rooms(SCENES, image_size=image_size, tasks=ALL, seed=5)


@cache
def rendered(image_size: int | tuple[int, int] = (48, 60)) -> tuple[Tensor, dict[str, Tensor]]:
    return rooms(image_size).render(range(SCENES))


# --- a plain description of the scenes, in float64 ---------------------------------------------


class Plain:
    """One scene, with the questions that an oracle asks of it."""

    def __init__(self, index: int, height: int, width: int) -> None:
        scene = rooms().scenes([index])
        self.room = scene.room[0].double()
        self.camera = scene.camera[0].double()
        self.rotation = scene.rotation[0].double()
        self.focal = float(scene.focal(height, width)[0])
        self.centre = scene.centre[0].double()
        self.half = scene.half[0].double()
        self.yaw = scene.yaw[0].double()
        self.present = scene.present[0].tolist()
        self.height, self.width = height, width

    def rays(self) -> Tensor:
        """`(H, W, 3)` in the camera frame, at depth 1."""
        y, x = torch.meshgrid(
            torch.arange(self.height).double(), torch.arange(self.width).double(), indexing="ij"
        )
        x = (x + 0.5 - self.width / 2) / self.focal
        y = (y + 0.5 - self.height / 2) / self.focal
        return torch.stack([x, y, torch.ones_like(x)], dim=-1)

    def to_world(self, points: Tensor) -> Tensor:
        return points @ self.rotation + self.camera

    def in_box(self, index: int, points: Tensor) -> Tensor:
        """Points in the axes of a box, in units of its half sizes."""
        cos, sin = self.yaw[index]
        x, y, z = (points - self.centre[index]).unbind(-1)
        return torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1) / self.half[index]

    def faces(self, points: Tensor) -> Tensor:
        """Distances to every face, `(..., faces)`: floor, ceiling, 4 walls, then the objects."""
        x, y, z = points.unbind(-1)
        width, depth, height = self.room
        distances = [z.abs(), (z - height).abs()]
        distances += [(x + side * width / 2).abs() for side in (-1, 1)]
        distances += [(y + side * depth / 2).abs() for side in (-1, 1)]
        for index in BOXES:
            local = self.in_box(index, points)
            for axis in range(3):
                others = [k for k in range(3) if k != axis]
                for side in (-1, 1):
                    beside = ((local[..., axis] - side) * self.half[index][axis]).abs()
                    over = ((local[..., others].abs() - 1) * self.half[index][others]).clamp(min=0)
                    distances.append(beside + over.sum(-1))
        for index in SPHERES:
            radius = (points - self.centre[index]).norm(dim=-1)
            distances.append((radius - self.half[index][0]).abs())
        return torch.stack(distances, dim=-1)

    def inside_an_object(self, points: Tensor, margin: float) -> Tensor:
        """Whether points are deeper than `margin` metres inside some object."""
        inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
        for index in BOXES:
            depth = (1 - self.in_box(index, points).abs()) * self.half[index]
            inside |= depth.amin(-1) > margin
        for index in SPHERES:
            distance = (points - self.centre[index]).norm(dim=-1)
            inside |= distance < self.half[index][0] - margin
        return inside


CLASS_OF_FACE = torch.tensor([0, 1, 2, 2, 2, 2] + [3] * 18 + [4] * 3)


def plain(index: int) -> tuple[Plain, dict[str, Tensor]]:
    _, targets = rendered()
    own = {task: target[index] for task, target in targets.items()}
    return Plain(index, *own["depth"].shape[-2:]), own


every_scene = pytest.mark.parametrize("index", range(0, SCENES, 2))


@every_scene
def test_depth_ends_on_the_surface_that_the_segmentation_names(index: int) -> None:
    scene, targets = plain(index)
    points = scene.to_world(scene.rays() * targets["depth"][0].double()[..., None])
    distance = scene.faces(points)
    named = targets["segmentation"][..., None] == CLASS_OF_FACE
    assert distance[named].view(-1).isfinite().all()
    nearest = torch.where(named, distance, math.inf).amin(-1)
    assert nearest.max() < 5e-4  # metres


@every_scene
def test_nothing_is_before_the_surface(index: int) -> None:
    scene, targets = plain(index)
    rays = scene.rays() * targets["depth"][0].double()[..., None]
    for part in torch.linspace(0, 1, 60).tolist():
        points = scene.to_world(rays * part)
        assert not scene.inside_an_object(points, margin=1e-3).any()
        x, y, z = points.unbind(-1)
        width, depth, height = scene.room + 1e-4
        assert (x.abs() <= width / 2).all()
        assert (y.abs() <= depth / 2).all()
        assert ((z >= -1e-4) & (z <= height)).all()


@every_scene
def test_normals_are_unit_and_face_the_camera(index: int) -> None:
    scene, targets = plain(index)
    normal = targets["normal"].double().permute(1, 2, 0)
    torch.testing.assert_close(
        normal.norm(dim=-1), torch.ones_like(normal[..., 0]), atol=1e-5, rtol=0
    )
    assert ((normal * scene.rays()).sum(-1) < 1e-6).all()


def from_differences(points: Tensor) -> Tensor:
    """Unit normals of a map of points `(H, W, 3)`, by central differences; borders missing."""
    du = points[1:-1, 2:] - points[1:-1, :-2]
    dv = points[2:, 1:-1] - points[:-2, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(dv, du), dim=-1)


def smooth(edges: Tensor) -> Tensor:
    """Inner pixels whose 4-neighbours lie on the same surface, from an edge map `(H, W)`."""
    return edges[1:-1, 1:-1] == 0


def angles(a: Tensor, b: Tensor) -> Tensor:
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)))


@every_scene
def test_normals_are_those_of_the_depth(index: int) -> None:
    scene, targets = plain(index)
    points = scene.rays() * targets["depth"][0].double()[..., None]
    error = angles(
        from_differences(points), targets["normal"].double().permute(1, 2, 0)[1:-1, 1:-1]
    )
    keep = smooth(targets["edges"][0])
    flat = keep & (targets["segmentation"][1:-1, 1:-1] != 4)
    assert flat.sum() > 500
    assert error[flat].max() < 0.5  # degrees; float32 depth
    curved = keep & ~flat
    if curved.sum() > 20:
        assert error[curved].median() < 4  # differences across a pixel of a small sphere


@every_scene
def test_edges_are_where_neighbours_lie_on_different_faces(index: int) -> None:
    scene, targets = plain(index)
    points = scene.to_world(scene.rays() * targets["depth"][0].double()[..., None])
    face = scene.faces(points).argmin(-1)
    expected = torch.zeros(face.shape)
    for row in range(scene.height):
        for column in range(scene.width):
            for r, c in (
                (row, column + 1),
                (row, column - 1),
                (row + 1, column),
                (row - 1, column),
            ):
                if (
                    0 <= r < scene.height
                    and 0 <= c < scene.width
                    and face[r, c] != face[row, column]
                ):
                    expected[row, column] = 1
    # A pixel on the line where two faces meet is on both, so the nearest one is a toss-up.
    assert (expected != targets["edges"][0]).float().mean() < 0.002


@every_scene
def test_keypoints_are_the_visible_corners_and_centres(index: int) -> None:
    scene, targets = plain(index)
    points, own = [], []
    for box in BOXES:
        cos, sin = scene.yaw[box]
        for corner in range(8):
            x, y, z = (scene.half[box][k] * (1 if corner >> k & 1 else -1) for k in range(3))
            offset = torch.stack([cos * x - sin * y, sin * x + cos * y, z])
            points.append(scene.centre[box] + offset)
            own.append(None)
            if not scene.present[box]:
                points.pop(), own.pop()
    for sphere in SPHERES:
        if scene.present[sphere]:
            points.append(scene.centre[sphere])
            own.append(sphere)
    v, u = torch.meshgrid(
        torch.arange(scene.height) + 0.5, torch.arange(scene.width) + 0.5, indexing="ij"
    )
    expected = torch.zeros(scene.height, scene.width, dtype=torch.float64)
    radius = 0.06 * min(scene.height, scene.width)
    for point, sphere in zip(points, own, strict=True):
        x, y, z = scene.rotation @ (point - scene.camera)
        if z < 0.05:
            continue
        column, row = x / z * scene.focal + scene.width / 2, y / z * scene.focal + scene.height / 2
        if not (0 <= column < scene.width and 0 <= row < scene.height):
            continue
        if sphere is None:
            last = 0.998
        else:  # up to where the ray enters the sphere
            last = 1 - float(scene.half[sphere][0] / (point - scene.camera).norm()) - 0.002
        parts = torch.linspace(0, last, 800).double()[:, None]
        if scene.inside_an_object(scene.camera + parts * (point - scene.camera), 2e-3).any():
            continue
        squared = (u - column) ** 2 + (v - row) ** 2
        expected = torch.maximum(expected, (1 - squared / radius**2).clamp(min=0) ** 2)
    wrong = (expected - targets["keypoints"][0]).abs() > 1e-3
    # A corner that just touches a silhouette may fall either way.
    assert wrong.float().mean() < 0.01


def test_what_the_images_and_targets_look_like() -> None:
    images, targets = rendered()
    assert images.shape == (SCENES, 3, 48, 60)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.3 < images.mean() < 0.7
    assert targets["segmentation"].shape == (SCENES, 48, 60)
    assert targets["segmentation"].dtype == torch.int64
    share = torch.bincount(targets["segmentation"].flatten(), minlength=5) / (SCENES * 48 * 60)
    assert share.min() > 0.02  # every class is there to be learned
    for task, channels in (("depth", 1), ("normal", 3), ("edges", 1), ("keypoints", 1)):
        assert targets[task].shape == (SCENES, channels, 48, 60)
        assert targets[task].dtype == torch.float32
        assert targets[task].isfinite().all()
    assert targets["depth"].min() > 0.1
    assert targets["depth"].max() < 9
    assert set(targets["edges"].unique().tolist()) == {0.0, 1.0}
    assert targets["keypoints"].min() == 0
    assert 0.5 < targets["keypoints"].max() <= 1
    assert rooms().channels == {
        "segmentation": 5,
        "depth": 1,
        "normal": 3,
        "edges": 1,
        "keypoints": 1,
    }


def test_objects_do_not_overlap_and_stand_in_the_room() -> None:
    scenes = Rooms(300, seed=1).scenes(range(300))
    radius = torch.where(
        torch.arange(6) < 3, scenes.half[..., :2].norm(dim=-1), scenes.half[..., 0]
    )
    for first in range(6):
        reach = scenes.centre[:, first, :2].abs() + radius[:, first, None]
        assert (reach <= scenes.room[:, :2] / 2 + 1e-4).all()
        # The camera stays outside of everything.
        away = (scenes.centre[:, first, :2] - scenes.camera[:, :2]).norm(dim=-1)
        assert (away > radius[:, first]).all()
        for second in range(first):
            apart = (scenes.centre[:, first] - scenes.centre[:, second])[:, :2].norm(dim=-1)
            assert (apart >= radius[:, first] + radius[:, second] - 1e-4).all()
    bottom = (scenes.centre - scenes.half)[..., 2]
    assert bottom[scenes.present].abs().max() < 1e-6
    torch.testing.assert_close(
        scenes.rotation @ scenes.rotation.mT, torch.eye(3).expand(300, 3, 3), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(scenes.rotation), torch.ones(300))
    assert 0.75 < scenes.present.float().mean() < 0.95


@settings(max_examples=15)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=20), st.sampled_from([8, 17, 33]))
def test_a_scene_does_not_depend_on_its_batch(indices: list[int], image_size: int) -> None:
    data = Rooms(40, image_size=image_size, tasks=ALL, seed=3)
    images, targets = data.render(indices)
    for place, index in enumerate(indices[:5]):
        image, own = data[index]
        assert torch.equal(images[place], image)
        for task in ALL:
            assert torch.equal(targets[task][place], own[task])


def test_a_scene_does_not_depend_on_the_chunk_or_the_size_of_the_set() -> None:
    images, _ = Rooms(2000, image_size=64).render(range(37))  # several chunks, the last short
    again, _ = Rooms(36, image_size=64).render([35, 0, 20])
    assert torch.equal(again, images[[35, 0, 20]])
    assert len(images.flatten(1).unique(dim=0)) == 37


def test_scenes_are_the_same_at_every_image_size_and_differ_between_seeds() -> None:
    small, large = Rooms(4, image_size=8).scenes([2]), Rooms(9, image_size=96).scenes([2])
    other = Rooms(4, seed=1).scenes([2])
    assert torch.equal(small.camera, large.camera)
    assert not torch.equal(small.camera, other.camera)
    # The middle ray of images with odd sides is the same ray.
    depths = [
        Rooms(4, image_size=s, tasks=("depth",))[2][1]["depth"][0, s // 2, s // 2] for s in (9, 27)
    ]
    torch.testing.assert_close(*depths)


def test_shadows_and_noise() -> None:
    plain_, lit, quiet = (
        Rooms(4, seed=2, **options).render(range(4))[0]  # type: ignore[arg-type]
        for options in ({}, {"shadows": False}, {"noise": 0.0})
    )
    assert (lit - plain_).min() > -1e-6  # shadows only darken
    assert ((lit - plain_) > 0.05).float().mean() > 0.01
    difference = (plain_ - quiet)[(quiet > 0.1) & (quiet < 0.9)]
    assert abs(float(difference.std()) - 0.03) < 0.001
    assert abs(float(difference.mean())) < 0.001


def test_rooms_as_a_dataset() -> None:
    data = Rooms(10, image_size=16, tasks=("depth", "segmentation"))
    image, targets = data[-1]
    assert list(targets) == ["depth", "segmentation"]
    assert torch.equal(image, data[9][0])
    with pytest.raises(IndexError, match="index 10 is out of range: there are 10 scenes"):
        data[10]
    with pytest.raises(IndexError, match="index -11 is out of range"):
        data.render(torch.tensor([-11]))
    assert len(list(data)) == len(data) == 10  # type: ignore[call-overload]
    batches = list(DataLoader(data, batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    everything, all_targets = data.tensors()
    assert torch.equal(torch.cat([images for images, _ in batches]), everything)
    assert data.tensors()[0] is everything
    for copied in (data, copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(copied[-1][0], image)
        assert torch.equal(copied[3][1]["depth"], all_targets["depth"][3])
    images, targets = data.render([])
    assert images.shape == (0, 3, 16, 16)
    assert targets["depth"].shape == (0, 1, 16, 16)


def test_errors_of_rooms() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Rooms(0)
    with pytest.raises(ValueError, match=r"image_size must be at least 1, got \(4, 0\)"):
        Rooms(1, image_size=(4, 0))
    with pytest.raises(ValueError, match="noise must not be negative, got -1"):
        Rooms(1, noise=-1)
    for tasks in (("depth", "colour"), (), ("depth", "depth"), "depth"):
        with pytest.raises(ValueError, match="tasks must be different names out of"):
            Rooms(1, tasks=tasks)


@pytest.mark.gpu
def test_rooms_on_a_gpu() -> None:
    here, there = (Rooms(20, tasks=ALL, device=device).tensors() for device in ("cpu", "cuda"))
    assert there[0].device.type == "cuda"
    for task in ALL:
        differs = (here[1][task] - there[1][task].cpu()).abs() > 1e-4
        assert differs.float().mean() < 1e-3
    assert ((here[0] - there[0].cpu()).abs() > 1e-3).float().mean() < 1e-2


# --- random numbers ----------------------------------------------------------------------------


def mix_plainly(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_mix_is_splitmix64(values: list[int]) -> None:
    mixed = mix(torch.tensor(values)).tolist()
    assert [m % 2**64 for m in mixed] == [mix_plainly(v) for v in values]
    expected = [(mix_plainly(v) >> 40) / 2**24 for v in values]
    assert uniform(torch.tensor(values)).tolist() == expected


def test_random_numbers_have_the_distribution_they_claim() -> None:
    keys = torch.arange(200_000)
    for values in (uniform(keys), rough_uniform(keys)):
        assert values.min() >= 0
        assert values.max() < 1
        shares = torch.histc(values, 20, 0, 1) / len(keys)
        assert (shares - 0.05).abs().max() < 0.003
        lagged = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert abs(float(lagged)) < 0.01
    bells = bell_triples(keys)
    assert bells.shape == (3, 200_000)
    assert bells.mean(1).abs().max() < 0.01
    torch.testing.assert_close(torch.cov(bells), torch.eye(3), atol=0.01, rtol=0)
    assert bells.abs().max() < 3.4


# --- digits ------------------------------------------------------------------------------------


@cache
def digits(split: str) -> MultiDigits:
    return MultiDigits(split, size=300, seed=4)


def compose_plainly(data: MultiDigits, index: int) -> list[tuple[Tensor, int, tuple[int, int]]]:
    """The scan, class and corner of both digits, found by trying all of them."""
    image = data[index][0][0]
    size, slack = 20, 4
    found = []
    for scans, places in ((data._scans, range(slack + 1)), (data._scans, range(8, 8 + slack + 1))):
        candidates = []
        for top in places:
            for left in places:
                window = image[top : top + size, left : left + size]
                over = (scans - window).clamp(min=0).amax((1, 2))  # nothing brighter than image
                for scan in torch.nonzero(over == 0).flatten().tolist():
                    candidates.append((scan, (top, left)))
        found.append(candidates)
    pairs = []
    for first, at in found[0]:
        for second, there in found[1]:
            canvas = torch.zeros(2, 32, 32)
            canvas[0, at[0] : at[0] + size, at[1] : at[1] + size] = data._scans[first]
            canvas[1, there[0] : there[0] + size, there[1] : there[1] + size] = data._scans[second]
            if torch.equal(canvas.amax(0), image):
                pairs.append((first, second, at, there))
    return pairs  # type: ignore[return-value]


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_two_scans_and_the_targets_describe_them(split: str) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    data = digits(split)
    for index in range(6):
        targets = data[index][1]
        matches = compose_plainly(data, index)
        assert matches
        for first, second, at, there in matches:  # type: ignore[misc]
            assert labels[data.sources[first]] == targets["left"]
            assert labels[data.sources[second]] == targets["right"]
            apart = math.dist(at, there)
            low, high = 4 * math.sqrt(2), 12 * math.sqrt(2)
            assert float(targets["distance"]) == pytest.approx((apart - low) / (high - low))


def test_train_and_test_digits_share_no_scan() -> None:
    train, test = digits("train"), digits("test")
    assert not set(train.sources) & set(test.sources)
    assert len(train.sources) + len(test.sources) == 1797
    both = torch.cat([train._scans, test._scans]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # nor the same picture under two numbers
    assert len(train._scans) == 1347
    images = torch.cat([train.tensors()[0], test.tensors()[0]]).flatten(1)
    assert len(images.unique(dim=0)) == 600


def test_digits_look_as_they_should() -> None:
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
    # The tasks are separate questions.
    table = torch.stack([targets["left"].float(), targets["right"].float(), distance[:, 0]])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 0.08


@settings(max_examples=20)
@given(st.lists(st.integers(-300, 299), max_size=12))
def test_a_pair_of_digits_does_not_depend_on_its_batch(indices: list[int]) -> None:
    data = digits("test")
    images, targets = data.render(indices)
    assert len(images) == len(indices)
    for place, index in enumerate(indices):
        image, own = data[index]
        assert torch.equal(images[place], image)
        assert all(torch.equal(targets[task][place], own[task]) for task in data.tasks)


def test_options_of_digits() -> None:
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


def test_errors_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[examples\]"'):
        MultiDigits()
