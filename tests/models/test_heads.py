"""The heads: outputs by plain formulae, sizes, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl.models import ASPPHead, ClassificationHead, DenseHead, RegressionHead


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def aspp_plainly(head: ASPPHead, x: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """The outputs of the paper's head, computed from its weights alone."""
    p = dict(head.named_parameters())
    total = torch.zeros(())
    for k, d in enumerate(dilations):
        names = [f"branches.{k}.{i}" for i in (0, 3, 6)]
        (w1, b1), (w2, b2), (w3, b3) = ((p[n + ".weight"], p[n + ".bias"]) for n in names)
        hidden = F.conv2d(x, w1, b1, padding=d, dilation=d).clamp(min=0)
        hidden = (torch.einsum("oi,bihw->bohw", w2[:, :, 0, 0], hidden) + b2[:, None, None]).clamp(
            min=0
        )
        total = total + torch.einsum("oi,bihw->bohw", w3[:, :, 0, 0], hidden) + b3[:, None, None]
    return total


@pytest.mark.parametrize("dilations", [(6, 12, 18, 24), (1,), (1, 3)])
def test_aspp_head_is_the_formula(dilations: tuple[int, ...]) -> None:
    head = ASPPHead(5, 3, hidden=7, dilations=dilations).double().eval()
    x = torch.randn(2, 5, 13, 11, dtype=torch.float64)
    torch.testing.assert_close(head(x), aspp_plainly(head, x, dilations))


def test_aspp_head_drops_only_in_training() -> None:
    head = ASPPHead(4, 2, hidden=16, dilations=(1, 2), dropout=0.5)
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_sizes_of_the_papers_head() -> None:
    # Four branches: 3x3 to 1,024, 1x1 to 1,024, 1x1 to the output, each with biases.
    with torch.device("meta"):
        for channels, out in ((512, 40), (512, 3), (1280, 1)):
            expected = 4 * (9 * channels * 1024 + 1024 + 1024**2 + 1024 + 1024 * out + out)
            assert count(ASPPHead(channels, out)) == expected


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 6, 4, 3)])
def test_pooled_heads_average_positions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    mean = {2: lambda: x, 3: lambda: x.mean(1), 4: lambda: x.flatten(2).mean(2)}[x.ndim]()
    for head, width in ((RegressionHead(6), 1), (ClassificationHead(6, 4), 4)):
        out = head(x)
        assert out.shape == (2, width)
        torch.testing.assert_close(out, mean @ head.linear.weight.T + head.linear.bias)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="in_channels must be an integer >= 1, got 0"):
        ASPPHead(0, 1)
    with pytest.raises(ValueError, match=r"dilations must be one or more.*\(0, 1\)"):
        ASPPHead(1, 1, dilations=(0, 1))
    with pytest.raises(ValueError, match="dilations must be one or more"):
        ASPPHead(1, 1, dilations=())
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        ASPPHead(1, 1, dropout=1)
    with pytest.raises(ValueError, match="hidden must be"):
        DenseHead(1, 1, hidden=0)
    with pytest.raises(ValueError, match="num_classes must be"):
        ClassificationHead(1, 0)
    with pytest.raises(ValueError, match="out_features must be"):
        RegressionHead(1, 0)
