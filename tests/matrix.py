"""The conformance matrix: what is done to a model at four stages of its run, and what comes of it.

A row either changes something once (`act`) or trains in a loop of its own (`loop`); everything
else is the same for all rows. A run that something was done to ends exactly at its target; if
nothing but the form changed, it ends bit for bit as a run that nothing was done to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, pruned

from torch_adapmtl import (
    Adaptive,
    Pruner,
    SparsitySchedule,
    apply_adapmtl,
    keep_zeros,
    release_zeros,
)
from torch_adapmtl.tensor.torch_prune import find_threshold

STAGES = ("before training", "mid-run", "at the end", "after finalize")
STEPS, MIDDLE, MORE = 12, 6, 3
TARGET = 0.8
#: Options of every run, such as `count`; a test may set some for its time.
COMMON: dict[str, Any] = {}


@dataclass
class Run:
    """A run at some stage.

    Attributes:
        net: The model that is pruned.
        pruner: Its pruner, or None after `finalize`.
        optimizer: What trains it.
        step: How many steps it has taken.
        call: What is called in its place, wrapped or compiled.
        names: The prunable tensors.
        attached: Whether the optimiser moves the schedule.
    """

    net: nn.Module
    pruner: Pruner | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    call: Any = None
    names: tuple[str, ...] = ()
    attached: bool = False

    def losses(self, step: int) -> dict[str, Tensor]:
        return losses(self.net if self.call is None else self.call, step)

    def loss(self, step: int) -> Tensor:
        found = self.losses(step)
        return sum(found.values()) if self.pruner is None else self.pruner.loss(found)  # type: ignore[return-value]

    def advance(self) -> None:
        """After a step of the optimiser."""
        if self.pruner is not None and self.step < STEPS and not self.attached:
            self.pruner.step()
        self.step += 1

    def outputs(self) -> dict[str, Tensor]:
        """In evaluation."""
        net, like = self.net.eval(), next(self.net.parameters())
        with torch.no_grad():
            found = dict(net(batch(99)[0].to(like.device, like.dtype)))
        net.train()
        return found

    def zeros(self) -> int:
        """The zeros in the weights as the model has them now."""
        paths = [name.rpartition(".") for name in self.names]
        found = [getattr(self.net.get_submodule(path), last) for path, _, last in paths]
        return sum(int((weight == 0).sum()) for weight in found)

    def assert_met(self) -> None:
        """Check that the zeros meet the target, of weights or of multiply-adds."""
        assert self.pruner is not None
        positions = self.pruner._config["count"].get("positions", dict.fromkeys(self.names, 1))
        saved, total = 0.0, 0.0
        for name in self.names:
            path, _, last = name.rpartition(".")
            weight = getattr(self.net.get_submodule(path), last)
            saved += positions[name] * int((weight == 0).sum())
            total += positions[name] * weight.numel()
        if "count" in COMMON:
            assert abs(saved - TARGET * total) < max(positions.values())
        else:
            assert saved == round(TARGET * total)

    @property
    def weights(self) -> int:
        paths = [name.rpartition(".") for name in self.names]
        return sum(getattr(self.net.get_submodule(p), last).numel() for p, _, last in paths)


def prepare(net: nn.Module, **options: Any) -> Pruner:
    defaults: dict[str, Any] = {
        "target_sparsity": TARGET, "total_steps": STEPS, "example_inputs": torch.ones(2, 6),
        "method": Adaptive(schedule=SparsitySchedule(start=0.0, end=0.5)),
        "weighting": "stability",  # which has a state
    }  # fmt: skip
    return apply_adapmtl(net, **{**defaults, **COMMON, **options})


def adam(run_or_net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(run_or_net.parameters(), lr=1e-2)


def plain_loop(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.loss(run.step).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.advance()


def start(stage: str, make: Callable[[], nn.Module] = TwoTasks, **options: Any) -> Run:
    """A run at a stage; the same for the same arguments."""
    torch.manual_seed(0)
    net = make()
    pruner = prepare(net, **options)
    names = tuple(tensor.name for tensor in pruned(pruner))
    run = Run(net, pruner, adam(net), names=names)
    plain_loop(run, {"before training": 0, "mid-run": MIDDLE}.get(stage, STEPS))
    if stage == "after finalize":
        pruner.finalize()
        run.pruner, run.optimizer = None, adam(net)
    return run


Loop = Callable[[Run, int], None]


@dataclass(frozen=True)
class Row:
    """One thing people do.

    Attributes:
        act: What is done to the run; it returns the run to go on with.
        loop: How it is trained from there on.
        same: Whether the run ends bit for bit as if nothing had been done.
        make: The model.
        options: What `apply_adapmtl` is given besides.
        raises: Stages at which it cannot work: what is raised, and what it says.
        needs: A package.
    """

    act: Callable[[Run], Run] = lambda run: run
    loop: Loop = plain_loop
    same: bool = False
    make: Callable[[], nn.Module] = TwoTasks
    options: Mapping[str, Any] = field(default_factory=dict)
    raises: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)
    needs: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is about the model and the options that most rows share."""
        return self.make is TwoTasks and not self.options


def finish(run: Run, loop: Loop) -> dict[str, Tensor]:
    """Train to the end and a little beyond, finalize, and check what the library promises."""
    if run.pruner is None:
        wanted = run.zeros()
        keep_zeros(run.net)
        loop(run, MORE)
        before = run.outputs()
        release_zeros(run.net)
    else:
        loop(run, max(0, STEPS - run.step) + MORE)
        run.assert_met()
        wanted = run.zeros()
        before = run.outputs()  # last: spectral_norm moves whenever a weight is looked at
        assert run.pruner.finalize() is run.net
    after = run.outputs()
    assert all(torch.equal(out, before[task]) for task, out in after.items())
    assert run.zeros() == wanted
    assert find_threshold(run.net) is None
    assert not hasattr(run.net, "adapmtl")
    return {k: v.clone() for k, v in run.net.state_dict().items()}


def check(row: Row, stage: str) -> None:
    """Run a cell; an assertion fails if it does not hold what it promises."""
    run = start(stage, row.make, **row.options)
    before = run.outputs() if row.same else {}
    run = row.act(run)
    for task, out in before.items():
        assert torch.equal(run.outputs()[task], out)
    found = finish(run, row.loop)
    if row.same:
        oracle = _untouched(stage) if row.plain and not COMMON else _finished(row, stage)
        for key, value in oracle.items():
            assert torch.equal(found[key], value), key


def _finished(row: Row, stage: str) -> dict[str, Tensor]:
    """How a run ends that nothing was done to."""
    return finish(start(stage, row.make, **row.options), plain_loop)


@functools.cache
def _untouched(stage: str) -> dict[str, Tensor]:
    return _finished(Row(), stage)
