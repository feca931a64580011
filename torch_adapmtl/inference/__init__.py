"""Sparse models that run faster on a CPU."""

from .accelerated import AcceleratedModel, accelerate
from .report import AccelerationReport, LayerChoice

__all__ = ["AcceleratedModel", "AccelerationReport", "LayerChoice", "accelerate"]
