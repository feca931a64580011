"""Weights whose zeros the model does not use: other weights computed in forward, and writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import awkward
import pytest
import torch
import torch.nn.functional as F
from awkward import WIDTH, Net
from finding import X, detected
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from untouched import assert_untouched

from torch_adapmtl import apply_adapmtl, find_components


class Layer(nn.Linear):
    """A linear layer that uses `make(layer)` in place of its weight."""

    def __init__(self, make: Callable[[Any], Tensor], width: int = WIDTH) -> None:
        super().__init__(width, width)
        self.make = make
        self.scale = nn.Parameter(torch.zeros(width, 1))
        self.other = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("mask", torch.rand(width, width) > 0.3)
        self.register_buffer("scratch", torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        # The product that a low-rank update is made of is used by itself too.
        return F.linear(x, self.make(self), self.bias) + self.up(self.down(self.other(x)))


def using(make: Callable[[Any], Tensor]) -> Net:
    """A model whose first layer uses `make(layer)` in place of its weight."""
    model = Net()
    model.body[0] = Layer(make)
    return model


def standardised(layer: Any) -> Tensor:
    weight = layer.weight
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def centred_in_place(layer: Any) -> Tensor:
    weight = layer.scratch.copy_(layer.weight.detach())
    weight -= weight.mean()
    return weight + 0 * layer.weight


def as_another_layer(layer: Any) -> Tensor:
    return torch.cat([layer.weight[:2], standardised(layer)[2:]])


def centre(weight: Tensor) -> Tensor:
    return weight - weight.mean()


def scripted(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against scripts
        found: Tensor = torch.jit.script(centre)(weight)
    return found


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return centre(weight)


REMADE: dict[str, Callable[[Any], Tensor]] = {
    "standardised": standardised,
    "batch norm": lambda m: F.batch_norm(m.weight[None], None, None, training=True)[0],
    "layer norm": lambda m: F.layer_norm(m.weight, (WIDTH,)),
    "centred in half precision": lambda m: (m.weight.half() - m.weight.half().mean()).float(),
    "centred in place": centred_in_place,
    "centred by a product": lambda m: m.weight - m.weight @ torch.full((WIDTH, WIDTH), 1 / WIDTH),
    "centred and sliced": as_another_layer,
    "a low-rank update": lambda m: m.weight + m.up.weight @ m.down.weight,
    "an offset": lambda m: m.weight + m.scale,
    "a part, centred": lambda m: torch.cat([centre(m.weight[:5]), m.weight[5:] * 2])[:5].repeat(
        2, 1
    )[:WIDTH],
    "positive": lambda m: F.softplus(m.weight),
    "shares": lambda m: m.weight.softmax(1),
    "two values": lambda m: torch.where(m.weight > 0, 1.0, -1.0) + 0 * m.weight,
    "smoothed": lambda m: F.avg_pool1d(m.weight[None], 3, 1, 1)[0],
    "orthogonal": lambda m: torch.linalg.qr(m.weight)[0],
    "detached statistics": lambda m: m.weight - m.weight.detach().mean(),
    "a constant": lambda m: m.weight - torch.tensor(0.1),
    "centred row by row": lambda m: torch.vmap(lambda row: row - row.mean())(m.weight),
    "centred by a script": lambda m: scripted(m.weight),
    "noise, also in evaluation": lambda m: m.weight + torch.randn(WIDTH, WIDTH),
}


@pytest.mark.parametrize("make", REMADE.values(), ids=REMADE.keys())
def test_a_layer_that_computes_another_weight_is_refused(make: Callable[[Any], Tensor]) -> None:
    model = using(make)

    def run() -> None:
        with pytest.raises(ValueError, match=r"1 of \d weights to prune is not what an operation"):
            find_components(model, X)

    assert_untouched(model, run)
    found = detected(model, exclude="body.0.weight")
    assert "body.0.weight" not in found
    assert found["body.2.weight"] == "shared"


KEPT: dict[str, Callable[[Any], Tensor]] = {
    "scaled": lambda m: 2 * m.weight / m.weight.norm(dim=1, keepdim=True),
    "divided by the largest": lambda m: m.weight / m.weight.abs().max(),
    "scaled by a parameter": lambda m: m.weight * (1 + m.scale),
    "normalised": lambda m: F.normalize(m.weight),
    "masked": lambda m: m.weight * m.mask,
    "half precision and back": lambda m: m.weight.bfloat16().float(),
    "the sum of two copies": lambda m: m.weight.double().float() + m.weight,
    "transposed twice": lambda m: m.weight.t().contiguous().t(),
    "cut and joined": lambda m: torch.cat([*reversed(m.weight.chunk(3))]),
    "permuted": lambda m: m.weight[torch.randperm(WIDTH)].flip(1).roll(1, 0),
    "dropped": lambda m: F.dropout(m.weight, 0.3),
    "connections dropped": lambda m: m.weight * (torch.rand(WIDTH, WIDTH) > 0.5),
    "noise in training": lambda m: (
        m.weight + torch.randn_like(m.weight) if m.training else m.weight
    ),
    "quantised": lambda m: torch.fake_quantize_per_tensor_affine(m.weight, 0.1, 0, -8, 7),
    "rounded straight through": lambda m: m.weight + (m.weight.round() - m.weight).detach() * 0,
    "three values": lambda m: m.weight.sign() * m.weight.abs().mean(),
    "thresholded": lambda m: m.weight * (m.weight.abs() > m.weight.abs().median()),
    "the largest of each row": lambda m: (
        torch.zeros_like(m.weight).scatter(1, m.weight.topk(3).indices, m.weight.topk(3).values)
    ),
    "in the spectrum": lambda m: torch.fft.irfft(torch.fft.rfft(m.weight), WIDTH).detach() * 0
    + m.weight,
    "doubled row by row": lambda m: torch.vmap(lambda row: row * 2)(m.weight),
    "checkpointed": lambda m: checkpoint(lambda w: w * 2, m.weight, use_reentrant=False),
}  # fmt: skip


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT.keys())
def test_a_layer_that_keeps_zeros_is_not(make: Callable[[Any], Tensor]) -> None:
    assert detected(using(make))["body.0.weight"] == "shared"


class Elsewhere(Net):
    """Computes something of a weight that the operation does not receive in place of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.position = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Linear(1, WIDTH, bias=False)
        self.plain, self.real, self.imaginary = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 1, groups=WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weight = self.body[0].weight
        # A penalty; statistics of the weight, used on the outputs; layers on a table of positions;
        # a weight that is the input of another layer; one that data scales; one used by entries;
        # sums of a weight beside it, as in central differences; parts of a complex weight.
        penalty = ((weight - weight.mean()) @ (weight - weight.mean()).t()).square().sum()
        x = self.body(x) / weight.std(1) + weight.mean()
        x = x + self.position(self.table).softmax(1).mean(0)
        x = x + self.position(self.position.weight).mean(0)
        x = F.linear(x, self.body[2].weight * x.mean().sigmoid())
        x = x * self.gain.weight[:, 0]
        x = self.depthwise(x[..., None])[..., 0]
        x = F.linear(x, self.plain.weight) - F.linear(x, self.plain.weight.sum(1, keepdim=True).t())
        x = (x.cfloat() @ torch.complex(self.real.weight, self.imaginary.weight)).abs()
        return {**{task: head(x) for task, head in self.heads.items()}, "penalty": penalty}


def test_what_is_computed_of_a_weight_beside_its_use_does_not_matter() -> None:
    assert detected(Elsewhere())["body.0.weight"] == "shared"


@pytest.mark.parametrize("case", [awkward.Parametrized, awkward.Pruned, awkward.Tied])
def test_parametrizations_and_masks_that_keep_zeros(case: Callable[[], nn.Module]) -> None:
    assert find_components(case(), X).names


def test_tied_to_a_weight_that_is_centred() -> None:
    model = using(standardised)
    model.body[2].weight = model.body[0].weight
    with pytest.raises(ValueError, match=r"body\.0\.weight \(Layer\).*exclude=\['body\.0\.weight"):
        find_components(model, X)


def test_the_sum_of_two_weights() -> None:
    model = using(lambda layer: layer.weight + layer.other.weight)
    with pytest.raises(ValueError, match=r"exclude=\['body.0.weight', 'body.0.other.weight'\]"):
        find_components(model, X)


def test_a_parametrization_that_centres() -> None:
    model = Net()
    parametrize.register_parametrization(model.body[0], "weight", Centred())
    with pytest.raises(ValueError, match=r"body\.0\.weight \(ParametrizedLinear\)"):
        find_components(model, X)


def test_a_mask_and_a_weight_of_zeros() -> None:
    model = using(standardised)
    nn.init.zeros_(model.body[0].weight)
    with pytest.raises(ValueError, match="1 of 7 weights"):
        find_components(model, X)
    prune.random_unstructured(model.body[0], "weight", 0.5)
    with pytest.raises(ValueError, match="1 of 7 weights"):
        find_components(model, X)


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_under_autocast() -> None:
    with autocast():
        assert detected(Net()) == detected(awkward.Net())
        with pytest.raises(ValueError, match="not what an operation receives"):
            find_components(using(standardised), X)


def test_compiled_and_wrapped() -> None:
    for wrap in (torch.compile, nn.DataParallel):
        with pytest.raises(ValueError, match="not what an operation receives"):
            find_components(wrap(using(standardised)), X)


def test_frozen_unused_and_excluded_layers_are_left_alone() -> None:
    model = using(standardised)
    model.body[0].weight.requires_grad_(False)
    assert detected(model)["body.0.weight"] == "frozen"
    model = using(standardised)
    model.forward = lambda x: {task: head(x) for task, head in model.heads.items()}
    assert detected(model)["body.0.weight"] == "unused"


def test_by_task_and_by_groups() -> None:
    model = using(standardised)
    with pytest.raises(ValueError, match="not what an operation receives"):
        find_components(model, task_inputs={"a": X, "b": X})
    groups = {"main": ["*"]}
    assert find_components(model, groups=groups).names == ("main",)  # nothing to run it on
    with pytest.raises(ValueError, match="not what an operation receives"):
        find_components(model, X, groups=groups)
    with pytest.raises(RuntimeError, match=r"failed on example_inputs \(RuntimeError"):
        find_components(model, X[:, :2], groups=groups)


class Dropped(Net):
    """Its first layer runs in one of two modes only."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.extra, self.when = Layer(standardised), training

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.extra(x) if self.training is self.when else x)


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_one_mode(training: bool) -> None:
    with pytest.raises(ValueError, match=r"extra\.weight \(Layer\)"):
        find_components(Dropped(training), X)


def test_many_layers_are_counted_and_excluded_by_type() -> None:
    model = Net()
    model.body = nn.Sequential(*(Layer(standardised) for _ in range(10)))
    with pytest.raises(ValueError, match="10 of 42 weights") as caught:
        apply_adapmtl(model, target_sparsity=0.5, total_steps=2, example_inputs=X)
    message = str(caught.value)
    assert "body.7.weight (Layer) and 2 more." in message
    remedy = message.partition("exclude=")[2]
    assert remedy == "[m for m in model.modules() if type(m).__name__ in ['Layer']]"
    exclude = [m for m in model.modules() if isinstance(m, Layer)]
    assert "body.7.weight" not in detected(model, exclude=exclude)
    model.body.append(Layer(lambda layer: layer.weight))
    with pytest.raises(ValueError, match="10 of 46 weights") as caught:
        find_components(model, X)
    assert "'body.8.weight', 'body.9.weight']" in str(caught.value)


def test_the_layers_of_timm() -> None:
    timm = pytest.importorskip("timm")
    small = {"channels": (128, 128, 128, 128), "stem_chs": 32, "num_classes": 8}
    for name, layer, options in (
        ("test_nfnet", "ScaledStdConv2d", {}),
        ("resnetv2_50x1_bit", "StdConv2d", small),
    ):
        model = timm.create_model(name, **options)
        with pytest.raises(ValueError, match=rf"in \['{layer}'\]\]$"):
            find_components(model, groups={"main": ["*"]})  # on images made for it
        exclude = [m for m in model.modules() if type(m).__name__ == layer]
        assert find_components(model, groups={"main": ["*"]}, exclude=exclude)["main"]


def test_hardly_an_encoder() -> None:
    """Nothing is run for `groups` on a model that does not run on what is made for it."""
    timm = pytest.importorskip("timm")

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model("test_resnet")

    assert find_components(Model(), groups={"main": ["*"]}).names == ("main",)


def renormalise(layer: Any) -> Tensor:
    layer.weight.data = F.normalize(layer.weight.data)
    return layer.weight


@torch.no_grad()
def clamp(layer: Any) -> None:
    layer.weight.clamp_(-1, 1)


def replace(layer: Any) -> Tensor:
    layer.weight = nn.Parameter(layer.weight / 2)
    return layer.weight


WRITES: dict[str, Callable[[Any], Any]] = {
    "renormalised": renormalise,
    "clamped": clamp,
    "masked": lambda m: m.weight.data.mul_(m.mask),
    "a row": lambda m: m.weight.data[0].fill_(7.0),
    "copied": lambda m: m.weight.data.copy_(m.scratch),
    "through a view": lambda m: m.weight.detach().t().add_(1),
    "of data": lambda m: m.weight.data.add_(X.mean()),
    "many at once": lambda m: torch._foreach_mul_([m.weight.data, m.bias.data], 0.5),
    "replaced": replace,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_layer_that_writes_to_its_weight_is_refused(write: Callable[[Any], Any]) -> None:
    model = using(lambda layer: (write(layer), layer.weight)[1])

    def run() -> None:
        with pytest.raises(ValueError, match=r"1 of \d weights to prune is written to in forward"):
            find_components(model, X)

    assert_untouched(model, run)
    assert "body.0.weight" not in detected(model, exclude="body.0.weight")


def test_writes_that_change_no_weight_to_prune() -> None:
    class Teacher(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.rnn = nn.GRU(WIDTH, WIDTH)

        def features(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.teacher.weight.mul_(0.9).add_(self.body[0].weight, alpha=0.1)
                self.body[0].bias.clamp_(-1, 1)
            self.rnn.flatten_parameters()
            self.body[0].weight.data = self.body[0].weight.data.clone()
            return self.body(self.rnn(x)[0]) + self.teacher(x)

    found = detected(Teacher(), prunable={nn.GRU: "weight_*"})
    assert found["teacher.weight"] == "frozen"
    assert found["body.0.weight"] == found["rnn.weight_ih_l0"] == "shared"
