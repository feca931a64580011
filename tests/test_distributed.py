"""Several processes that train one model: data-parallel, and sharded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import two_that_meet
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, tensors, train, zeros

from torch_adapmtl import (
    ACDC,
    SNIP,
    ST3,
    STR,
    DiSparse,
    GraNet,
    Paper,
    Pruner,
    RigL,
    SparsitySchedule,
    StabilityWeighting,
    Taylor,
    TopKAST,
)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)

EARLY = SparsitySchedule(start=0.0, end=0.5)

TOGETHER: dict[str, dict[str, Any]] = {
    "lamp": {},
    "sensitivity": {"allocation": "sensitivity"},
    "gradient": {"allocation": "gradient"},
    "paper": {"method": Paper(start=-3.0, weight_decay=0.1), "target_sparsity": 0.3},
    "taylor": {"method": Taylor()},
    "st3": {"method": ST3()},
    "str": {"method": STR(start=-1.2, weight_decay=0.1)},
    "snip": {"method": SNIP()},
    "disparse": {"method": DiSparse(dynamic=True)},
    "acdc": {"method": ACDC()},
    "granet": {"method": GraNet()},
    "top-kast": {"method": TopKAST(interval=3)},
    "rigl": {"method": RigL(interval=3)},
    "given": {"allocation": "sensitivity", "wrap_first": True},
}


def _train_one_of_two(rank: int, folder: str) -> None:
    for name, options in TOGETHER.items():
        torch.manual_seed(rank)  # DistributedDataParallel makes the weights equal
        model = TwoTasks()
        wrapped: nn.Module = model
        wrap_first = options.get("wrap_first", False)
        options = {key: value for key, value in options.items() if key != "wrap_first"}
        if "method" not in options:
            options["schedule"] = EARLY
        if wrap_first:
            wrapped = nn.parallel.DistributedDataParallel(model)
        pruner = prepare(wrapped, **options)
        if not wrap_first:
            unused = {"find_unused_parameters": True}  # a task that is missing reaches no head
            wrapped = nn.parallel.DistributedDataParallel(model, **unused)
        optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
        steps, local = [], []
        for step in range(20):
            found: dict[str, Tensor | None] = dict(losses(wrapped, step, rank))
            if (step + rank) % 3 == 0 and not wrap_first:
                found["b"] = None  # the other process has it
            local.append(losses(model, step, rank)["a"].item())
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            masks = [layer.threshold.mask for layer in pruner.layers]
            steps.append(
                {
                    "thresholds": pruner.controller.thresholds().clone(),
                    "masks": torch.cat([mask.flatten() for mask in masks if mask is not None])
                    if any(mask is not None for mask in masks)
                    else torch.ones(0),
                    "weights": pruner.weighting.weights().clone(),
                    "history": pruner.recorder.rows.clone(),
                }
            )
        found_zeros = zeros(pruner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the paper's mode misses its target
            assert pruner.finalize() is model
        torch.save((steps, local, found_zeros, tensors(model)), f"{folder}/{name}{rank}.pt")


def test_two_processes_agree(tmp_path: Path) -> None:
    """At every step, though they see other batches and other tasks."""
    two_that_meet(_train_one_of_two, tmp_path)
    for name in TOGETHER:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        for here, there in zip(first[0], second[0], strict=True):
            for what, value in here.items():
                assert torch.equal(value, there[what]), (name, what)
        assert first[1] != second[1]  # they did see other batches
        assert first[2] == second[2]
        if name != "paper":
            assert first[2] == round(0.8 * 168)
        assert len({tuple(step["weights"].tolist()) for step in first[0]}) > 1
        assert all(torch.equal(value, second[3][key]) for key, value in first[3].items())


def _nan_in_one(rank: int, folder: str) -> None:
    for strict in (False, True):
        _until_told(rank, strict)


def _until_told(rank: int, strict: bool) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    weighting = StabilityWeighting(["a", "b"], window=10, start=0, strict=strict)
    pruner = prepare(model, total_steps=600, weighting=weighting)
    wrapped = nn.parallel.DistributedDataParallel(model)  # copies buffers from the first
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def one(step: int) -> None:
        found = losses(wrapped, step, rank)
        if rank == 1 and step == 12:
            found["b"] = found["b"] * torch.nan
        pruner.loss(found).backward()
        if step != 12:  # as a gradient scaler would
            optimizer.step()
        optimizer.zero_grad()
        pruner.step()

    update = next(n for n in range(13, 30) if pruner.controller.due(n)) - 1
    told = 12 if strict else update
    for step in range(told):
        one(step)
    with pytest.raises(RuntimeError, match=r"loss of the tasks 'b' \(1x\)"):
        one(told)


def test_a_nan_in_one_process_is_told_in_all(tmp_path: Path) -> None:
    two_that_meet(_nan_in_one, tmp_path)


# --- sharded ------------------------------------------------------------------------------------


def _shard(
    state: dict[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, Pruner, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, schedule=EARLY, **options)
    if state is not None:
        model.load_state_dict(state)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2)


def _train(
    model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: range, rank: int
) -> None:
    for step in steps:
        pruner.loss(losses(model, step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


def _one_shard(rank: int, folder: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    gathered = StateDictOptions(full_state_dict=True)

    model, pruner, optimizer = _shard()
    for start, stop in ((0, 9), (9, 16), (16, 20)):  # while the zeros move, and when they are held
        _train(model, pruner, optimizer, range(start, stop), rank)
        now = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(now, checkpoint_id=f"{folder}/{stop}")
        # A state of the whole model may be loaded before the model is sharded.
        full = get_model_state_dict(model, options=gathered)
        again = get_model_state_dict(_shard(full)[0], options=gathered)
        assert all(torch.equal(value, full[key]) for key, value in again.items())
    assert pruner.sparsity() == round(0.8 * 168) / 168
    full = get_model_state_dict(model, options=gathered)
    with pytest.raises(RuntimeError, match=r"sharded.*get_model_state_dict.*finalize this one"):
        pruner.finalize()

    for stop in (9, 16):
        model, pruner, optimizer = _shard()
        now = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(now, checkpoint_id=f"{folder}/{stop}")
        set_state_dict(
            model, optimizer, model_state_dict=now["model"], optim_state_dict=now["optimizer"]
        )
        assert pruner.report().step == stop
        _train(model, pruner, optimizer, range(stop, 20), rank)
        again = get_model_state_dict(model, options=gathered)
        differing = [key for key, value in again.items() if not torch.equal(value, full[key])]
        assert not differing, (stop, differing)

    model, pruner, optimizer = _shard(allocation="sensitivity")
    with pytest.raises(RuntimeError, match=r"is sharded \(fully_shard\).*use allocation='lamp'"):
        _train(model, pruner, optimizer, range(20), rank)
    torch.save(full, f"{folder}/full{rank}.pt")


def test_a_sharded_model_is_pruned_like_a_whole_one(tmp_path: Path) -> None:
    two_that_meet(_one_shard, tmp_path)
    first, second = (torch.load(tmp_path / f"full{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())

    gathered = TwoTasks()
    pruner = prepare(gathered, schedule=EARLY)
    gathered.load_state_dict(first)
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * 168)

    torch.manual_seed(0)  # one process that sees the batches of both
    model = TwoTasks()
    pruner = prepare(model, schedule=EARLY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(20):
        both = [losses(model, step, rank) for rank in range(2)]
        pruner.loss({task: (both[0][task] + both[1][task]) / 2 for task in both[0]}).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    pruner.finalize()
    for mine, theirs in zip(gathered.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine == 0, theirs == 0)
        torch.testing.assert_close(mine, theirs)


def _alone(rank: int, folder: str) -> None:
    torch.manual_seed(rank)
    model = TwoTasks()
    pruner = prepare(
        model, schedule=EARLY, allocation="sensitivity", synchronize=False, total_steps=20 + rank
    )
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20 + rank))
    assert zeros(pruner) == round(0.8 * 168)


def test_processes_with_models_of_their_own(tmp_path: Path) -> None:
    """With different numbers of steps, so that any exchange would never end."""
    two_that_meet(_alone, tmp_path)


def _measured_on_other_sizes(rank: int, folder: str) -> None:
    inputs = torch.ones(2, 3 + 4 * rank, 6)
    pruner = prepare(TwoTasks(), count="macs", example_inputs=inputs)
    alone = prepare(TwoTasks(), count="macs", example_inputs=inputs, synchronize=False)
    torch.save((pruner.layers.costs, alone.layers.costs), f"{folder}/{rank}.pt")


def test_all_processes_count_as_the_first_one(tmp_path: Path) -> None:
    two_that_meet(_measured_on_other_sizes, tmp_path)
    for rank in range(2):
        together, alone = torch.load(tmp_path / f"{rank}.pt")
        assert together == [3, 3, 3]
        assert alone == [3 + 4 * rank] * 3
