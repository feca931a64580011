"""The baselines, each against a plain version of it: explicit masks in an ordinary loop."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from refusals import Error, raises
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from toys import TwoTasks, batch, initialise, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import (
    ACDC,
    SNIP,
    DiSparse,
    GraNet,
    IterativeMagnitude,
    Magnitude,
    RigL,
    SparsitySchedule,
    Taylor,
    TopKAST,
)

# Layers of a dozen weights do lose them all: nothing in these methods keeps any.
pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")

NAMES = ("body", "heads.a", "heads.b")
STEPS, TARGET = 20, 0.8
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
METHODS: dict[str, Any] = {
    "global": Magnitude(),
    "uniform": Magnitude("uniform"),
    "one-shot": Magnitude(schedule=SparsitySchedule(start=0.5, end=0.5)),
    "Taylor": Taylor(),
    "SNIP": SNIP(),
    "SNIP, 3 batches": SNIP(batches=3),
    "DiSparse": DiSparse(),
    "DiSparse dynamic": DiSparse(dynamic=True),
    "DiSparse, every 4 steps": DiSparse(dynamic=True, interval=4),
    "AC/DC": ACDC(),
    "GraNet": GraNet(),
    "GraNet, dense, every 4 steps": GraNet(SparsitySchedule(), interval=4),
    "Top-KAST": TopKAST(),
    "Top-KAST, every 4 steps": TopKAST(interval=4),
    "RigL": RigL(),
    "RigL, every 4 steps": RigL(interval=4),
    "IMP": IterativeMagnitude(rounds=3),
    "LTH": IterativeMagnitude(rounds=3, rewind=True),
}


class Branched(TwoTasks):
    """A shared residual branch between body and heads; its norm starts at zero, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        h = h + self.norm(self.branch(h))
        return {task: head(h) for task, head in self.heads.items()}


class Plain:
    """A net with a mask for each weight, and a rule that says when they change and how."""

    def __init__(self, model: TwoTasks, target: float) -> None:
        self.model, self.target = copy.deepcopy(model), target
        self.start = tensors(self.model)
        self.weights = {
            name: module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.masks = {name: torch.ones_like(weight) for name, weight in self.weights.items()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.saliency = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def losses(self, step: int, seen: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """On the batch of a step, with the weights that the net is to see, or else the masked."""
        seen = seen or {name: w * self.masks[name] for name, w in self.weights.items()}
        x, targets = batch(step)
        outputs = functional_call(self.model, {f"{n}.weight": w for n, w in seen.items()}, x)
        return {task: (outputs[task] - y).square().mean() for task, y in targets.items()}

    def step(self, step: int) -> None:
        sum(self.losses(step).values()).backward()
        for name, weight in self.weights.items():
            effect = (weight.detach() * weight.grad) ** 2
            self.saliency[name] = 0.95 * self.saliency[name] + 0.05 * effect
        self.optimizer.step()
        self.optimizer.zero_grad()

    def prune(self, scores: dict[str, Tensor], count: int) -> None:
        """Mask the `count` lowest scores; what is masked stays so; ties in order."""
        order = []
        for place, name in enumerate(scores):
            for i, score in enumerate(scores[name].flatten().tolist()):
                gone = self.masks[name].flatten()[i] == 0
                order.append((-1.0 if gone else score, place, i, name))
        for _, _, i, name in sorted(order)[:count]:
            self.masks[name].view(-1)[i] = 0

    def gradients(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Of each task's loss for the weights it depends on as the net sees them, the gone too."""
        found = {}
        for task in ("a", "b"):
            names = [n for n in self.weights if not n.startswith("heads") or n == f"heads.{task}"]
            seen = {
                n: (w * self.masks[n]).detach().requires_grad_() for n, w in self.weights.items()
            }
            loss = self.losses(step, seen)[task]
            gradients = torch.autograd.grad(loss, [seen[n] for n in names])
            found[task] = dict(zip(names, gradients, strict=True))
        return found

    def sensitivities(self) -> dict[str, dict[str, Tensor]]:
        """Of each task on the first batch, with nothing gone yet."""
        return {
            task: {n: (self.weights[n] * gradient).abs().detach() for n, gradient in own.items()}
            for task, own in self.gradients(0).items()
        }

    def highest_ranks(self, scores: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The share of a task's other weights that score lower; of all tasks the highest."""
        best = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for own in scores.values():
            pool = torch.cat([score.flatten() for score in own.values()])
            for name, score in own.items():
                for i, value in enumerate(score.flatten()):
                    rank = int((pool < value).sum()) / (len(pool) - 1)
                    best[name].view(-1)[i] = max(float(best[name].view(-1)[i]), rank)
        return best

    @torch.no_grad()
    def move(self, name: str, wanted: Tensor, share: float) -> None:
        """Drop a share of a layer's smallest weights; of those gone before, grow the most wanted.

        As many as go, from zero.
        """
        mask, weight = self.masks[name].view(-1), self.weights[name].view(-1)
        alive = [i for i in range(len(mask)) if mask[i] == 1]
        gone = [i for i in range(len(mask)) if mask[i] == 0]
        count = min(int(share * len(alive)), len(gone))
        dropped = sorted(alive, key=lambda i: abs(float(weight[i])))[:count]
        grown = sorted(gone, key=lambda i: -float(wanted.view(-1)[i]))[:count]
        for i in dropped:
            mask[i], weight[i] = 0, 0
        for i in grown:
            mask[i], weight[i] = 1, 0

    def due(self, step: int, schedule: SparsitySchedule) -> int:
        """The number of zeros that a schedule asks for after a step."""
        total = sum(weight.numel() for weight in self.weights.values())
        return round(schedule(step, STEPS, self.target) * total)

    def magnitudes(self) -> dict[str, Tensor]:
        return {name: weight.detach().abs() for name, weight in self.weights.items()}


def plain_gradual(plain: Plain, schedule: SparsitySchedule, uniform: bool, taylor: bool) -> None:
    for step in range(STEPS):
        plain.step(step)
        count = plain.due(step + 1, schedule)
        scores = plain.saliency if taylor else plain.magnitudes()
        if not uniform:
            plain.prune(scores, count)
            continue
        sizes = [weight.numel() for weight in plain.weights.values()]
        upto = [count * sum(sizes[:k]) // sum(sizes) for k in range(len(sizes) + 1)]
        for name, low, high in zip(plain.weights, upto[:-1], upto[1:], strict=True):
            plain.prune({name: scores[name]}, high - low)


def plain_snip(plain: Plain) -> None:
    found = torch.autograd.grad(sum(plain.losses(0).values()), list(plain.weights.values()))
    sensitivity = {
        name: (weight * gradient).abs().detach()
        for (name, weight), gradient in zip(plain.weights.items(), found, strict=True)
    }
    plain.step(0)  # the masks come between this forward pass and the next
    plain.prune(sensitivity, plain.due(STEPS, SparsitySchedule()))
    for step in range(1, STEPS):
        plain.step(step)


def plain_disparse(plain: Plain) -> None:
    best = plain.highest_ranks(plain.sensitivities())
    plain.step(0)
    plain.prune(best, plain.due(STEPS, SparsitySchedule()))
    for step in range(1, STEPS):
        plain.step(step)


def plain_disparse_dynamic(plain: Plain, interval: int) -> None:
    for step in range(STEPS):
        by_gradient = plain.highest_ranks({
            task: {name: gradient.abs() for name, gradient in own.items()}
            for task, own in plain.gradients(step).items()
        })  # fmt: skip
        by_sensitivity = plain.highest_ranks(plain.sensitivities()) if step == 0 else {}
        plain.step(step)
        if step == 0:
            plain.prune(by_sensitivity, plain.due(STEPS, SparsitySchedule()))
        end = 0.75 * STEPS
        if (step + 1) % interval == 0 and step + 1 < end:
            share = 0.3 * (1 + math.cos(math.pi * (step + 1) / end)) / 2
            for name in plain.weights:
                plain.move(name, by_gradient[name], share)


def plain_iterative(plain: Plain, rewind: bool) -> None:
    total = sum(weight.numel() for weight in plain.weights.values())
    for step in range(STEPS):
        plain.step(step)
        if step + 1 in (5, 10, 15):
            plain.prune(plain.magnitudes(), round((1 - 0.2 ** ((step + 1) / 15)) * total))
            if rewind:
                with torch.no_grad():
                    for name, tensor in plain.model.state_dict().items():
                        tensor.copy_(plain.start[name])


GRADUAL = SparsitySchedule()
ORACLES: dict[str, Callable[[Plain], None]] = {
    "global": lambda p: plain_gradual(p, GRADUAL, uniform=False, taylor=False),
    "uniform": lambda p: plain_gradual(p, GRADUAL, uniform=True, taylor=False),
    "one-shot": lambda p: plain_gradual(
        p, SparsitySchedule(start=0.5, end=0.5), uniform=False, taylor=False
    ),
    "Taylor": lambda p: plain_gradual(p, GRADUAL, uniform=False, taylor=True),
    "SNIP": plain_snip,
    "DiSparse": plain_disparse,
    "DiSparse dynamic": lambda p: plain_disparse_dynamic(p, interval=1),
    "DiSparse, every 4 steps": lambda p: plain_disparse_dynamic(p, interval=4),
    "IMP": lambda p: plain_iterative(p, rewind=False),
    "LTH": lambda p: plain_iterative(p, rewind=True),
}


def check_equals_the_plain_version(name: str, kind: type[TwoTasks], target: float) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = Plain(model, target)
    pruner = prepare(model, method=METHODS[name], weighting="equal", target_sparsity=target)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    train(model, pruner, optimizer, range(STEPS))
    ORACLES[name](plain)
    pruner.finalize()
    for layer in plain.weights:
        expected = plain.weights[layer] * plain.masks[layer]
        found = model.get_submodule(layer).weight
        assert torch.equal(found == 0, plain.masks[layer] == 0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    gone = sum(int((mask == 0).sum()) for mask in plain.masks.values())
    assert gone == round(target * weights(pruner))


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_plain_version(name: str) -> None:
    check_equals_the_plain_version(name, TwoTasks, TARGET)


@pytest.mark.parametrize("target", [0.45, TARGET])  # of 312: less than the branch, and more
@pytest.mark.parametrize("name", [name for name in ORACLES if "SNIP" in name or "Di" in name])
@pytest.mark.filterwarnings("ignore:46% of the prunable weights")
def test_equals_the_plain_version_where_a_whole_layer_ties_at_zero(
    name: str, target: float
) -> None:
    check_equals_the_plain_version(name, Branched, target)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", [0.0, 0.37, 0.95])
@pytest.mark.parametrize("total", [1, 7, 20])
def test_every_baseline_is_exact(name: str, target: float, total: int) -> None:
    model = TwoTasks()
    keys = list(model.state_dict())
    options = {"total_steps": total, "target_sparsity": target, "weighting": "equal"}
    pruner = prepare(model, method=METHODS[name], **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
    train(model, pruner, optimizer, range(total))
    wanted = round(target * weights(pruner))
    assert zeros(pruner) == wanted
    sum(losses(model, 99).values()).backward()
    optimizer.step()
    assert zeros(pruner) == wanted
    pruner.finalize()
    assert list(model.state_dict()) == keys
    assert sum(int((model.get_submodule(n).weight == 0).sum()) for n in NAMES) == wanted


@pytest.mark.parametrize("stop", [7, 8])  # before a step after which masks move, and after it
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_and_a_loaded_state_go_on_as_the_original(name: str, stop: int) -> None:
    def make() -> tuple[TwoTasks, Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, method=METHODS[name], weighting="equal")
        return model, pruner, torch.optim.SGD(model.parameters(), **SGD)

    model, pruner, optimizer = make()
    train(model, pruner, optimizer, range(stop))
    copied = copy.deepcopy(model)
    again = torch.optim.SGD(copied.parameters(), **SGD)
    loaded, other, own = make()
    loaded.load_state_dict(model.state_dict())
    for new in (again, own):
        new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, pruner, optimizer, range(stop, STEPS))
    train(loaded, other, own, range(stop, STEPS))
    train(copied, copied.adapmtl, again, range(stop, STEPS))  # type: ignore[arg-type]
    for twin in (loaded, copied):
        twin.adapmtl.finalize()  # type: ignore[operator,union-attr]
    pruner.finalize()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert torch.equal(copied.state_dict()[key], value)


def scored(model: nn.Module, method: Any, **options: Any) -> list[str]:
    """What scoring the first three batches warns of."""
    pruner = prepare(model, method=method, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert all(warning.category is UserWarning for warning in caught)
    assert all(warning.filename == toys.__file__ for warning in caught)  # the caller's line
    return [str(warning.message) for warning in caught]


ONE_SHOT = pytest.mark.parametrize(
    "method", [SNIP(), DiSparse(), DiSparse(dynamic=True)], ids=["SNIP", "DiSparse", "dynamic"]
)


@ONE_SHOT
def test_a_branch_that_starts_at_zero_is_warned_of_once(method: Any) -> None:
    (text,) = scored(Branched(), method)
    assert re.search(
        r"^46% of the prunable weights score exactly zero .*zero_init_last=False", text
    )
    masked = Branched()
    prune.random_unstructured(masked.body, "weight", amount=40)  # 144 of the 272 that are left
    (text,) = scored(masked, method)
    assert text.startswith("53% of")


@ONE_SHOT
def test_what_has_an_effect_is_not_warned_of(method: Any) -> None:
    assert scored(TwoTasks(), method) == []
    assert scored(Branched(), method, target_sparsity=0.0) == []  # nothing is pruned
    started = Branched()
    nn.init.ones_(started.norm.weight)
    assert scored(started, method) == []
    little = TwoTasks()
    nn.init.zeros_(little.body.weight[:2])  # 12 of 168
    assert scored(little, method) == []
    tied = TwoTasks()
    initialise(tied, "constant")  # ties, and none of them at zero
    assert scored(tied, method) == []


def test_later_batches_find_a_branch_that_started_at_zero() -> None:
    assert scored(Branched(), SNIP(batches=2)) == []


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_an_earlier_mask_counts_and_stays(method: Any) -> None:
    model = TwoTasks()
    prune.random_unstructured(model.body, "weight", amount=40)
    before = model.body.weight_mask == 0
    pruner = prepare(model, method=method, weighting="equal")
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    assert zeros(pruner) == 134
    pruner.finalize()
    assert ((model.body.weight == 0) & before).sum() == 40
    model = TwoTasks()
    prune.random_unstructured(model.body, "weight", amount=40)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"asks for 17 zeros, but masks .* hold 40"):
        prepare(model, method=method, target_sparsity=0.1)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("make", "options", "error", "named", "found", "remedy"),
    [
        (Magnitude, {"scope": "layer"}, ValueError, "scope", "'layer'", "'global', 'uniform'"),
        (Taylor, {"decay": 1.0}, ValueError, "decay", "got 1.0", "in [0, 1)"),
        (Taylor, {"decay": "x"}, TypeError, "decay", "'x'", "be a number"),
        (SNIP, {"batches": 0}, ValueError, "batches", "got 0", "an integer >= 1"),
        (SNIP, {"batches": 1.5}, ValueError, "batches", "got 1.5", "an integer >= 1"),
        (IterativeMagnitude, {"rounds": 0}, ValueError, "rounds", "got 0", "an integer >= 1"),
        (IterativeMagnitude, {"rounds": True}, ValueError, "rounds", "got True", "an integer >= 1"),
        (DiSparse, {"fraction": 1.0}, ValueError, "fraction", "got 1.0", "in (0, 1)"),
        (DiSparse, {"fraction": "x"}, TypeError, "fraction", "'x'", "be a number"),
        (DiSparse, {"interval": 0}, ValueError, "interval", "got 0", "an integer >= 1"),
        (ACDC, {"warmup": 0.0}, ValueError, "warmup", "got 0.0", "in (0, 1)"),
        (ACDC, {"phase": 1.0}, ValueError, "phase", "got 1.0", "in (0, 1)"),
        (ACDC, {"last_compressed": "x"}, TypeError, "last_compressed", "'x'", "be a number"),
        (ACDC, {"warmup": 0.8}, ValueError, "phase=0.05", "warmup=0.8", "sum to at most 1"),
        (GraNet, {"fraction": 0.0}, ValueError, "fraction", "got 0.0", "in (0, 1)"),
        (GraNet, {"interval": 0}, ValueError, "interval", "got 0", "an integer >= 1"),
        (TopKAST, {"widening": 0.5}, ValueError, "widening", "got 0.5", "at least 1"),
        (TopKAST, {"widening": "x"}, TypeError, "widening", "'x'", "be a number"),
        (TopKAST, {"interval": 0}, ValueError, "interval", "got 0", "an integer >= 1"),
        (RigL, {"fraction": 1.0}, ValueError, "fraction", "got 1.0", "in (0, 1)"),
        (RigL, {"fraction": "x"}, TypeError, "fraction", "'x'", "be a number"),
        (RigL, {"interval": 0}, ValueError, "interval", "got 0", "an integer >= 1"),
        (RigL, {"end": 1.5}, ValueError, "end", "got 1.5", "in [0, 1]"),
        (RigL, {"seed": -1}, ValueError, "seed", "got -1", "an integer >= 0"),
    ],
    ids=str,
)
def test_refused(
    make: Any, options: Any, error: Error, named: str, found: str, remedy: str
) -> None:
    raises(lambda: make(**options), error, named, found, remedy)


@pytest.mark.parametrize("make", [Magnitude, Taylor, GraNet])
def test_a_schedule_by_name_is_refused(make: Any) -> None:
    raises(lambda: make(schedule="linear"), TypeError, "schedule", "'linear'", "SparsitySchedule(")
