"""A model of one encoder and one head for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl.components._outputs import RULE, is_task_name

__all__ = ["MultiTaskModel"]


class MultiTaskModel(nn.Module):
    """One shared encoder and one head for each task (the paper's "shared backbone" and "heads").

    The encoder may be a timm model (`features_only=True`, or pooled with `num_classes=0`), an
    SMP encoder, or any module that returns a tensor or a list of feature maps. Each head takes the
    feature map with index `feature`. It returns a map `(B, C, h, w)`, which is resized to the size
    of the input, or a vector `(B, C)`, which is returned unchanged.

    Args:
        encoder: The shared encoder.
        heads: One module for each task. The keys are the names of the tasks and give the order of
            the outputs. The same module for two tasks is shared by them.
        feature: Index of the feature map that the heads take, if the encoder returns several;
            `None` for the whole list, which an SMP decoder takes.
        resize: Whether to resize maps (bilinear) to the height and width of the input.

    Raises:
        TypeError: If the encoder, a head or a task name has the wrong type.
        ValueError: If there is no head, or a task name is not allowed.

    Example:
        >>> import torch
        >>> from torch_adapmtl.models import ClassificationHead, DenseHead
        >>> encoder = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> heads = {"depth": DenseHead(8, 1), "scene": ClassificationHead(8, 10)}
        >>> model = MultiTaskModel(encoder, heads)
        >>> {
        ...     task: tuple(out.shape)
        ...     for task, out in model(torch.zeros(2, 3, 16, 16)).items()
        ... }
        {'depth': (2, 1, 16, 16), 'scene': (2, 10)}
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        feature: int | None = -1,
        resize: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        _check_heads(heads)
        self.encoder = encoder
        self.heads = nn.ModuleDict(dict(heads))
        self.feature = feature
        self.resize = resize

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of the outputs."""
        return tuple(self.heads)

    def extra_repr(self) -> str:
        """The options that `print(model)` shows."""
        return f"feature={self.feature}, resize={self.resize}"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images `(B, channels, H, W)` to one output per task.

        Returns:
            By task name: `(B, C, H, W)` of a dense head (`(B, C, h, w)` without `resize`), or
            `(B, C)` of a pooled head.

        Raises:
            TypeError: If the encoder returns neither a tensor nor a list of tensors.
            ValueError: If `feature` is out of range.
        """
        features = self._features(x)
        outputs = {}
        for task, head in self.heads.items():
            out = head(features)
            if self.resize and out.ndim == 4 and out.shape[-2:] != x.shape[-2:]:
                out = F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)
            outputs[task] = out
        return outputs

    def _features(self, x: Tensor) -> Tensor | list[Tensor]:
        """What the heads take: the feature map of index `feature`, or the whole list."""
        encoded = self.encoder(x)
        maps = [encoded] if isinstance(encoded, Tensor) else encoded
        if not isinstance(maps, Sequence) or not all(isinstance(m, Tensor) for m in maps):
            raise TypeError(
                "encoder must return a tensor or a list of tensors, got "
                f"{type(encoded).__name__}; wrap it in a module that returns its feature maps"
            )
        if getattr(self.encoder, "output_fmt", None) == "NHWC":  # timm's Swin and similar models
            maps = [m.permute(0, 3, 1, 2) if m.ndim == 4 else m for m in maps]
        if self.feature is None:
            return list(maps)
        if not -len(maps) <= self.feature < len(maps):
            raise ValueError(
                f"feature={self.feature} is out of range: the encoder returns {len(maps)} "
                "feature map(s)"
            )
        return maps[self.feature]


def _check_heads(heads: Mapping[str, nn.Module]) -> None:
    if not isinstance(heads, Mapping | nn.ModuleDict):
        raise TypeError(
            f"heads must be a mapping of task name to module, got {type(heads).__name__}"
        )
    if not heads:
        raise ValueError("heads is empty; pass one module for each task")
    for task, head in heads.items():
        if not isinstance(task, str):
            raise TypeError(f"task names in heads must be strings, got {task!r}")
        if not is_task_name(task):
            raise ValueError(f"heads: {task!r} cannot be a task name: {RULE}; choose another key")
        if hasattr(nn.ModuleDict(), task):
            raise ValueError(
                f"heads: {task!r} cannot be a task name: torch.nn.ModuleDict has an attribute of "
                "this name; choose another key"
            )
        if not isinstance(head, nn.Module):
            raise TypeError(f"heads[{task!r}] must be a torch.nn.Module, got {type(head).__name__}")
