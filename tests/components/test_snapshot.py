"""The model after the run: as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import types
from collections import OrderedDict, deque
from typing import Any, ClassVar

import awkward
import pytest
import torch
from awkward import Case, Net
from finding import X, each_case
from torch import Tensor, nn
from untouched import assert_untouched

from torch_adapmtl import find_components


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(case: Case, training: bool) -> None:
    model, x = case.build(), case.inputs()
    loss = torch.stack(list(case.losses(model(x)).values())).sum()
    loss.backward()  # gradients, caches and statistics that are not those of the start
    model.train(training)
    next(iter(model.children())).train(not training)
    kept = x.clone()
    assert_untouched(model, lambda: find_components(model, x, **case.options))
    assert torch.equal(x, kept)


class Leaky(Net):
    """Keeps whatever it computes, in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {}
        self.nested = {"deep": [[], {"x": set()}], "queue": deque(maxlen=3)}
        self.ordered: OrderedDict[str, Any] = OrderedDict(a=1)
        self.object = types.SimpleNamespace(last=None, items=[])
        self.hidden = [nn.BatchNorm1d(awkward.WIDTH)]
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(awkward.WIDTH))
        self.register_buffer("lazy", None)
        self.generator = torch.Generator().manual_seed(3)
        self.table["self"] = self.table

    def features(self, x: Tensor) -> Tensor:
        self.step += 1
        self.ema.copy_(self.hidden[0](x).mean(0).detach())
        self.lazy = x
        x = x + torch.rand(1) + random.random() + torch.rand(1, generator=self.generator)
        self.table[str(len(self.table))] = x
        self.nested["deep"][0].append(x)
        self.nested["deep"][1]["x"].add(1)
        self.nested["queue"].append(x)
        self.ordered.move_to_end("a")
        self.ordered["b"] = x
        self.object.last = x
        self.object.items.append(x)
        self.body[0].added = nn.Linear(1, 1)
        self.body[1].register_forward_hook(lambda *_: None)
        self.heads["a"].bias.data = self.heads["a"].bias.data + 1
        self.ema.data = self.ema.data + 1
        self.body[0].weight.note = x
        self.body[0].weight.register_hook(lambda grad: grad)
        self.body.eval()
        return self.body(x)


def test_leaky_models_keep_nothing() -> None:
    model = Leaky()
    x = X.clone()
    generator = model.generator.get_state()
    assert_untouched(model, lambda: find_components(model, x))
    assert torch.equal(model.generator.get_state(), generator)
    torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(model.body)


@functools.lru_cache
def _ramp(width: int) -> tuple[Tensor, list[Tensor]]:
    return torch.linspace(0, 1, width), [torch.ones(width)]


@functools.lru_cache
def _column(width: int) -> Tensor:
    return torch.zeros(1, width)[0]  # a view, and nothing but it keeps its base


_TABLES: dict[int, Tensor] = {}


class Caching(Net):
    """Keeps tables outside of itself: of the Python module, of the class, behind lru_cache."""

    shared: ClassVar[dict[str, Any]] = {"tables": {}}

    def features(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        if width not in _TABLES:
            _TABLES[width] = torch.ones(width) / width
        tables = self.shared["tables"]
        if width not in tables:
            tables[width] = torch.zeros(width)
        ramp, (ones,) = _ramp(width)
        x = (x + ramp) * ones + _TABLES[width] + tables[width]
        return self.body(x + _column(width))


def test_caches_outside_the_model_serve_later_runs() -> None:
    model = Caching()
    assert find_components(model, X).names == find_components(Net(), X).names
    outputs = model(X)
    sum(output.sum() for output in outputs.values()).backward()
    for cache in (_TABLES, Caching.shared["tables"]):
        assert all(type(kept) is Tensor and not kept.requires_grad for kept in cache.values())
        cache.clear()
    _ramp.cache_clear()
    _column.cache_clear()
    expected = model(X)
    assert all(torch.equal(outputs[task], expected[task]) for task in expected)


class Sneaky(Net):
    """Writes to buffers where no schema says so, and to gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(awkward.WIDTH))
        self.register_buffer("var", torch.ones(awkward.WIDTH))

    def features(self, x: Tensor) -> Tensor:
        x.sum().item()
        x = nn.functional.batch_norm(x, self.mean, self.var, training=True)
        self.body(x).sum().backward()
        return self.body(x)


@pytest.mark.parametrize("with_grad", [True, False])
def test_statistics_and_gradients_written_in_forward_are_put_back(with_grad: bool) -> None:
    model = Sneaky()
    if with_grad:
        sum(output.sum() for output in model(X).values()).backward()
    assert_untouched(model, lambda: find_components(model, X))


@each_case
def test_models_can_be_copied_and_trained_afterwards(case: Case) -> None:
    model = case.build()
    find_components(model, case.inputs(), **case.options)
    with contextlib.suppress(RuntimeError):  # torch's own limits for non-leaf attributes
        model = copy.deepcopy(model)
    torch.stack(list(case.losses(model(case.inputs())).values())).sum().backward()


class Writing(Net):
    """Writes to parameters and buffers in the ways that a device without addresses has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(awkward.WIDTH)
        self.register_buffer("calls", torch.zeros(3))

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.body[0].bias.data.add_(1)
        with torch.no_grad():
            self.body[2].bias.mul_(3)
        self.heads["a"].bias.data = self.heads["a"].bias.data * 5
        return self.norm(self.body(x))


def test_a_device_whose_tensors_have_no_address() -> None:
    """As on XLA: there is no storage to compare or copy, and dispatch modes do not work."""
    backend = pytest.importorskip("torch._lazy.ts_backend")
    with contextlib.suppress(RuntimeError):  # made before in this process
        backend.init()
    model = Writing().to("lazy")
    with pytest.raises(RuntimeError, match="invalid python storage"):
        model.calls.untyped_storage().data_ptr()
    before = {name: value.cpu() for name, value in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    components = find_components(model, X.to("lazy"))
    assert [(t.name, t.component) for t in components.tensors] == [
        ("body.0.weight", "shared"),
        ("body.2.weight", "shared"),
        ("heads.a.weight", "a"),
        ("heads.b.weight", "b"),
    ]
    assert list(map(id, model.parameters())) == parameters
    after = model.state_dict()
    assert all(torch.equal(after[name].cpu(), value) for name, value in before.items())
    model(X.to("lazy"))["a"].sum().backward()
    assert model.heads["a"].weight.grad is not None
