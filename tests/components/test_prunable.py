"""Which tensors are prunable."""

from __future__ import annotations

import awkward
import torch
from awkward import Net
from finding import detected
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_adapmtl.components.find import SHARED


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, awkward.WIDTH)
        self.rnn = nn.LSTM(awkward.WIDTH, awkward.WIDTH, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.embedding((x > 0).long())
        return self.rnn(tokens)[0][:, -1] + self.body(x)


def test_prunable_is_merged_over_the_default() -> None:
    found = detected(
        Recurrent(), prunable={nn.LSTM: "weight_*", nn.Embedding: ["weight"], nn.Linear: ()}
    )
    assert found == dict.fromkeys(
        ["embedding.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"], SHARED
    )
    assert detected(Recurrent()) == detected(Net())


def test_the_most_specific_type_counts() -> None:
    class Own(nn.Linear):
        pass

    model = Net()
    model.body[0] = Own(awkward.WIDTH, awkward.WIDTH)
    assert "body.0.weight" in detected(model)
    assert "body.0.weight" not in detected(model, prunable={Own: ()})
    found = detected(model, prunable={nn.Module: "*", Own: "bias", nn.Linear: ()})
    assert found == {"body.0.bias": SHARED}


def test_only_real_floating_weights() -> None:
    model = Net()
    model.other = nn.Linear(2, 2, dtype=torch.complex64)
    model.whole = nn.Linear(2, 2)
    model.whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert detected(model) == detected(Net())


def test_pruned_twice_is_still_found() -> None:
    model = awkward.Pruned()
    prune.random_unstructured(model.body[0], "weight", 0.5)
    assert detected(model) == detected(Net())
