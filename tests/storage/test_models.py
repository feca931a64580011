"""Models of any kind: saved as they compute, loaded into plain ones."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reader import assert_same_bits, read_sparse
from sparse_models import sparse_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import TwoTasks, batch, prepare, train

from torch_adapmtl import SparseFile, accelerate, load_sparse, save_sparse
from torch_adapmtl.storage import save


def with_zeros(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x[torch.rand_like(x) < sparsity] = 0
    return model


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model("convnext_atto", num_classes=3)
    return model


def _smp() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=2)
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 50))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    return model


def _channels_last() -> nn.Module:
    return nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)


def _mixed() -> nn.Module:
    return nn.ModuleList(
        [nn.Linear(40, 50).to(t) for t in (torch.float64, torch.bfloat16, torch.float16)]
    )


@pytest.mark.parametrize("make", [_timm, _smp, _tied, _channels_last, _mixed])
def test_a_plain_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = with_zeros(make())
    file = save_sparse(model, tmp_path / "x")
    other = make()
    parameters = {name: (id(x), x.stride()) for name, x in other.named_parameters()}
    assert load_sparse(tmp_path / "x", other) is other
    assert_same_state(other, model)
    assert parameters == {name: (id(x), x.stride()) for name, x in other.named_parameters()}
    assert file.size < file.dense_size / 3
    other.load_state_dict(load_sparse(tmp_path / "x"))


def test_a_finalised_model_has_no_negative_zeros(tmp_path: Path) -> None:
    model = sparse_model(0.9)
    assert not any((x.signbit() & (x == 0)).any() for x in model.parameters())
    save_sparse(model, tmp_path / "x")
    x = batch(0)[0]
    found, expected = load_sparse(tmp_path / "x", TwoTasks())(x), model(x)
    assert all(torch.equal(found[task], expected[task]) for task in expected)


def test_a_model_in_the_middle_of_a_run(tmp_path: Path) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(12))
    state = copy.deepcopy(model.state_dict())
    save_sparse(model, tmp_path / "x")
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    plain, x = load_sparse(tmp_path / "x", TwoTasks()), batch(0)[0]
    model.eval()
    plain.eval()
    expected = model(x)
    assert all(torch.equal(plain(x)[task], expected[task]) for task in expected)


def test_a_state_dict_of_a_run_comes_back_as_it_is(tmp_path: Path) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(12))
    save_sparse(model.state_dict(), tmp_path / "x")
    found = load_sparse(tmp_path / "x")
    for name, x in model.state_dict().items():
        assert torch.equal(found[name], x)


def test_masks_of_torch_become_zeros(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    prune.l1_unstructured(model[0], "weight", 0.9)
    prune.random_unstructured(model[0], "bias", 0.5)
    save_sparse(model, tmp_path / "x")
    found = load_sparse(tmp_path / "x")
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(found["0.weight"], model[0].weight)
    assert int(found["0.weight"].view(torch.int32).count_nonzero()) == 120  # no -0.0
    model(torch.randn(2, 30))
    load_sparse(tmp_path / "x", nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50)))


def test_names_that_look_like_masks(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_orig = nn.Parameter(torch.randn(3))
            self.weight_mask = nn.Parameter(torch.randn(7))
            self.layer = prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)

    model = Strange()
    save_sparse(model, tmp_path / "x")
    found = load_sparse(tmp_path / "x")
    assert set(found) == {"weight_orig", "weight_mask", "layer.weight", "layer.bias"}
    assert torch.equal(found["weight_mask"], model.weight_mask)


def test_other_parametrizations_are_saved_as_they_are(tmp_path: Path) -> None:
    model = parametrizations.weight_norm(nn.Linear(30, 40))
    save_sparse(model, tmp_path / "x")
    other = load_sparse(tmp_path / "x", parametrizations.weight_norm(nn.Linear(30, 40)))
    assert_same_state(other, model)


def test_a_loaded_model_is_accelerated(tmp_path: Path) -> None:
    model = with_zeros(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 50)))
    save_sparse(model, tmp_path / "x")
    x = torch.randn(4, 30)
    fast = accelerate(load_sparse(tmp_path / "x", copy.deepcopy(model)), x)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.append(nn.Linear(2, 2)), r"'2.bias' is missing in the file"),
        (lambda m: m.pop(1), r"'1.bias' is missing in the model"),
        (
            lambda m: m.__setitem__(0, nn.Linear(31, 40)),
            r"shape \(40, 31\).*\(40, 30\) in the file",
        ),
        (lambda m: m.to("meta"), "on the meta device: use model.to_empty"),
    ],
)
def test_models_that_do_not_fit(
    change: Callable[[nn.Sequential], object], message: str, tmp_path: Path
) -> None:
    save_sparse(nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50)), tmp_path / "x")
    other = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_sparse(tmp_path / "x", other)
    if not other[0].weight.is_meta:
        assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_hooks_for_state_dicts_run(tmp_path: Path) -> None:
    class Hooked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.turned = self.weight.detach().t().clone()
            self.register_load_state_dict_post_hook(lambda module, keys: module.turn())

        def turn(self) -> None:
            self.turned = self.weight.detach().t().clone()

    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
            state[prefix + "weight"] = state.pop(prefix + "old", None)  # type: ignore[assignment]
            super()._load_from_state_dict(state, prefix, *args)

    save_sparse({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, tmp_path / "x")
    assert torch.equal(load_sparse(tmp_path / "x", Hooked()).turned, torch.ones(3, 3))
    save_sparse({"old": torch.ones(3, 3), "bias": torch.ones(3)}, tmp_path / "x")
    assert torch.equal(load_sparse(tmp_path / "x", Renamed(3, 3)).weight, torch.ones(3, 3))


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (lambda: torch.zeros(1).expand(4), "cannot be written to"),
        (lambda: torch.zeros(4).to_sparse(), "cannot be written to"),
        (lambda: torch.zeros(4, dtype=torch.int64), "is torch.int64 in the model, torch.float32"),
        (lambda: torch.zeros(4, dtype=torch.int8), "is torch.int8 in the model, torch.float32 in"),
    ],
)
def test_awkward_tensors_are_found_before_anything_changes(
    buffer: Callable[[], Tensor], message: str, tmp_path: Path
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
            self.register_buffer("e", buffer())

    model = Net()
    save_sparse({"w": torch.ones(3), "e": torch.ones(4)}, tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        load_sparse(tmp_path / "x", model)
    assert not model.w.any()


def test_buffers_of_inference_mode(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(4)
    with torch.inference_mode():
        model.running_mean = torch.zeros(4)
    save_sparse({name: x + 1 for name, x in nn.BatchNorm1d(4).state_dict().items()}, tmp_path / "x")
    with pytest.raises(ValueError, match="'running_mean' cannot be written to"):
        load_sparse(tmp_path / "x", model)
    assert torch.equal(model.weight, torch.ones(4))
    with torch.inference_mode():
        load_sparse(tmp_path / "x", model)


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 40))
    save_sparse(torch.compile(model), tmp_path / "x")
    other = nn.DataParallel(nn.Sequential(nn.Linear(30, 40)))
    assert load_sparse(tmp_path / "x", other) is other
    assert_same_state(other.module, model)


class WithoutExtraState(nn.Linear):
    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None:
        raise AssertionError


def test_extra_state_that_is_none(tmp_path: Path) -> None:
    model = WithoutExtraState(3, 3)
    save_sparse(model, tmp_path / "x")
    assert torch.equal(load_sparse(tmp_path / "x", WithoutExtraState(3, 3)).weight, model.weight)


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([torch.ones(2)], TypeError, "must be a module or a state dict, found list"),
        ({"x": 3}, TypeError, "'x' is a int"),
        ({3: torch.ones(2)}, ValueError, "name 3"),
        ({"__metadata__": torch.ones(2)}, ValueError, "name '__metadata__'"),
        ({"x": torch.ones(2, device="meta")}, ValueError, "meta device"),
        ({"x": torch.eye(2).to_sparse()}, TypeError, "sparse_coo"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, TypeError, "complex128"),
        (WithExtraState(2, 2), TypeError, "'_extra_state' is a dict"),
    ],
)
def test_what_cannot_be_saved(
    given: object, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_sparse(given, tmp_path / "x")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_fewer_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_zeros(
        nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 90, 1))
    )
    full = save_sparse(model, tmp_path / "full")
    file = save_sparse(model, tmp_path / "x", dtype=dtype)
    assert file.size < full.size
    assert SparseFile.read(tmp_path / "x") == file
    found = load_sparse(tmp_path / "x")
    errors = {x.name: x.error for x in file.tensors}
    for name, x in model.state_dict().items():
        assert found[name].dtype is x.dtype
        if x.dim() < 2:
            assert torch.equal(found[name], x)
            assert errors[name] == 0
            continue
        if dtype is torch.int8:
            scale = x.abs().amax((1, 2, 3), keepdim=True) / 127
            scale[scale == 0] = 1
            expected = (x / scale).round() * scale
        else:
            expected = x.to(dtype).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)
        assert not found[name][x == 0].any()
        error = float((found[name] - x).norm() / x.norm())
        assert 0 < errors[name] == pytest.approx(error, rel=1e-3)
    assert file.error == max(errors.values())
    assert f"the largest error is {100 * file.error:.3g} %" in str(file)
    load_sparse(tmp_path / "x", copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 5), (2, 1, 1), (50, 40)])
def test_fewer_bits_of_odd_shapes(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "SMALL", 0)
    for x in (torch.zeros(shape), torch.ones(shape), torch.ones(shape).double()):
        save_sparse({"x": x}, tmp_path / "x", dtype=dtype)
        torch.testing.assert_close(load_sparse(tmp_path / "x")["x"], x, atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_the_reader_on_the_page_reads_fewer_bits(
    kind: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = with_zeros(nn.Linear(80, 90)).state_dict()["weight"].to(kind)
    save_sparse({"x": x}, tmp_path / "x", dtype=dtype)
    found = read_sparse(str(tmp_path / "x"))["x"]
    expected = load_sparse(tmp_path / "x")["x"]
    if kind is torch.bfloat16 and dtype is not torch.int8:
        assert_same_bits(found, expected)
    else:
        torch.testing.assert_close(
            torch.from_numpy(found).double(), expected.double(), rtol=1e-2, atol=0
        )


def test_integers_that_would_take_more_than_they_save(tmp_path: Path) -> None:
    x = torch.randn(9000, 1)
    file = save_sparse({"x": x}, tmp_path / "x", dtype=torch.int8)
    assert file.error == 0
    assert torch.equal(load_sparse(tmp_path / "x")["x"], x)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("inf"), torch.bfloat16),
        (float("nan"), torch.int8),
        (1e30, torch.float16),
        (1e300, torch.int8),
        (1e-30, torch.float16),
        (1e-320, torch.int8),
    ],
)
def test_values_that_fewer_bits_cannot_hold(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.full((80, 90), value, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'x' holds values that are.*another dtype"):
        save_sparse({"x": x}, tmp_path / "x", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_type_of_other_bits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of.*found torch.int4"):
        save_sparse({"x": torch.ones(3, 3)}, tmp_path / "x", dtype=torch.int4)


def test_a_table_of_the_tensors(tmp_path: Path) -> None:
    file = save_sparse(with_zeros(nn.Linear(100, 200)), tmp_path / "x", dtype=torch.int8)
    assert "200 x 100" in file.table()
    assert "<table>" in file._repr_html_()
    assert str(tmp_path / "x") in str(file)


MEASURE = """
import resource, sys, torch
from torch import nn
from torch_adapmtl import load_sparse, save_sparse

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

sparsity, path = float(sys.argv[1]), sys.argv[2]
small = nn.Linear(900, 900)
save_sparse(small, path)
load_sparse(path, small)  # what is imported and allocated once
model = nn.Sequential(*(nn.Linear(3000, 3000) for _ in range(4)))
with torch.no_grad():
    for x in model.parameters():
        x.masked_fill_(torch.rand(x.shape, dtype=torch.float16) < sparsity, 0)
before = peak()
save_sparse(model, path)
saved = peak() - before
load_sparse(path, model)
print(saved, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the unit is another")
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_files_take_little_memory_beyond_the_model(sparsity: float, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(sparsity), str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
    )
    saved, both = map(int, done.stdout.split())
    dense = 4 * 4 * 3000 * 3000
    assert saved < dense / 3
    assert both < dense / 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_tensors_on_a_gpu(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """The same file as from the CPU, also where the GPU is the default device."""
    model = with_zeros(nn.Sequential(nn.Linear(80, 90), nn.BatchNorm1d(90)))
    save_sparse(model, tmp_path / "cpu", dtype=dtype)
    expected = load_sparse(tmp_path / "cpu")
    with torch.device("cuda"):
        save_sparse(model.cuda(), tmp_path / "gpu", dtype=dtype)
        other = load_sparse(tmp_path / "gpu", nn.Sequential(nn.Linear(80, 90), nn.BatchNorm1d(90)))
    for name, x in other.state_dict().items():
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), expected[name])
