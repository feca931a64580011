"""Shadows and pixel noise of rendered rooms."""

from __future__ import annotations

from torch_adapmtl.datasets import Rooms


def test_shadows_only_darken() -> None:
    shadowed, lit = (Rooms(4, seed=2, shadows=s).render(range(4))[0] for s in (True, False))
    assert (lit - shadowed).min() > -1e-6
    assert ((lit - shadowed) > 0.05).float().mean() > 0.01


def test_noise_has_mean_0_and_the_requested_deviation() -> None:
    noisy, clean = (Rooms(4, seed=2, noise=n).render(range(4))[0] for n in (0.03, 0.0))
    noise = (noisy - clean)[(clean > 0.1) & (clean < 0.9)]  # elsewhere the image may be clipped
    assert abs(float(noise.std()) - 0.03) < 0.001
    assert abs(float(noise.mean())) < 0.001
