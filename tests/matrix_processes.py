"""The rows of the conformance matrix that take two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matrix import (
    COMMON,
    MORE,
    STAGES,
    STEPS,
    Run,
    adam,
    start,
)
from processes import two_that_meet
from torch import Tensor, nn

from torch_adapmtl import (
    keep_zeros,
    release_zeros,
)

PROCESSES = {
    "`DistributedDataParallel`, two processes": "ddp",
    "`fully_shard` (FSDP2), two processes": "fsdp",
    "`fully_shard` through a distributed checkpoint": "dcp",
}


def in_two_processes(
    kind: str, folder: Path, common: dict[str, Any] | None = None
) -> dict[str, list[Any]]:
    """What becomes of the run at every stage, in each of two processes.

    Args:
        kind: One of `PROCESSES`.
        folder: Where to write.
        common: Options of every run, as `matrix.COMMON`.
    """
    two_that_meet(_process, folder, kind, common or {})
    both = [torch.load(folder / f"{kind}{rank}.pt") for rank in range(2)]
    return {stage: [one[stage] for one in both] for stage in STAGES}


def _process(rank: int, folder: str, kind: str, common: dict[str, Any]) -> None:
    COMMON.update(common)
    found = {
        stage: _distributed(start(stage), kind, rank, f"{folder}/{kind} {stage}")
        for stage in STAGES
    }
    torch.save(found, f"{folder}/{kind}{rank}.pt")


def _distributed(run: Run, kind: str, rank: int, folder: str) -> dict[str, Tensor]:
    def loop(steps: int) -> None:
        for _ in range(steps):
            own = 1000 * rank + run.step  # each its own batches
            run.loss(own).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.advance()

    wanted = run.zeros()
    if run.pruner is None:
        keep_zeros(run.net)
    steps = max(0, STEPS - run.step) + MORE
    if kind == "ddp":
        run.call = nn.parallel.DistributedDataParallel(run.net)
        loop(steps)
        whole = run
    else:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        _shard(run)
        if kind == "dcp":
            loop(2)
            steps -= 2
            run = _through_checkpoint(run, folder)
        loop(steps)
        full = get_model_state_dict(run.net, options=StateDictOptions(full_state_dict=True))
        whole = start("after finalize" if run.pruner is None else "before training")
        if run.pruner is None:
            keep_zeros(whole.net)
        whole.net.load_state_dict(full)
    if whole.pruner is None:
        release_zeros(whole.net)
        assert whole.zeros() == wanted
    else:
        whole.pruner.finalize()
        whole.assert_met()
    return whole.net.state_dict()


def _shard(run: Run) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(run.net.get_submodule("body"), mesh=mesh)
    fully_shard(run.net, mesh=mesh)
    run.optimizer = adam(run.net)


def _through_checkpoint(run: Run, folder: str) -> Run:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def state(of: Run) -> dict[str, Any]:
        pair = get_state_dict(of.net, of.optimizer)
        return dict(zip(("model", "optimizer"), pair, strict=True))

    checkpoint.save(state(run), checkpoint_id=folder)
    other = start("after finalize" if run.pruner is None else "before training")
    if other.pruner is None:
        keep_zeros(other.net)
    _shard(other)
    now = state(other)
    checkpoint.load(now, checkpoint_id=folder)
    set_state_dict(
        other.net, other.optimizer, model_state_dict=now["model"],
        optim_state_dict=now["optimizer"],
    )  # fmt: skip
    other.step = run.step
    return other
