"""Frameworks that hold the loop, and loggers: Accelerate, TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import EARLY, assert_like, plain
from toys import TwoTasks, losses, prepare, weights, zeros

from torch_adapmtl import Pruner


@pytest.fixture
def _their_warnings() -> Iterator[None]:
    """Frameworks warn of what is none of our business: workers, folders, their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("attach", ["by hand", "optimizer", "prepared optimizer"])
@pytest.mark.parametrize("stop", [None, 7, 16])
def test_accelerate(attach: str, stop: int | None, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def start() -> tuple[Any, ...]:
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        model = TwoTasks()
        pruner = prepare(model, schedule=EARLY)
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-2)
        if attach == "optimizer":
            pruner.attach(optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        if attach == "prepared optimizer":
            pruner.attach(optimizer)
        return accelerator, model, pruner, optimizer

    accelerator, model, pruner, optimizer = start()
    for index in range(20):
        if index == stop:
            accelerator.save_state(tmp_path)
            accelerator, model, pruner, optimizer = start()
            accelerator.load_state(tmp_path)
            assert pruner.report().step == stop
        accelerator.backward(pruner.loss(losses(model, index)))
        optimizer.step()
        optimizer.zero_grad()
        if attach == "by hand":
            pruner.step()
    assert_like(pruner.finalize(), plain(20))


# --- TensorBoard --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_their_warnings")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    pruner = prepare(TwoTasks())
    assert isinstance(pruner, Pruner)
    writer = SummaryWriter(str(tmp_path))
    for step in range(20):
        pruner.step()
        for name, value in pruner.report().scalars().items():
            writer.add_scalar(name, value, step)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"sparsity/{name}" for name in ("overall", "shared", "a", "b")),
        *(f"threshold_{end}/{name}" for end in ("min", "max") for name in ("shared", "a", "b")),
        *(f"task_weight/{name}" for name in ("a", "b")),
    }
    last = events.Scalars("sparsity/overall")[-1].value
    assert last == pytest.approx(zeros(pruner) / weights(pruner))
