"""Heads: the paper's dense head, a small dense head and two pooled heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ASPPHead", "ClassificationHead", "DenseHead", "RegressionHead"]


class ASPPHead(nn.Module):
    """The paper's dense head: the sum of parallel branches with different dilations.

    A branch is conv3x3 (dilated) to `hidden` channels, ReLU, dropout, conv1x1, ReLU, dropout,
    conv1x1 to `out_channels`. With the paper's sizes one head has 23 M weights, more than its
    ResNet34 encoder.

    Args:
        in_channels: Channels of the feature map.
        out_channels: Channels of the output: the number of classes, 1 for depth, 3 for normals.
        hidden: Channels inside a branch.
        dilations: Dilation of the 3x3 convolution of each branch, one for each branch.
        dropout: Probability of dropping an activation in training.

    Raises:
        ValueError: If a size is below 1, there is no branch, or `dropout` is not in [0, 1).

    Example:
        >>> import torch
        >>> head = ASPPHead(16, 5, hidden=32, dilations=(1, 2))
        >>> head(torch.zeros(2, 16, 9, 9)).shape
        torch.Size([2, 5, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int = 1024,
        dilations: Sequence[int] = (6, 12, 18, 24),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, out_channels=out_channels, hidden=hidden)
        _check_dropout(dropout)
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations must be one or more integers >= 1, got {dilations!r}")
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, hidden, 3, padding=dilation, dilation=dilation),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(hidden, hidden, 1),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(hidden, out_channels, 1),
            )
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, in_channels, h, w)` to `(B, out_channels, h, w)`."""
        first, *others = self.branches
        out: Tensor = first(x)
        for branch in others:
            out = out + branch(x)
        return out


class DenseHead(nn.Sequential):
    """A dense head for small networks: conv3x3, batch norm, ReLU, conv1x1.

    Args:
        in_channels: Channels of the feature map.
        out_channels: Channels of the output.
        hidden: Channels between the two convolutions.
        dilation: Dilation of the 3x3 convolution.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> DenseHead(16, 3, hidden=8)(torch.zeros(2, 16, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, hidden: int = 64, dilation: int = 1
    ) -> None:
        _check_sizes(
            in_channels=in_channels, out_channels=out_channels, hidden=hidden, dilation=dilation
        )
        super().__init__(
            nn.Conv2d(in_channels, hidden, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1),
        )


class RegressionHead(nn.Module):
    """A head that predicts numbers: mean over positions, dropout, one linear layer.

    Takes a vector `(B, C)`, tokens `(B, N, C)` or a map `(B, C, h, w)`.

    Args:
        in_channels: Channels C of the features.
        out_features: Number of outputs.
        dropout: Probability of dropping a pooled feature in training.

    Raises:
        ValueError: If a size is below 1 or `dropout` is not in [0, 1).

    Example:
        >>> import torch
        >>> RegressionHead(16)(torch.zeros(2, 16, 4, 4)).shape
        torch.Size([2, 1])
    """

    def __init__(self, in_channels: int, out_features: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, out_features=out_features)
        _check_dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to `(B, out_features)`."""
        if x.ndim == 4:
            x = x.mean((2, 3))
        elif x.ndim == 3:
            x = x.mean(1)
        out: Tensor = self.linear(self.dropout(x))
        return out


class ClassificationHead(RegressionHead):
    """A head that predicts one logit for each class: a `RegressionHead` of `num_classes` outputs.

    Takes a vector `(B, C)`, tokens `(B, N, C)` or a map `(B, C, h, w)`.

    Args:
        in_channels: Channels C of the features.
        num_classes: Number of classes.
        dropout: Probability of dropping a pooled feature in training.

    Raises:
        ValueError: If a size is below 1 or `dropout` is not in [0, 1).

    Example:
        >>> import torch
        >>> ClassificationHead(16, 10)(torch.zeros(2, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float = 0.0) -> None:
        _check_sizes(num_classes=num_classes)
        super().__init__(in_channels, num_classes, dropout=dropout)


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
