"""Recurrent models, tied weights, and the many forms of code that multi-task models come in."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import awkward
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, images
from .own import WIDTH, body_and, entry, mlp, rows


def sequences() -> Tensor:
    return images(WIDTH, channels=1)[:, 0, :5]  # (2, 5, WIDTH)


def sentences() -> Tensor:
    return torch.arange(10).reshape(2, 5)


class Recurrent(nn.Module):
    """A recurrent body; a head reads every step, the other the last."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.body = kind(WIDTH, 6, batch_first=True, **options)
        width = 6 * (2 if options.get("bidirectional") else 1)
        self.tags, self.topic = nn.Linear(width, 4), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        steps = self.body(x)[0]
        return {"tags": self.tags(steps), "topic": self.topic(steps[:, -1])}


class CellByCell(nn.Module):
    """A loop over a recurrent cell, with a second layer for one of the tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.upper = nn.GRUCell(WIDTH, 6), nn.GRUCell(6, 6)
        self.now, self.end = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, g, found = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6), []
        for step in x.unbind(1):
            h = self.cell(step, h)
            g = self.upper(h, g)
            found.append(self.now(h))
        return {"now": torch.stack(found, 1), "end": self.end(g)}


class LanguageModel(nn.Module):
    """The output weight is the embedding's: it reads words for both tasks and predicts for one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.body = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.next, self.mood = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, 3)
        self.next.weight = self.words.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        steps = self.body(self.words(x))[0]
        return {"next": self.next(steps), "mood": self.mood(steps[:, -1])}


class TwoTables(nn.Module):
    """A recommender: embeddings of users and items under towers for clicks and ratings."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(10, 4), nn.EmbeddingBag(10, 4)
        self.click, self.rating = mlp(8, 16, 1), mlp(8, 16, 1)

    def forward(self, users: Tensor, items: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.users(users), self.items(items)], 1)
        return {"click": self.click(x), "rating": self.rating(x)}


class Queries(nn.Module):
    """A transformer whose decoder answers a learned query for each of the tasks but the first."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dim_feedforward": 16, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, **options)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, **options)
        self.query = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.tags, self.start, self.end = nn.Linear(WIDTH, 4), mlp(WIDTH, 1), mlp(WIDTH, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = self.encoder(x)
        start, end = self.decoder(self.query.expand(len(x), -1, -1), memory).unbind(1)
        return {"tags": self.tags(memory), "start": self.start(start), "end": self.end(end)}


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight transposed, and a classifier reads the code."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.label = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code = self.encode(x).relu()
        return {"image": F.linear(code, self.encode.weight.t()), "label": self.label(code)}


class Variational(nn.Module):
    """One output holds a distribution's two tensors, the other is sampled from it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.decode = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.body(x).relu()
        mean, scale = self.mean(x), F.softplus(self.scale(x))
        noise = torch.randn_like(mean) if self.training else 0.0
        return {"code": {"mean": mean, "scale": scale}, "image": self.decode(mean + scale * noise)}


class Siamese(nn.Module):
    """One encoder for two inputs, compared by one task and labelled by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(WIDTH, 8, 4)
        self.label, self.same = nn.Linear(4, 3), nn.Bilinear(4, 4, 1)
        self.scale = nn.Linear(1, 1)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Any]:
        a, b = self.encoder(left), self.encoder(right)
        return {"same": self.scale(self.same(a, b)), "labels": [self.label(a), self.label(b)]}


class Volumes(nn.Module):
    """Convolutions of one, two and three dimensions, and a transposed one for a map."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.flat = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.line, self.up = nn.Conv1d(6, 2, 2), nn.ConvTranspose2d(6, 1, 4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.flat(self.volume(x[:, None]).relu().amax(2)).relu()
        return self.line(x.mean(3)), self.up(x)


class Found(NamedTuple):
    boxes: Tensor
    extras: dict[str, Any]


class Nested(nn.Module):
    """Returns a named tuple, one field of which is nested and holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.boxes, self.near, self.far = (nn.Linear(WIDTH, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Found:
        x = self.body(x).relu()
        extras = {"maps": [self.near(x), (self.far(x), None)], "count": len(x)}
        return Found(self.boxes(x), extras)


def awkward_entry(name: str) -> Entry:
    """A case of `awkward`, by the name of its class."""
    case = next(case for case in awkward.ZOO if case.name == name)
    expected: dict[str, list[str]] = {}
    for tensor, component in case.expected.items():
        expected.setdefault(component, []).append(tensor)
    # What is detached, in any way, is reached by values and not by the graph.
    values = name != "DetachedHead"
    return Entry(name, "hand-written, awkward", case.build, case.inputs, expected, values=values)


ENTRIES = (
    entry(
        partial(Recurrent, nn.LSTM), sequences, body_and("tags", "topic"), "LSTM",
        options={"prunable": {nn.LSTM: "weight_*"}},
    ),
    entry(
        partial(Recurrent, nn.GRU, num_layers=2, bidirectional=True), sequences,
        body_and("tags", "topic"), "GRU of two layers and directions",
        options={"prunable": {nn.GRU: "weight_*"}},
    ),
    # The step reads the lower cell only.
    entry(
        CellByCell, sequences,
        {"shared": ("cell",), "now": ("now",), "end": ("upper", "end")},
        options={"prunable": {nn.GRUCell: "weight_*"}},
    ),
    entry(
        LanguageModel, sentences, {"shared": ("words", "body"), "mood": ("mood",)},
        options={"prunable": {nn.LSTM: "weight_*"}},
    ),
    entry(
        TwoTables, lambda: (torch.tensor([1, 2]), torch.tensor([[3, 4, 5], [6, 7, 8]])),
        {"click": ("click",), "rating": ("rating",)},
    ),
    entry(
        TwoTables, lambda: (torch.tensor([1, 2]), torch.tensor([[3, 4, 5], [6, 7, 8]])),
        {"shared": ("users", "items"), "click": ("click",), "rating": ("rating",)},
        "TwoTables with the tables",
        options={"prunable": {nn.Embedding: "weight", nn.EmbeddingBag: "weight"}},
    ),
    # In eval mode, under `no_grad`, torch has a fused form of the encoder's layer.
    entry(
        Queries, sequences,
        {
            "shared": ("encoder",), "start+end": ("decoder",), "tags": ("tags",),
            "start": ("start",), "end": ("end",),
        },
    ),
    entry(TiedAutoencoder, rows, {"shared": ("encode",), "label": ("label",)}),
    entry(
        Variational, rows, {"shared": ("body", "mean", "scale"), "image": ("decode",)}
    ),
    # A bilinear layer is not prunable by itself.
    entry(
        Siamese, lambda: {"left": rows(), "right": rows().flip(0)},
        {"shared": ("encoder",), "same": ("scale",), "labels": ("label",)},
    ),
    entry(
        Volumes, lambda: images(16, channels=4),
        {"shared": ("volume", "flat"), "0": ("line",), "1": ("up",)},
    ),
    entry(
        Nested, rows,
        {"shared": ("body",), "boxes": ("boxes",), "extras": ("near", "far")},
    ),
    entry(
        lambda: awkward.Returns(awkward.Record), awkward.ZOO[0].inputs,
        {"shared": ("body",), "left": ("heads.a",), "right": ("heads.b",)}, "dataclass",
    ),
    *map(
        awkward_entry,
        (
            "Attention", "Aliased", "Branching", "CheckpointedReentrant", "Convolutions",
            "DataDependent", "DetachedHead", "FrozenBody", "Hooked", "NoGradBody", "Tied",
            "UnusedParts",
        ),
    ),
)  # fmt: skip
