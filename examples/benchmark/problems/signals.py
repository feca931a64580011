"""A recurrent net on signals: waves with spikes, in two noisy channels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from torch_adapmtl.tasks import Classification, Regression

__all__ = ["SignalModel", "signals"]

_LENGTH = 24
_CLASSES: Mapping[str, int] = {"wave": 4, "spikes": 5}
_NUMBERS: Mapping[str, int] = {"frequency": 1, "delay": 1}


class SignalModel(nn.Module):
    """Two layers of gated recurrent units, and a two-layer head for each task.

    Args:
        width: Of the hidden state.
    """

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.encoder = nn.GRU(2, width, num_layers=2, batch_first=True)
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, count))
                for task, count in {**_CLASSES, **_NUMBERS}.items()
            }
        )

    def forward(self, signal: Tensor) -> dict[str, Tensor]:
        """Take signals `(B, T, 2)`; return logits and numbers by task."""
        states, _ = self.encoder(signal)
        pooled = torch.cat([states.mean(1), states[:, -1]], dim=1)
        return {task: head(pooled) for task, head in self.heads.items()}


def _waves(count: int, seed: int) -> Samples:
    """A sine, square, saw or triangle wave, the same later in a second channel, and spikes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    wave = torch.randint(_CLASSES["wave"], (count,), generator=generator)
    spikes = torch.randint(_CLASSES["spikes"], (count,), generator=generator)
    frequency, delay = uniform(1.0, 5.0, 1), uniform(-0.2, 0.2, 1)
    time = torch.linspace(0, 1, _LENGTH)
    lags = torch.stack([torch.zeros_like(delay), delay], dim=-1)  # (N, 1, 2)
    phase = 2 * math.pi * (frequency[..., None] * time[:, None] + lags + uniform(0, 1, 1, 1))
    sine = phase.sin()
    forms = torch.stack([sine, sine.sign(), (phase / math.pi) % 2 - 1, sine.asin() * 2 / math.pi])
    signal = forms[wave, torch.arange(count)] * uniform(0.7, 1.3, 1, 1)
    # So many different moments have a spike, in the first channel.
    moments = torch.rand(count, _LENGTH, generator=generator).argsort(1) < spikes[:, None]
    signal[..., 0] += 1.5 * moments
    signal += 0.2 * torch.randn(signal.shape, generator=generator)
    return Samples(
        signal,
        {
            "wave": wave,
            "spikes": spikes,
            "frequency": (frequency - 3.0) / 1.155,
            "delay": delay / 0.115,
        },
    )


def signals() -> Problem:
    """Two classifications and two regressions on signals."""
    return Problem(
        "signals",
        lambda: (_waves(16_000, seed=0), _waves(4000, seed=1)),
        SignalModel,
        lambda: {
            **{task: Classification(count) for task, count in _CLASSES.items()},
            **{task: Regression() for task in _NUMBERS},
        },
        steps=500,
        batch=48,
        lr=3e-3,
        prunable={nn.GRU: "weight_*"},
    )
