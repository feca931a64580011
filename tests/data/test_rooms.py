"""`Rooms` as a data set: shapes and ranges, independence of the batch, devices, errors."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from room_oracle import ALL_TASKS, HEIGHT, SCENES, WIDTH, rendered, rooms
from torch import Tensor
from torch.utils.data import DataLoader

from torch_adapmtl.datasets import Rooms


def test_shapes_and_ranges_of_images_and_targets() -> None:
    images, targets = rendered()
    assert images.shape == (SCENES, 3, HEIGHT, WIDTH)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.3 < images.mean() < 0.7
    assert targets["segmentation"].shape == (SCENES, HEIGHT, WIDTH)
    assert targets["segmentation"].dtype == torch.int64
    counts = torch.bincount(targets["segmentation"].flatten(), minlength=5)
    assert (counts / counts.sum()).min() > 0.02  # every class is there to be learned
    for task, channels in (("depth", 1), ("normal", 3), ("edges", 1), ("keypoints", 1)):
        assert targets[task].shape == (SCENES, channels, HEIGHT, WIDTH)
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


@cache
def one_by_one(image_size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    data = Rooms(8, image_size=image_size, tasks=ALL_TASKS, seed=3)
    return [data[index] for index in range(8)]


@settings(max_examples=15)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=20), st.sampled_from([8, 17, 33]))
def test_a_scene_does_not_depend_on_its_batch(indices: list[int], image_size: int) -> None:
    images, targets = Rooms(8, image_size=image_size, tasks=ALL_TASKS, seed=3).render(indices)
    for place, index in enumerate(indices):
        image, alone = one_by_one(image_size)[index]
        assert torch.equal(images[place], image)
        for task in ALL_TASKS:
            assert torch.equal(targets[task][place], alone[task])


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


def test_indices_batches_and_copies() -> None:
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


def test_wrong_arguments_are_refused() -> None:
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
    (on_cpu, cpu_targets), (on_gpu, gpu_targets) = (
        Rooms(20, tasks=ALL_TASKS, device=device).tensors() for device in ("cpu", "cuda")
    )
    assert on_gpu.device.type == "cuda"
    for task in ALL_TASKS:
        differs = (cpu_targets[task] - gpu_targets[task].cpu()).abs() > 1e-4
        assert differs.float().mean() < 1e-3
    assert ((on_cpu - on_gpu.cpu()).abs() > 1e-3).float().mean() < 1e-2
