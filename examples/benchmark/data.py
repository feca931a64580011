"""Where a problem's batches come from: tensors in memory, or a data set that is read as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["Batch", "Data", "Samples", "Streamed"]

Batch = tuple[Tensor, dict[str, Tensor]]


class Data(Protocol):
    """What a run asks of its training and its test set."""

    def to(self, device: str) -> Data:
        """The same, with batches on a device."""

    def example(self, count: int) -> Tensor:
        """The inputs of the first samples."""

    def shuffled(self, batch: int, seed: int) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order; a function of the seed."""

    def in_order(self, batch: int) -> Iterator[Batch]:
        """All samples once."""


@dataclass(frozen=True)
class Samples:
    """A data set in memory.

    Attributes:
        inputs: All inputs, `(N, …)`.
        targets: The targets of each task, `(N, …)`.

    Example:
        >>> samples = Samples(torch.rand(10, 3), {"kind": torch.arange(10)})
        >>> inputs, targets = next(samples.shuffled(4, seed=0))
        >>> inputs.shape, targets["kind"].shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def at_most(self, count: int) -> Samples:
        """The first samples."""
        first = {task: target[:count] for task, target in self.targets.items()}
        return Samples(self.inputs[:count], first)

    def to(self, device: str) -> Samples:
        """The same on another device."""
        moved = {task: target.to(device) for task, target in self.targets.items()}
        return Samples(self.inputs.to(device), moved)

    def at(self, rows: Tensor) -> Batch:
        """Some of the samples, as a batch."""
        return self.inputs[rows], {task: target[rows] for task, target in self.targets.items()}

    def example(self, count: int) -> Tensor:
        """The inputs of the first samples."""
        return self.inputs[:count]

    def shuffled(self, batch: int, seed: int) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order; a function of the seed."""
        _check_batch(batch, len(self))
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator)
            for rows in order.split(batch):
                if len(rows) == batch:
                    yield self.at(rows.to(self.inputs.device))

    def in_order(self, batch: int) -> Iterator[Batch]:
        """All samples once."""
        for rows in torch.arange(len(self), device=self.inputs.device).split(batch):
            yield self.at(rows)


@dataclass(frozen=True)
class Streamed:
    """A data set too large for memory, or with augmentations, read by a `DataLoader`.

    Attributes:
        dataset: Gives an input and the targets by task for each index.
        workers: Processes that read; what they draw at random is a function of the seed too.
        device: Where batches go.
    """

    dataset: Dataset[tuple[Tensor, dict[str, Tensor]]]
    workers: int = 0
    device: str = "cpu"

    def to(self, device: str) -> Streamed:
        """The same, with batches on a device."""
        return replace(self, device=device)

    def example(self, count: int) -> Tensor:
        """The inputs of the first samples."""
        with torch.random.fork_rng(devices=[]):  # augmentations draw
            return torch.stack([self.dataset[i][0] for i in range(count)]).to(self.device)

    def shuffled(self, batch: int, seed: int) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order; a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        _check_batch(batch, len(self.dataset))  # type: ignore[arg-type]
        loader = self._loader(batch, shuffle=True, drop_last=True, generator=generator)
        while True:
            yield from self._moved(loader, generator)

    def in_order(self, batch: int) -> Iterator[Batch]:
        """All samples once."""
        yield from self._moved(self._loader(batch), torch.Generator())

    def _loader(self, batch: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch,
            num_workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
            persistent_workers=self.workers > 0,
            **options,
        )

    def _moved(self, loader: DataLoader[Any], generator: torch.Generator) -> Iterator[Batch]:
        # Augmentations draw from the default generator: where this process reads, from ours.
        batches = iter(_seeded(loader, generator) if self.workers == 0 else loader)
        for inputs, targets in batches:
            yield (
                inputs.to(self.device, non_blocking=True),
                {t: y.to(self.device, non_blocking=True) for t, y in targets.items()},
            )


def _seeded(loader: DataLoader[Any], generator: torch.Generator) -> Iterator[Any]:
    """The loader's batches, each drawn from the generator; the default one stays as it is."""
    batches = iter(loader)
    draw: Callable[[], int] = lambda: int(torch.randint(2**62, (), generator=generator))  # noqa: E731
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw())  # not those of GPUs
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _check_batch(batch: int, count: int) -> None:
    if batch > count:
        raise ValueError(f"batch must be at most the number of samples, {count}, got {batch}")
