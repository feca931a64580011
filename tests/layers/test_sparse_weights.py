"""Sparse weights in the parameters, compared with an oracle that holds dense master weights."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_adapmtl import Layer, Layers, SoftThreshold, soft_threshold
from torch_adapmtl.layers.sparse_weights import SparseWeights
from torch_adapmtl.tensor import _kernels
from torch_adapmtl.tensor._kernels import Shrinkage, batches, shrink_

Masks = list[Tensor | None]

SHAPES = [(4, 6), (5, 3), (3, 4, 2, 2)]


class Weights(nn.Module):
    """A tied weight, one that is not contiguous, and one in channels-last order."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.twin = (nn.Linear(6, 4, bias=False) for _ in range(2))
        self.second, self.third = nn.Linear(5, 3, bias=False), nn.Conv2d(4, 3, 2, bias=False)
        self.to(dtype)
        self.twin.weight = self.first.weight
        self.second.weight = nn.Parameter(self.second.weight.detach().t())
        self.third.to(memory_format=torch.channels_last)

    def owners(self) -> list[tuple[tuple[nn.Module, str], ...]]:
        groups = [(self.first, self.twin), (self.second,), (self.third,)]
        return [tuple((module, "weight") for module in group) for group in groups]


def objective(weights: Iterable[Tensor], step: int) -> Tensor:
    """A loss with another gradient at every step, the same for every layout of a weight."""
    losses = []
    for i, weight in enumerate(weights):
        place = torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape)
        losses.append((weight * 3 - (place + i + step).sin()).tanh().square().float().sum())
    return torch.stack(losses).sum()


# --- optimisers ---------------------------------------------------------------------------------


class SAM(torch.optim.SGD):
    """Calls the closure twice, the second time with other weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        closure()
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in weights]
        for p in weights:
            if p.grad is not None:
                p.add_(p.grad, alpha=0.05)
        loss = closure()
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)
        super().step()
        return loss


class Decaying(torch.optim.SGD):
    """Changes the weights after the step of its base class, which torch hooks too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.875)
        return loss


class Wrapper(torch.optim.Optimizer):
    """Changes the weights after the step of another optimiser of the same weights."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.Adam(parameters, lr=0.1, eps=1e-3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in weights]
        loss = self.inner.step(closure)
        for p, old in zip(weights, before, strict=True):
            p.lerp_(old, 0.25)
        return loss


class Failing(torch.optim.SGD):
    """Raises an error after it has updated one weight, at every second step."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.mul_(0.875).sub_(p.grad, alpha=0.1)
                if self.steps % 2:
                    raise ZeroDivisionError


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1, eps=1e-3),
    "AdamW, fused": lambda ps: torch.optim.AdamW(
        ps, lr=0.1, weight_decay=0.1, eps=1e-3, fused=True
    ),
    # It flattens weights, and cannot flatten others.
    "LBFGS": lambda ps: torch.optim.LBFGS([p for p in ps if p.is_contiguous()], max_iter=3),
    "SAM": lambda ps: SAM(ps, lr=0.1, weight_decay=0.1),
    "of a base class": lambda ps: Decaying(ps, lr=0.1),
    "of another": Wrapper,
    "failing": lambda ps: Failing(ps, lr=0.1),
}


# --- what is tested, and the oracle -------------------------------------------------------------


class Run:
    """Dense or sparse weights, trained by two optimisers."""

    weights: list[nn.Parameter]

    def start(self, kinds: tuple[str, str], split: int) -> None:
        """Make the optimisers, the first with `split` of the weights."""
        parts = self.weights[:split], self.weights[split:]
        self.optimizers = [
            OPTIMIZERS[kind](part) for kind, part in zip(kinds, parts, strict=True) if part
        ]

    def train(self, step: int, closures: bool) -> None:
        for optimizer in self.optimizers:

            def closure(optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                return self.backward(step)

            needs = isinstance(optimizer, (SAM, torch.optim.LBFGS))
            if needs or (closures and not isinstance(optimizer, Failing)):
                optimizer.step(closure)
                continue
            closure()
            with contextlib.suppress(ZeroDivisionError):
                optimizer.step()

    def freeze(self, index: int, frozen: bool) -> None:
        self.weights[index].requires_grad_(not frozen)
        self.weights[index].grad = None

    def backward(self, step: int) -> Tensor:
        raise NotImplementedError


class Subject(Run):
    """The parameters hold the sparse weights."""

    def __init__(self, dtype: torch.dtype, reach: float, straight_through: bool) -> None:
        self.net = Weights(dtype)
        self.layers = Layers(Layer(str(i), "all", o) for i, o in enumerate(self.net.owners()))
        for layer in self.layers:
            threshold = SoftThreshold(reach=reach, straight_through=straight_through)
            layer.threshold = threshold.to(dtype)
        self.sparse = SparseWeights(self.layers)
        self.sparse.attach()

    @property
    def weights(self) -> list[nn.Parameter]:  # type: ignore[override]
        return [layer.weight for layer in self.layers]

    def backward(self, step: int) -> Tensor:
        loss = objective([*self.weights, self.net.twin.weight], step)
        if step % 3 < 2:
            loss.backward()
            return loss
        trained = [weight for weight in self.weights if weight.requires_grad]
        for weight, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            total = grad if weight.grad is None else weight.grad + grad
            weight.grad = torch.empty_like(weight).copy_(total)  # in the weight's layout
        return loss

    def train(self, step: int, closures: bool) -> None:
        self.sparse.renew_hooks()
        super().train(step, closures)
        self.sparse.catch_up()

    @torch.no_grad()
    def write(self, values: list[Tensor], through_data: bool) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            (weight.data if through_data else weight).add_(value)
        self.sparse.catch_up()

    def prune(self, alphas: list[float], scale: float, masks: Masks, fixed: bool) -> None:
        with self.sparse.dense():
            for layer, alpha, mask in zip(self.layers, alphas, masks, strict=True):
                layer.threshold.set_threshold(alpha)
                if layer.threshold.reach == math.inf:
                    layer.threshold.set_scale(scale)
                layer.threshold.mask = mask
            self.sparse.fix(fixed)

    def masks(self) -> list[Tensor]:
        return [layer.threshold.mask for layer in self.layers]

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        sparse = [weight.detach().clone() for weight in self.weights]
        with self.sparse.dense():
            return sparse, [weight.detach().clone() for weight in self.weights]


class Oracle(Run):
    """The parameters hold the dense weights; sparse weights are computed where they are used."""

    def __init__(self, subject: Subject) -> None:
        self.weights = [nn.Parameter(weight.detach().clone()) for weight in subject.weights]
        threshold = subject.layers[0].threshold
        self.reach, self.straight_through = threshold.reach, threshold.straight_through
        self.prune([0.0] * 3, 1.0, [None] * 3, False)

    @torch.no_grad()
    def split(self, index: int) -> tuple[Tensor, Tensor]:
        """The sparse weight, and the residual."""
        weight, mask, alpha = self.weights[index], self.masks[index], self.alphas[index]
        if self.fixed and mask is not None:
            weight.copy_(torch.where(mask, weight, 0.0))
        sparse, residual = weight.detach().clone(), torch.zeros_like(weight)
        alpha = torch.tensor(alpha, dtype=weight.dtype).item()
        scale = self.scale if self.reach == math.inf else 1.0
        shrink_([Shrinkage(sparse, residual, alpha, self.reach, mask, scale)])
        return sparse, residual

    def backward(self, step: int) -> Tensor:
        found = [
            self.split(i)[0].requires_grad_(w.requires_grad) for i, w in enumerate(self.weights)
        ]
        loss = objective([*found, found[0]], step)
        loss.backward()
        for i, (weight, sparse) in enumerate(zip(self.weights, found, strict=True)):
            if weight.requires_grad:
                grad = sparse.grad if weight.grad is None else weight.grad + sparse.grad
                if self.alphas[i] and not self.straight_through:
                    grad = grad.where(sparse.detach() != 0, 0.0)
                elif self.masks[i] is not None:
                    grad = grad.where(self.masks[i], 0.0)
                weight.grad = torch.empty_like(weight).copy_(grad)  # in the weight's layout
        return loss

    @torch.no_grad()
    def write(self, values: list[Tensor], through_data: bool) -> None:
        for i, value in enumerate(values):
            sparse, residual = self.split(i)
            self.weights[i].copy_(sparse + value + residual)

    def prune(self, alphas: list[float], scale: float, masks: Masks, fixed: bool) -> None:
        self.alphas, self.scale, self.masks, self.fixed = alphas, scale, masks, fixed

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        sparse = [self.split(i)[0] for i in range(3)]
        return sparse, [weight.detach().clone() for weight in self.weights]


def reload(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIERS = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), reload]
COPIED = {"SGD", "AdamW", "AdamW, fused", "SAM", "of a base class"}  # torch cannot copy the others
SEEDS, SWITCH = st.integers(0, 99), st.booleans()
EVENTS = st.one_of(
    st.tuples(st.just("train"), SEEDS, SWITCH),
    st.tuples(st.just("prune"), SEEDS, SWITCH),
    st.tuples(st.just("fix"), SEEDS, SWITCH),
    st.tuples(st.just("write"), SEEDS, SWITCH),
    st.tuples(st.just("freeze"), st.integers(1, 2), SWITCH),
    st.tuples(st.just("copy"), st.integers(0, 2), SWITCH),
)


def happen(run: Run, what: str, number: int, switch: bool) -> None:
    """Let an event happen to a run."""
    generator = torch.Generator().manual_seed(number)
    shapes = [weight.shape for weight in run.weights]
    if what == "train":
        for step in range(number % 3 + 1):
            run.train(number + step, switch)
    elif what == "freeze":
        run.freeze(number, switch)
    elif what == "write":
        values = [torch.randn(s, generator=generator) * 0.1 for s in shapes]
        run.write([v.to(run.weights[0].dtype) for v in values], switch)
    elif what in ("prune", "fix"):
        kept = [torch.rand(s, generator=generator) > 0.4 for s in shapes]
        alphas = [[0.0, 0.1, 0.4, 3.0][number // 4**i % 4] for i in range(3)]
        masks = [mask if switch or what == "fix" else None for mask in kept]
        scale = [1.0, 1.5, 2.0, 5.5][number % 3 + switch]
        run.prune([0.0] * 3 if what == "fix" else alphas, scale, masks, what == "fix")


def assert_same(subject: Subject, oracle: Oracle) -> None:
    for found, expected in zip(subject.state(), oracle.state(), strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # of layouts, told once
@given(
    kinds=st.tuples(
        st.sampled_from(list(OPTIMIZERS)), st.sampled_from([k for k in OPTIMIZERS if k != "LBFGS"])
    ),
    split=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    reach=st.sampled_from([math.inf, 1.1, 2.0]),
    straight_through=SWITCH,
    events=st.lists(EVENTS, min_size=1, max_size=8),
)
@settings(max_examples=100)
def test_the_run_is_that_of_dense_weights(
    kinds: tuple[str, str],
    split: int,
    dtype: torch.dtype,
    reach: float,
    straight_through: bool,
    events: list[tuple[str, int, bool]],
) -> None:
    subject = Subject(dtype, reach, straight_through)
    oracle = Oracle(subject)
    for run in (subject, oracle):
        run.start(kinds, split)
    for run in (subject, oracle):
        happen(run, "prune", 27, False)
    for event in events:
        if event[0] == "copy" and COPIED.issuperset(kinds):
            old, before = subject, subject.state()
            subject = COPIERS[event[1]](subject)
            for run in (subject, oracle):
                happen(run, "train", 0, event[2])
            for one, other in zip(old.state(), before, strict=True):
                assert all(map(torch.equal, one, other))
        for run in (subject, oracle):
            happen(run, *event)
        assert_same(subject, oracle)


def test_a_step_that_failed_does_not_leave_weights_dense() -> None:
    """Also if nothing but the optimiser runs afterwards, as after the end of a run."""
    subject = Subject(torch.float32, math.inf, True)
    subject.start(("failing", "SGD"), 3)
    happen(subject, "fix", 0, True)
    for step in range(2):
        Run.train(subject, step, False)
    sparse, dense = subject.state()
    assert all(map(torch.equal, sparse, dense))
    assert all(layer.threshold.mask is not None for layer in subject.layers)
    assert not any(w[~m].any() for w, m in zip(sparse, subject.masks(), strict=True))


class Curvature(torch.optim.SGD):
    """Divides gradients by the curvature, as AdaHessian does, and differentiates them for that."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        weights = self.param_groups[0]["params"]
        gradients = [p.grad for p in weights]
        for p, gradient in zip(weights, scaled(gradients, weights), strict=True):
            p.grad = gradient
        super().step()
        return loss


def curved(weights: list[Any], step: int) -> Tensor:
    """An objective whose second derivatives are computed from the weights themselves."""
    return objective([weight.sin() for weight in weights], step)


def scaled(gradients: list[Tensor], weights: list[Any]) -> list[Tensor]:
    ones = [torch.ones_like(gradient) for gradient in gradients]
    curvature = torch.autograd.grad(gradients, weights, ones)
    return [g.detach() / (c.abs() + 1) for g, c in zip(gradients, curvature, strict=True)]


@pytest.mark.filterwarnings("ignore:.*create_graph=True")
@pytest.mark.parametrize("in_closure", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_optimiser_may_differentiate_gradients_in_its_step(
    masked: bool, in_closure: bool
) -> None:
    subject = Subject(torch.float64, 1.1, True)
    oracle = Oracle(subject)
    for run in (subject, oracle):
        happen(run, "prune", 39, masked)
    optimizer = Curvature(subject.weights, lr=0.5)
    for step in range(4):
        subject.sparse.renew_hooks()

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = curved([*subject.weights, subject.net.twin.weight], step)
            loss.backward(create_graph=True)
            return loss

        if in_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        leaves = [oracle.split(i)[0].requires_grad_() for i in range(3)]
        loss = curved([*leaves, leaves[0]], step)
        gradients = list(torch.autograd.grad(loss, leaves, create_graph=True))
        for i, mask in enumerate(subject.masks()):
            if mask is not None:
                gradients[i] = gradients[i].where(mask, 0.0)
        for weight, gradient in zip(oracle.weights, scaled(gradients, leaves), strict=True):
            with torch.no_grad():
                weight.sub_(gradient, alpha=0.5)
        optimizer.zero_grad()
        for found, expected in zip(subject.state(), oracle.state(), strict=True):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
        sparse = subject.state()[0]
        assert any(bool((weight == 0).any()) for weight in sparse)


def test_steps_that_a_scaler_skips_change_nothing() -> None:
    subject = Subject(torch.float32, 1.1, False)
    subject.start(("SGD", "AdamW, fused"), 2)
    happen(subject, "prune", 21, False)
    happen(subject, "train", 1, False)
    before = subject.state()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    subject.sparse.renew_hooks()
    scaler.scale(objective(subject.weights, 0) * torch.inf).backward()
    for optimizer in subject.optimizers:
        scaler.step(optimizer)
    scaler.update()
    subject.sparse.catch_up()
    for found, expected in zip(subject.state(), before, strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:.*create_graph=True", "ignore:grad and param do not obey")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, math.inf, math.nan])
def test_gradients_of_zeros(create_graph: bool, masked: bool, scale: float) -> None:
    """Zero if pruned weights do not regrow, and of masked weights always."""
    for straight_through in (False, True):
        subject = Subject(torch.float32, math.inf, straight_through)
        happen(subject, "prune", 27, masked)
        subject.sparse.renew_hooks()
        plain = [weight.detach().clone().requires_grad_() for weight in subject.weights]
        (objective([*plain, plain[0]], 0) * scale).backward()
        for _ in range(2):  # the second is accumulated
            loss = objective([*subject.weights, subject.net.twin.weight], 0) * scale
            loss.backward(create_graph=create_graph)
        for weight, copied, layer in zip(subject.weights, plain, subject.layers, strict=True):
            kept = torch.ones_like(weight, dtype=torch.bool)
            if layer.mask is not None:
                kept &= layer.mask
            if not straight_through and layer.threshold.known():
                kept &= weight != 0
            assert weight.grad is not None
            assert weight.grad.requires_grad == create_graph
            assert not weight.grad[~kept].any()
            found, expected = weight.grad[kept], 2 * copied.grad[kept]
            torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0, equal_nan=True)
            weight.grad = None


# --- the kernel ---------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda t: t.clone(memory_format=torch.channels_last),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


def assert_shrunk(
    dense: Tensor, alpha: float, reach: float, mask: Tensor | None, scale: float = 1.0
) -> None:
    alpha = torch.tensor(alpha, dtype=dense.dtype).item()
    weight = torch.empty_strided(dense.shape, dense.stride(), dtype=dense.dtype).copy_(dense)
    residual = torch.full_like(weight, torch.nan)
    shrink_([Shrinkage(weight, residual, alpha, reach, mask, scale)])
    assert torch.equal(weight + residual, dense)
    kept = torch.ones_like(dense, dtype=torch.bool) if mask is None else mask
    assert torch.equal(weight == 0, ~(kept & (dense.abs() > alpha)) | (dense == 0))
    assert not weight[~kept].signbit().any()
    expected = soft_threshold(dense, alpha, reach=reach).where(kept, 0.0).double()
    if alpha and reach == math.inf:
        most = 1.875 * dense.double().abs()
        expected = (scale * expected.abs()).minimum(most).copysign(dense)
    ulp = 4 * torch.finfo(dense.dtype).eps * dense.double().abs()
    assert ((weight.double() - expected).abs() <= ulp).all()


@given(
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    values=st.lists(
        st.floats(-60000, 60000, width=16) | st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-7, 6e4]),
        min_size=1,
        max_size=24,
    ),
    alpha=st.floats(0, 100) | st.sampled_from([0.5, 1e-7, 6e4]),
    reach=st.sampled_from([math.inf, 1.001, 1.1, 2.0]),
    scale=st.sampled_from([1.0, 2.0, 20.0]) | st.floats(1.0, 20.0),
    mask=st.none() | SEEDS,
)
@settings(max_examples=300)
def test_the_sparse_weight_and_its_residual(
    dtype: torch.dtype, layout: str, values: list[float], alpha: float, reach: float,
    scale: float, mask: int | None,
) -> None:  # fmt: skip
    # Float16 ends at 65504.
    flat = torch.tensor(values).div(2).to(dtype).repeat(24)[:24]
    kept = None
    if mask is not None:
        generator = torch.Generator().manual_seed(mask)
        kept = torch.rand(2, 3, 2, 2, generator=generator) > 0.5
    assert_shrunk(LAYOUTS[layout](flat.view(2, 3, 2, 2)), alpha, reach, kept, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_weights_are_computed_in_pieces(dtype: torch.dtype, layout: str) -> None:
    dense = LAYOUTS[layout](torch.randn(75, 50, 6, 6).to(dtype))
    mask = torch.rand_like(dense, dtype=torch.float32) > 0.5
    for kept in (None, mask, mask.contiguous()):
        for reach in (math.inf, 1.1):
            assert_shrunk(dense, 0.7, reach, kept)
        assert_shrunk(dense, 0.7, math.inf, kept, 3.3)


@given(
    sizes=st.lists(st.sampled_from([1, 7, 5000, 2**16, 2**17, 2**17 + 1]), min_size=1, max_size=6),
    seed=SEEDS,
)
@settings(max_examples=30)
def test_weights_that_are_computed_together_are_as_if_computed_alone(
    sizes: list[int], seed: int
) -> None:
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shrinkages = []
    for size in sizes:
        weight = torch.randn(size, generator=generator).to(choice.choice(DTYPES))
        mask = torch.rand(size, generator=generator) > 0.5 if choice.random() < 0.5 else None
        alpha, reach = choice.choice([0.0, 0.25, 1.0]), choice.choice([math.inf, 1.1])
        residual = torch.full_like(weight, torch.nan)
        scale = choice.choice([1.0, 1.5, 4.0])
        shrinkages.append(Shrinkage(weight, residual, alpha, reach, mask, scale))
    alone = [s._replace(weight=s.weight.clone(), residual=s.residual.clone()) for s in shrinkages]
    for batch in batches(dict(enumerate(shrinkages))):
        shrink_(list(batch.values()))
    for together, single in zip(shrinkages, alone, strict=True):
        shrink_([single])
        assert torch.equal(together.weight, single.weight)
        assert torch.equal(together.residual, single.residual)


def test_an_interruption_between_layers_loses_no_dense_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that are sparse by then are not taken for dense ones, and so not shrunk twice."""
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400), nn.Linear(3, 3))
    dense = [layer.weight.detach().clone() for layer in model]
    layers = [Layer(str(i), "shared", ((layer, "weight"),)) for i, layer in enumerate(model)]
    weights = SparseWeights(Layers(layers))
    for layer in layers:
        layer.threshold.set_threshold(0.02)
    shrink, calls = _kernels._shrink, []

    def interrupted(group: Any) -> None:
        calls.append(group)
        if len(calls) == 3:  # in the second layer, each of which takes two
            raise KeyboardInterrupt
        shrink(group)

    monkeypatch.setattr(_kernels, "_shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.to_sparse()
    monkeypatch.undo()
    weights.to_sparse()
    assert all((layer.weight == 0).any() for layer in model[:2])
    weights.to_dense()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, dense, strict=True))
