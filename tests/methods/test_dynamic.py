"""Dynamic sparse training, each method against a plain version of its paper's rule."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_baselines import SGD, STEPS, Plain
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, train, weights, zeros
from waiting import refused

from torch_adapmtl import ACDC, GraNet, RigL, SparsitySchedule, TopKAST, apply_adapmtl
from torch_adapmtl.methods._drop_and_grow import drop_and_grow, erk_densities, erk_numbers

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")

SHAPES = st.lists(
    st.sampled_from([(1, 1), (12, 6), (5, 12), (64, 3, 7, 7), (30, 30), (256, 64, 3, 3), (2, 90)]),
    min_size=1,
    max_size=6,
)


# --- Erdos-Renyi-Kernel -------------------------------------------------------------------------


def erk_by_removal(shapes: list[tuple[int, ...]], kept: float) -> list[float]:
    """As the authors describe it: while a density is above 1, make the highest one dense."""
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        rest = [i for i in range(len(shapes)) if i not in dense]
        left = kept - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in rest)
        highest = max(raw[i] for i in rest)
        if scale * highest <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == highest}
    return [1.0] * len(shapes)


@given(shapes=SHAPES, density=st.floats(0, 1))
def test_erk_densities(shapes: list[tuple[int, ...]], density: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    kept = round(density * sum(sizes))
    found = erk_densities(shapes, kept)
    assert sum(d * size for d, size in zip(found, sizes, strict=True)) == kept  # no rounding
    assert all(0 <= d <= 1 for d in found)
    assert [float(d) for d in found] == pytest.approx(erk_by_removal(shapes, kept))
    scales = {
        d * size / sum(shape) for d, size, shape in zip(found, sizes, shapes, strict=True) if d < 1
    }
    assert len(scales) <= 1  # in proportion where not capped


@given(
    shapes=SHAPES,
    density=st.floats(0, 1),
    gone=st.floats(0, 1),
    costs=st.none() | st.lists(st.sampled_from([1.0, 2.5, 64.0]), min_size=6, max_size=6),
)
def test_erk_numbers_meet_the_total(
    shapes: list[tuple[int, ...]], density: float, gone: float, costs: list[float] | None
) -> None:
    costs = costs and costs[: len(shapes)]
    prices = costs or [1.0] * len(shapes)
    capacities = [int((1 - gone) * math.prod(s)) if i % 2 else math.prod(s)
                  for i, s in enumerate(shapes)]  # fmt: skip
    kept = density * sum(c * price for c, price in zip(capacities, prices, strict=True))
    kept = kept if costs else round(kept)
    numbers = erk_numbers(shapes, kept, capacities, costs)
    assert all(0 <= n <= most for n, most in zip(numbers, capacities, strict=True))
    total = sum(n * price for n, price in zip(numbers, prices, strict=True))
    if costs is None:
        assert total == kept
    assert 0 <= kept - total < max(prices) or kept == pytest.approx(total)
    exact = erk_densities(shapes, kept, capacities, costs)
    for n, density_, shape in zip(numbers, exact, shapes, strict=True):
        assert abs(n - density_ * math.prod(shape)) < 1


def test_erk_of_some_layers_of_a_resnet_by_hand() -> None:
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3), (10, 512)]
    # The sums of dimensions are 73, 134, 1030 and 522; the sizes 1728, 36864, 2359296 and 5120.
    # In proportion, the last would keep 20000 * 522 / 1759 = 5935, which is too many.
    first, second, third, last = map(float, erk_densities(shapes, 20_000))
    scale = (20_000 - 5120) / (73 + 134 + 1030)
    assert last == 1
    assert [first, second, third] == pytest.approx(
        [scale * 73 / 1728, scale * 134 / 36864, scale * 1030 / 2359296]
    )
    # At 80 % all small layers are dense.
    kept = 0.2 * sum(math.prod(shape) for shape in shapes)
    first, second, third, last = map(float, erk_densities(shapes, kept))
    assert (first, second, last) == (1, 1, 1)
    assert third == pytest.approx((kept - 1728 - 36864 - 5120) / 2359296)


# --- one step -----------------------------------------------------------------------------------


def plain_step(size: Tensor, pull: Tensor, kept: Tensor, share: float) -> Tensor:
    """By sorting lists, on a flat layer."""
    alive = [i for i in range(len(kept)) if kept[i]]
    count = int(share * len(alive))
    dropped = sorted(alive, key=lambda i: float(size[i]))[:count]
    stay = set(alive) - set(dropped)
    others = [i for i in range(len(kept)) if i not in stay]
    grown = sorted(others, key=lambda i: -abs(float(pull[i])))[:count]
    return torch.tensor([i in stay or i in grown for i in range(len(kept))])


@given(
    size=st.integers(1, 30), density=st.floats(0, 1), share=st.floats(0, 0.99),
    levels=st.sampled_from([2, 5, 10**6]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_drop_and_grow_is_sorting(
    size: int, density: float, share: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(levels, (size,), generator=generator).float()
    gradient = torch.randint(-levels, levels, (size,), generator=generator).float()
    kept = torch.rand(size, generator=generator) < density
    allowed = torch.ones_like(kept)
    found = drop_and_grow(magnitude, gradient, kept, allowed, share)
    assert torch.equal(found, plain_step(magnitude, gradient, kept, share))
    assert found.sum() == kept.sum()
    some = kept | (torch.rand(size, generator=generator) < 0.5)
    found = drop_and_grow(magnitude, gradient, kept, some, share)
    assert found.sum() == kept.sum()
    assert not (found & ~some).any()


def test_what_is_no_number_does_not_grow() -> None:
    kept = torch.tensor([True, True, False, False, False])
    gradient = torch.tensor([0.0, 0.0, torch.nan, 1e-3, torch.nan])
    found = drop_and_grow(torch.tensor([1.0, 2, 0, 0, 0]), gradient, kept, kept | True, 0.5)
    assert found.tolist() == [False, True, False, True, False]


# --- RigL ---------------------------------------------------------------------------------------


def dense_gradient(plain: Plain, step: int) -> dict[str, Tensor]:
    """Of the sum of the losses, for the gone weights too."""
    found: dict[str, Tensor] = {}
    for own in plain.gradients(step).values():
        for name, gradient in own.items():
            found[name] = found.get(name, torch.zeros_like(gradient)) + gradient
    return found


@torch.no_grad()
def drop_grow(plain: Plain, gradients: dict[str, Tensor], share: float) -> None:
    for name, weight in plain.weights.items():
        kept = plain.masks[name].flatten() == 1
        new = plain_step(weight.flatten().abs(), gradients[name].flatten(), kept, share)
        weight.view(-1)[new & ~kept] = 0
        plain.masks[name] = new.view(weight.shape).float()


def plain_rigl(plain: Plain, interval: int) -> None:
    for step in range(STEPS):
        gradients = dense_gradient(plain, step)
        plain.step(step)
        t, end = step + 1, 0.75 * STEPS
        if t % interval == 0 and t < end:
            drop_grow(plain, gradients, 0.3 / 2 * (1 + math.cos(math.pi * t / end)))


def start(method: Any, **options: Any) -> tuple[TwoTasks, Any, Plain]:
    """A prepared model, and its plain twin with the same masks."""
    torch.manual_seed(0)
    model = TwoTasks()
    plain = Plain(model, options.get("target_sparsity", 0.8))
    pruner = prepare(model, method=method, weighting="equal", **options)
    for name, layer in zip(plain.masks, pruner.layers, strict=True):
        if layer.mask is not None:
            plain.masks[name] = layer.mask.float()
    return model, pruner, plain


def same(model: nn.Module, plain: Plain) -> None:
    for name in plain.weights:
        found = model.get_submodule(name).weight
        torch.testing.assert_close(
            found, plain.weights[name] * plain.masks[name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("target", [0.4, 0.8])
def test_rigl_equals_the_plain_version(interval: int, target: float) -> None:
    method = RigL(interval=interval)
    model, pruner, plain = start(method, target_sparsity=target)
    before = {name: mask.clone() for name, mask in plain.masks.items()}
    train(model, pruner, torch.optim.SGD(model.parameters(), **SGD), range(STEPS))
    plain_rigl(plain, interval)
    pruner.finalize()
    same(model, plain)
    assert any(not torch.equal(mask, before[name]) for name, mask in plain.masks.items())


def test_rigl_starts_sparse_with_erk_densities_that_stay() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    x = torch.ones(1, 6)
    pruner = prepare(model, method=RigL(interval=2), target_sparsity=0.5)
    assert zeros(pruner) == 84  # in the first forward pass
    wanted = erk_numbers([(12, 6), (5, 12), (3, 12)], 84)
    assert wanted == [30, 29, 25]  # of 30.24, 28.56 and 25.2: 84 times 18, 17 and 15 fiftieths
    kept = [int(layer.mask.sum()) for layer in pruner.layers]
    assert kept == wanted
    seen = model(x)["a"]
    assert not torch.equal(seen, TwoTasks()(x)["a"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = set()
    for step in range(STEPS):
        train(model, pruner, optimizer, [step])
        assert [int(layer.mask.sum()) for layer in pruner.layers] == wanted
        masks.add(tuple(bytes(layer.mask.flatten().tolist()) for layer in pruner.layers))
    assert 3 < len(masks) <= 8  # at the steps 2, 4, ... 14, and never after 15


def test_rigls_masks_depend_on_its_seed_only() -> None:
    def masks(seed: int) -> list[Tensor]:
        return [layer.mask for layer in prepare(TwoTasks(), method=RigL(seed=seed)).layers]

    state = torch.get_rng_state()
    model = TwoTasks()
    after = torch.get_rng_state()
    prepare(model, method=RigL())
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after)
    assert all(map(torch.equal, masks(3), masks(3)))
    assert not all(map(torch.equal, masks(3), masks(4)))


def test_only_steps_before_an_update_compute_the_dense_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, grad = [], torch.autograd.grad
    model = TwoTasks()
    pruner = prepare(model, method=RigL(interval=5))

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(pruner.step_count)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    assert calls == [4, 9]  # the third would be at 15, where they have stopped


def test_gradients_of_several_batches_add_up_and_none_moves_nothing() -> None:
    def masks(batches: list[int]) -> list[Tensor]:
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, method=RigL(interval=1, fraction=0.6), weighting="equal")
        for step in batches:
            pruner.loss(losses(model, step)).backward()
        pruner.step()
        return [layer.mask.clone() for layer in pruner.layers]

    torch.manual_seed(0)
    untouched = [la.mask for la in prepare(TwoTasks(), method=RigL(fraction=0.6)).layers]
    assert all(map(torch.equal, masks([]), untouched))
    model, _, plain = start(RigL(interval=1, fraction=0.6))
    both = [dense_gradient(plain, step) for step in (3, 4)]
    summed = {name: both[0][name] + both[1][name] for name in both[0]}
    drop_grow(plain, summed, 0.3 * (1 + math.cos(math.pi / 15)))
    assert all(map(torch.equal, masks([3, 4]), [m == 1 for m in plain.masks.values()]))
    del model


def test_frozen_layers_move_without_a_gradient() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=RigL(interval=1))
    model.heads["a"].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="requires_grad=False"):
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    assert zeros(pruner) == 134


@given(
    shapes=st.lists(st.sampled_from([(7, 5), (20, 15), (4, 3, 3, 3)]), min_size=1, max_size=4),
    target=st.floats(0, 0.99),
)
def test_rigl_is_exact(shapes: list[tuple[int, ...]], target: float) -> None:
    kinds: dict[int, Any] = {2: nn.Linear, 4: nn.Conv2d}
    model = nn.ModuleList(kinds[len(s)](s[1], s[0], *s[2:3], bias=False) for s in shapes)
    pruner = apply_adapmtl(
        model, target_sparsity=target, total_steps=4, groups={"all": ["*"]}, method=RigL()
    )
    assert zeros(pruner) == round(target * weights(pruner))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = sum((p - 0.3).square().mean() for p in model.parameters())
        pruner.loss({"all": loss}).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    assert sum(int((p == 0).sum()) for p in model.parameters()) == round(
        target * sum(p.numel() for p in model.parameters())
    )


# --- AC/DC --------------------------------------------------------------------------------------


def plain_acdc(plain: Plain, phases: dict[int, bool]) -> None:
    """Projected after each step of a compressed phase; the momentum is reset when it ends."""
    total = sum(weight.numel() for weight in plain.weights.values())
    for step in range(STEPS):
        plain.step(step)
        compressed = phases.get(step + 1)
        if compressed:
            plain.prune(plain.magnitudes(), round(plain.target * total))
        with torch.no_grad():
            for name, weight in plain.weights.items():
                weight *= plain.masks[name]
        if compressed is False:
            plain.masks = {n: torch.ones_like(mask) for n, mask in plain.masks.items()}
            for state in plain.optimizer.state.values():
                state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])


def test_acdc_equals_the_plain_version() -> None:
    model, pruner, plain = start(ACDC())
    train(model, pruner, torch.optim.SGD(model.parameters(), **SGD), range(STEPS))
    # In 20 steps: 2 of warm-up, 13 phases of one step, a dense one of 2, a sparse one of 3.
    phases = {2 + k: k % 2 == 0 for k in range(13)}
    plain_acdc(plain, {**phases, 15: False, 17: True})
    pruner.finalize()
    same(model, plain)


def test_acdcs_phases_are_those_of_the_paper() -> None:
    """100 epochs: 10 dense, every 5 epochs the other, the last dense 10, the last sparse 15."""
    wanted = [(0, False)]
    wanted += [(epoch, (epoch - 10) % 10 == 0) for epoch in range(10, 75, 5)]
    wanted += [(75, False), (85, True)]
    assert ACDC().phases(100) == wanted
    assert ACDC().phases(10_000) == [(100 * epoch, sparse) for epoch, sparse in wanted]
    own = ACDC(warmup=0.2, phase=0.1, last_decompressed=0.2, last_compressed=0.2)
    # Of the four phases of 10 steps that would fit, three of 13.3.
    assert own.phases(100) == [(0, False), (20, True), (33, False), (47, True), (60, False),
                               (80, True)]  # fmt: skip


@given(
    warmup=st.floats(0.01, 0.4), phase=st.floats(0.01, 0.1), dense=st.floats(0.01, 0.25),
    sparse=st.floats(0.01, 0.25), total=st.integers(1, 500),
)  # fmt: skip
def test_acdcs_phases_alternate(
    warmup: float, phase: float, dense: float, sparse: float, total: int
) -> None:
    phases = ACDC(warmup, phase, dense, sparse).phases(total)
    begins = [begin for begin, _ in phases]
    assert begins == sorted(begins)
    assert [compressed for _, compressed in phases] == [k % 2 == 1 for k in range(len(phases))]
    assert phases[-1] == (round((1 - sparse) * total), True)
    lengths = [b - a for a, b in pairwise(begins[1:-1])]
    assert max(lengths) - min(lengths) <= 2
    assert min(lengths) >= phase * total - 1.5


def test_acdc_is_sparse_and_dense_in_turn_and_forgets_the_momentum() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=ACDC(), total_steps=100)
    optimizers = [
        torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model.heads.parameters(), lr=0.01),
    ]
    stranger = torch.nn.Linear(2, 2)
    apart = torch.optim.SGD(stranger.parameters(), lr=0.1, momentum=0.9)
    stranger(torch.ones(1, 2)).sum().backward()
    apart.step()
    for step in range(100):
        pruner.loss(losses(model, step)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pruner.step()
        sparse = [compressed for begin, compressed in ACDC().phases(100) if begin <= step + 1][-1]
        if sparse:
            assert zeros(pruner) >= 134
        if step + 1 in (15, 25, 75):  # lifted: what was pruned starts from zero
            assert all(layer.mask is None for layer in pruner.layers)
            assert zeros(pruner) >= 134
            assert not any(s["momentum_buffer"].any() for s in optimizers[0].state.values())
            assert not any(s["exp_avg"].any() for s in optimizers[1].state.values())
            assert all(s["exp_avg_sq"].any() for s in optimizers[1].state.values())
        if step + 1 in (19, 84):  # all are trained
            assert zeros(pruner) == 0
        if step + 1 == 20:
            assert any(s["momentum_buffer"].any() for s in optimizers[0].state.values())
    assert all(state["momentum_buffer"].any() for state in apart.state.values())
    assert zeros(pruner) == 134


def test_acdc_can_end_in_a_dense_phase() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=ACDC(), total_steps=100)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(17))
    assert zeros(pruner) == 0
    pruner.fix_zeros()
    assert zeros(pruner) == 134


# --- GraNet -------------------------------------------------------------------------------------


def plain_granet(plain: Plain, schedule: SparsitySchedule, interval: int) -> None:
    for step in range(STEPS):
        gradients = dense_gradient(plain, step)
        plain.step(step)
        t = step + 1
        if t == STEPS or (t % interval == 0 and t >= schedule.start * STEPS):
            plain.prune(plain.magnitudes(), plain.due(t, schedule))
        if t < STEPS and t % interval == 0 and t >= schedule.start * STEPS:
            drop_grow(plain, gradients, 0.5 / 2 * (1 + math.cos(math.pi * t / STEPS)))


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    "schedule",
    [
        SparsitySchedule(start=0.0, end=0.6875, initial=0.5),
        SparsitySchedule(start=0.25, end=0.5),
        SparsitySchedule(start=0.3, end=1.0),
    ],
    ids=["sparse", "dense", "late"],
)
def test_granet_equals_the_plain_version(schedule: SparsitySchedule, interval: int) -> None:
    model, pruner, plain = start(GraNet(schedule, interval=interval))
    assert zeros(pruner) == round(schedule.initial * 168)
    train(model, pruner, torch.optim.SGD(model.parameters(), **SGD), range(STEPS))
    plain_granet(plain, schedule, interval)
    pruner.finalize()
    same(model, plain)


def test_granet_follows_its_schedule_while_weights_return() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=GraNet(), total_steps=40)
    assert zeros(pruner) == 84
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    returned = late = 0
    for step in range(40):
        before = [layer.mask for layer in pruner.layers]
        train(model, pruner, optimizer, [step])
        masks = [layer.mask for layer in pruner.layers]
        wanted = GraNet().schedule(step + 1, 40, 0.8)
        assert sum(int((~mask).sum()) for mask in masks) == round(wanted * 168)
        back = sum(int((m & ~b).sum()) for m, b in zip(masks, before, strict=True))
        returned += back
        late += back if step > 0.6875 * 40 else 0
    assert returned > late > 0  # also after the target was reached


# --- Top-KAST -----------------------------------------------------------------------------------


def largest(size: Tensor, number: int) -> Tensor:
    """The largest of a layer, the last ones first if some are equal."""
    order = sorted(range(size.numel()), key=lambda i: (float(size.flatten()[i]), i))
    found = torch.zeros(size.numel())
    found[order[size.numel() - number :]] = 1
    return found.view(size.shape)


def plain_top_kast(
    plain: Plain, used: dict[str, int], widening: float, interval: int, decay: float
) -> None:
    plain.optimizer = torch.optim.SGD(
        plain.model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay
    )
    trained = {}
    for step in range(STEPS):
        if step % interval == 0:
            for name, size in plain.magnitudes().items():
                plain.masks[name] = largest(size, used[name])
                more = min(round(widening * used[name]), size.numel())
                trained[name] = largest(size, more)
        gradients = dense_gradient(plain, step)
        sum(plain.losses(step).values()).backward()
        before = {name: weight.detach().clone() for name, weight in plain.weights.items()}
        for name, weight in plain.weights.items():
            weight.grad = gradients[name] * trained[name]
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in plain.weights.items():
                weight.copy_(torch.where(trained[name] == 1, weight, before[name]))


@pytest.mark.parametrize(
    ("widening", "interval", "decay"), [(2.0, 1, 1e-2), (2.0, 3, 0.0), (1.0, 1, 0.0), (9.0, 2, 0.0)]
)
def test_top_kast_equals_the_plain_version(widening: float, interval: int, decay: float) -> None:
    model, pruner, plain = start(TopKAST(widening, interval))
    used = {name: int(mask.sum()) for name, mask in plain.masks.items()}
    first = dict(plain.masks)
    assert sum(used.values()) == 34
    assert all(abs(n - 0.2 * plain.masks[name].numel()) < 1 for name, n in used.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    train(model, pruner, optimizer, range(STEPS))
    plain_top_kast(plain, used, widening, interval, decay)
    pruner.finalize()
    same(model, plain)
    assert any(not torch.equal(mask, first[name]) for name, mask in plain.masks.items())


def test_top_kast_trains_more_than_it_uses_until_the_end() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=TopKAST(interval=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS + 2):
        assert zeros(pruner) == 134
        pruner.loss(losses(model, step)).backward()
        for layer in pruner.layers:
            gradients, used = int((layer.weight.grad != 0).sum()), int(layer.mask.sum())
            assert gradients <= (2 * used if step < STEPS else used)
            if step < STEPS and layer.name != "body.weight":  # where no gradient is 0 by chance
                assert gradients == 2 * used
        optimizer.step()
        optimizer.zero_grad()
        if step < STEPS:
            pruner.step()


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [RigL(interval=10), ACDC(), GraNet(interval=10), TopKAST(interval=10)], ids=str
)
def test_a_step_without_an_update_never_waits_for_the_device(method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=method, total_steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, [0])  # the first call looks at the weights
    for step in range(1, 20):
        if pruner.controller.due(step + 1):
            train(model, pruner, optimizer, [step])
            continue
        found = losses(model, step)
        with refused():
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
