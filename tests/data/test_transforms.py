"""Augmentations of an image and its targets: geometry, padding, random numbers, errors."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_adapmtl.datasets import IGNORE, KINDS, RandomFlip, RandomScaleCrop, Rooms

ALL = ("segmentation", "depth", "normal", "edges", "keypoints")
SIZE = 48


@cache
def example(index: int) -> tuple[Tensor, dict[str, Tensor], float]:
    """A room and its focal length in pixels."""
    data = Rooms(8, image_size=SIZE, tasks=ALL, seed=11)
    image, targets = data[index]
    return image, targets, float(data.scenes([index]).focal(SIZE, SIZE)[0])


def normals_of(depth: Tensor, columns: Tensor, rows: Tensor, focal: float) -> Tensor:
    """Normals of a depth map by central differences, `(H - 2, W - 2, 3)`.

    `columns` and `rows` are the pixels' coordinates from the principal point.
    """
    z = depth.double()
    points = torch.stack(
        [columns.expand_as(z) / focal * z, rows[:, None].expand_as(z) / focal * z, z], dim=-1
    )
    du = points[1:-1, 2:] - points[1:-1, :-2]
    dv = points[2:, 1:-1] - points[:-2, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(dv, du), dim=-1)


def worst_angle(targets: dict[str, Tensor], expected: Tensor) -> float:
    """The largest angle in degrees between the normals and those expected on flat surfaces."""
    segmentation, edges = targets["segmentation"], targets["edges"][0]
    inner = edges.clone()
    inner[1:] = torch.maximum(inner[1:], edges[:-1])
    inner[:-1] = torch.maximum(inner[:-1], edges[1:])
    inner[:, 1:] = torch.maximum(inner[:, 1:], edges[:, :-1])
    inner[:, :-1] = torch.maximum(inner[:, :-1], edges[:, 1:])
    keep = (inner[1:-1, 1:-1] == 0) & (segmentation[1:-1, 1:-1] < 4)
    assert keep.sum() > 30
    normal = targets["normal"].double().permute(1, 2, 0)[1:-1, 1:-1]
    cross = torch.linalg.cross(normal, expected).norm(dim=-1)
    angle = torch.rad2deg(torch.atan2(cross, (normal * expected).sum(-1)))
    return float(angle[keep].max())


def centred(size: int) -> Tensor:
    return torch.arange(size).double() + 0.5 - size / 2


@pytest.mark.parametrize("index", range(4))
def test_normals_of_a_flipped_room_are_those_of_its_depth(index: int) -> None:
    image, targets, focal = example(index)
    mirrored, flipped = RandomFlip(1.0)(image, targets)
    assert torch.equal(mirrored, image.flip(2))
    for task in ("segmentation", "depth", "edges", "keypoints"):
        assert torch.equal(flipped[task], targets[task].flip(-1))
    expected = normals_of(flipped["depth"][0], centred(SIZE), centred(SIZE), focal)
    assert worst_angle(flipped, expected) < 0.5
    # Without the change of sign they would not be.
    unsigned = {**flipped, "normal": targets["normal"].flip(-1)}
    assert worst_angle(unsigned, expected) > 10


def test_flipping_twice_is_the_identity() -> None:
    image, targets, _ = example(0)
    flip = RandomFlip(1.0)
    again, back = flip(*flip(image, targets))
    assert torch.equal(again, image)
    assert all(torch.equal(back[task], targets[task]) for task in ALL)


def test_arguments_are_not_changed() -> None:
    image, targets, _ = example(1)
    image_before, targets_before = image.clone(), copy.deepcopy(targets)
    for transform in (RandomFlip(1.0), RandomScaleCrop(30)):
        transform(image, targets)
        assert torch.equal(image, image_before)
        assert all(torch.equal(targets[task], targets_before[task]) for task in ALL)


def test_the_share_of_flips_follows_p() -> None:
    for p, count, low, high in [(0.0, 100, 0, 0), (0.3, 1500, 0.25, 0.35), (1.0, 100, 1, 1)]:
        flipped, _ = RandomFlip(p)(torch.arange(2.0).expand(count, 1, 1, 2), {})
        assert low <= float(flipped[:, 0, 0, 0].mean()) <= high


def test_depth_and_normals_follow_the_zoom_in_whole_pixels() -> None:
    # 10 x 16 pixels at 0.53 are 5 x 8 (0.5 and 0.5); at 0.63 they are 6 x 10 (0.6 and 0.625)
    depth, slope = torch.full((1, 10, 16), 3.0), torch.tensor([0.48, 0.36, -0.8])
    targets = {"depth": depth, "normal": slope[:, None, None].expand(3, 10, 16)}
    for zoom, size, (down, across) in [(0.53, (5, 8), (0.5, 0.5)), (0.63, (6, 10), (0.6, 0.625))]:
        _, out = RandomScaleCrop(size, scale=(zoom, zoom))(torch.zeros(3, 10, 16), targets)
        torch.testing.assert_close(out["depth"], torch.full((1, *size), 3.0 / across))
        # The plane z = z0 + 0.6 x + 0.45 y, compressed to (x, y down / across, z / across).
        normal = torch.tensor([0.6 / across, 0.45 / down, -1.0])
        expected = (normal / normal.norm())[:, None, None].expand(3, *size)
        torch.testing.assert_close(out["normal"], expected)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_zoomed_rooms_stay_consistent(index: int, zoom: float) -> None:
    image, targets, focal = example(index)
    size = round(SIZE * zoom)
    zoomed_image, zoomed = RandomScaleCrop(size, scale=(zoom, zoom))(image, targets)
    assert zoomed_image.shape == (3, size, size)
    assert zoomed["normal"].norm(dim=0).sub(1).abs().max() < 1e-5
    # The source pixels of the new image, as coordinates in it. Where it holds a source pixel twice,
    # only the first is used.
    taken = ((torch.arange(size) + 0.5) / zoom).long()
    step = max(1, round(zoom))
    positions = (taken[::step].double() + 0.5) * zoom - size / 2
    thinned = {task: target[..., ::step, ::step] for task, target in zoomed.items()}
    expected = normals_of(thinned["depth"][0], positions, positions, focal)  # the same camera
    assert worst_angle(thinned, expected) < 0.5
    # With the depth divided and the normals unchanged, the two do not agree.
    unchanged = {**thinned, "normal": targets["normal"][:, taken][:, :, taken][:, ::step, ::step]}
    assert worst_angle(unchanged, expected) > 5
    source = targets["depth"][0][taken][:, taken]
    torch.testing.assert_close(zoomed["depth"][0], source / zoom)

    _, other_camera = RandomScaleCrop(size, scale=(zoom, zoom), same_camera=False)(image, targets)
    assert torch.equal(other_camera["depth"][0], source)
    assert torch.equal(other_camera["normal"], targets["normal"][:, taken][:, :, taken])
    for task in ("segmentation", "edges", "keypoints"):
        assert torch.equal(other_camera[task], zoomed[task])
        assert torch.equal(other_camera[task], targets[task][..., taken, :][..., taken])


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(1, 25),
    st.sampled_from([0.3, 0.5, 1.0, 1.3, 2.0]),
    st.integers(0, 2**31),
)
def test_crops_have_the_requested_size_and_padding_is_unknown(
    height: int, width: int, crop_height: int, crop_width: int, zoom: float, seed: int
) -> None:
    image = torch.rand(3, height, width) + 1
    targets = {
        "segmentation": torch.randint(0, 5, (height, width)),
        "depth": torch.rand(1, height, width) + 1,
        "normal": torch.nn.functional.normalize(torch.randn(3, height, width), dim=0),
        "edges": torch.rand(1, height, width),
    }
    crop = RandomScaleCrop((crop_height, crop_width), scale=(zoom, zoom))
    out, cut = crop(image, targets, torch.Generator().manual_seed(seed))
    assert out.shape == (3, crop_height, crop_width)
    inside = out.amin(0) > 0.5
    scaled_height, scaled_width = max(1, round(height * zoom)), max(1, round(width * zoom))
    assert inside.sum() == min(scaled_height, crop_height) * min(scaled_width, crop_width)
    assert torch.equal(cut["segmentation"] != IGNORE["labels"], inside)
    assert torch.equal(cut["depth"][0] > IGNORE["depth"], inside)
    assert torch.equal(cut["normal"].norm(dim=0) > 0.5, inside)
    assert torch.equal(~cut["edges"][0].isnan(), inside)
    seen = set(cut["segmentation"][inside].tolist())
    assert seen <= set(targets["segmentation"].flatten().tolist())


def test_a_crop_without_zoom_is_a_window() -> None:
    image, targets = torch.rand(3, 20, 20), {"segmentation": torch.randint(5, (20, 20))}
    crop = RandomScaleCrop(8, scale=(1.0, 1.0))
    windows = image.unfold(1, 8, 1).unfold(2, 8, 1)
    positions = set()
    for seed in range(40):
        out, cut = crop(image, targets, torch.Generator().manual_seed(seed))
        same = (windows - out[:, None, None]).abs().amax((0, 3, 4)) < 1e-5
        assert same.sum() == 1
        top, left = (int(k) for k in same.nonzero()[0])
        assert torch.equal(
            cut["segmentation"], targets["segmentation"][top : top + 8, left : left + 8]
        )
        positions.add((top, left))
    assert len(positions) > 30


@pytest.mark.parametrize("size", [2, 6])
def test_every_position_of_the_crop_and_of_the_padding_occurs(size: int) -> None:
    image = torch.arange(1.0, 17.0).view(1, 4, 4)
    positions = set()
    for seed in range(200):
        crop = RandomScaleCrop(size, scale=(1.0, 1.0))
        out, _ = crop(image, {}, torch.Generator().manual_seed(seed))
        top, left = (int(k) for k in (out[0] > 0).nonzero()[0])
        positions.add((top, left, int(out[0, top, left])))
    corners = [1, 2, 3, 5, 6, 7, 9, 10, 11]  # those of a window of 2 in the picture
    wanted = {(0, 0, corner) for corner in corners} if size == 2 else set()
    assert positions == (wanted or {(top, left, 1) for top in range(3) for left in range(3)})


def test_zooms_are_uniform_and_positions_do_not_depend_on_them() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.arange(100.0).expand(1, 100, 100)  # as a depth, which the zoom divides
    zooms, shares = [], []
    for _ in range(400):
        image, targets = torch.ones(1, 100, 100), {"depth": columns.clone() + 1}
        _, out = RandomScaleCrop(50)(image, targets, generator)  # at least 50 pixels: no padding
        steps = out["depth"][0, 0].diff()  # 1 / zoom columns, divided by the zoom
        zooms.append(1 / (float(steps.mean())) ** 0.5)
        spare = round(100 * zooms[-1]) - 50
        # The crop's first column in the zoomed image.
        first = float(out["depth"][0, 0, 0]) * zooms[-1] * zooms[-1]
        shares.append(first / max(spare, 1))
    zoom, share = torch.tensor(zooms), torch.tensor(shares)
    assert 0.49 < zoom.min() < 0.53
    assert 1.47 < zoom.max() < 1.52
    assert zoom.mean() == pytest.approx(1.0, abs=0.05)
    assert zoom.std() == pytest.approx(12**-0.5, abs=0.03)
    wide = zoom > 0.7
    assert torch.corrcoef(torch.stack([zoom[wide], share[wide]]))[0, 1].abs() < 0.2


def test_zoomed_images_are_aligned_at_pixel_centres_and_smoothed() -> None:
    ramp = torch.arange(16.0).expand(1, 16, 16)
    out, _ = RandomScaleCrop(32, scale=(2.0, 2.0))(ramp, {})
    torch.testing.assert_close(out[0, 0, 2:-2], (torch.arange(2, 30) + 0.5) / 2 - 0.5)
    stripes = (torch.arange(32) % 4 == 0).float().expand(1, 32, 32)
    out, _ = RandomScaleCrop(8, scale=(0.25, 0.25))(stripes, {})
    torch.testing.assert_close(out[0, :, 2:-2], torch.full((8, 4), 0.25), atol=0.1, rtol=0)


def test_unknown_pixels_stay_unknown() -> None:
    image, targets, _ = example(3)
    targets = {task: target.clone() for task, target in targets.items()}
    targets["segmentation"][:10] = 255
    targets["depth"][:, :10] = 0
    targets["normal"][:, :10] = 0
    for transform in (RandomFlip(1.0), RandomScaleCrop(SIZE, scale=(1.0, 1.0))):
        _, out = transform(image, targets)
        assert (out["segmentation"][:10] == 255).all()
        assert (out["depth"][:, :10] == 0).all()
        assert (out["normal"][:, :10] == 0).all()
        assert out["normal"].isfinite().all()


@pytest.mark.parametrize("transform", [RandomFlip(), RandomScaleCrop((30, 26))])
def test_results_follow_the_generator_and_a_batch_equals_its_examples(
    transform: RandomFlip | RandomScaleCrop,
) -> None:
    images, targets = Rooms(8, image_size=SIZE, tasks=ALL).tensors()
    out, cut = transform(images, targets, torch.Generator().manual_seed(3))
    again, _ = transform(images, targets, torch.Generator().manual_seed(3))
    other, _ = transform(images, targets, torch.Generator().manual_seed(4))
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    generator = torch.Generator().manual_seed(3)
    for i in range(8):
        alone, alone_targets = transform(images[i], {t: targets[t][i] for t in ALL}, generator)
        assert torch.equal(out[i], alone)
        for task in ALL:
            torch.testing.assert_close(
                cut[task][i], alone_targets[task], rtol=0, atol=0, equal_nan=True
            )
    torch.manual_seed(0)
    first, _ = transform(images, targets)
    torch.manual_seed(0)
    assert torch.equal(first, transform(images, targets)[0])


def test_kinds_of_further_tasks() -> None:
    image = torch.rand(3, 4, 6)
    targets = {
        "parts": torch.randint(0, 3, (4, 6)),
        "shading": torch.rand(1, 4, 6),
        "label": torch.tensor(3),
    }
    with pytest.raises(ValueError, match=r"the target of task 'parts' is unknown; pass kinds="):
        RandomFlip()(image, targets)
    kinds = {"parts": "labels", "shading": "map", "label": "none"}
    _, flipped = RandomFlip(1.0, kinds=kinds)(image, targets)
    assert torch.equal(flipped["parts"], targets["parts"].flip(-1))
    assert torch.equal(flipped["shading"], targets["shading"].flip(-1))
    assert flipped["label"] is targets["label"]
    _, cut = RandomScaleCrop(9, scale=(1.0, 1.0), kinds=kinds)(image, targets)
    assert (cut["parts"] == 255).sum() == cut["shading"].isnan().sum() == 81 - 24
    assert cut["label"] is targets["label"]
    assert set(KINDS) == set(ALL)  # unchanged by the call


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got 1.5"):
        RandomFlip(1.5)
    with pytest.raises(ValueError, match=r"kinds\['a'\] must be one of .*got 'picture'"):
        RandomFlip(kinds={"a": "picture"})
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        RandomScaleCrop(0)
    for scale in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="scale must be"):
            RandomScaleCrop(4, scale=scale)
    with pytest.raises(ValueError, match=r"image must be .* got the shape \(4, 4\)"):
        RandomFlip()(torch.zeros(4, 4), {})
    for depth in (torch.zeros(1, 4, 5), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match=r"targets\['depth'\] has the shape"):
            RandomFlip()(torch.zeros(3, 4, 4), {"depth": depth})
    with pytest.raises(ValueError, match=r"targets\['segmentation'\] has the shape \(1, 4, 4\)"):
        RandomFlip()(torch.zeros(3, 4, 4), {"segmentation": torch.zeros(1, 4, 4)})
