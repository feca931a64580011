"""The benchmark on folders in the layouts of NYU-v2 and Tiny-Taskonomy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from folders import with_index
from torch import nn

pytest.importorskip("torchmetrics")

from examples.benchmark import paper_problem, run
from torch_adapmtl.models import DenseHead, MultiTaskModel

CHANNELS = {
    "indexed_nyuv2": {"segmentation": 40, "depth": 1, "normal": 3},
    "arrays_nyuv2": {"segmentation": 13, "depth": 1, "normal": 3},
    "taskonomy": {"segmentation": 17, "depth": 1, "normal": 3, "keypoints": 1, "edges": 1},
}


@pytest.mark.parametrize(
    ("layout", "workers"),
    [("indexed_nyuv2", 0), ("arrays_nyuv2", 0), ("taskonomy", 0), ("taskonomy", 1)],
)
def test_tasks_and_the_model_fit_the_batches(
    layout: str, workers: int, request: pytest.FixtureRequest
) -> None:
    channels = CHANNELS[layout]
    folder = request.getfixturevalue(layout)
    problem = paper_problem("resnet34", str(folder), size=4, workers=workers)
    train, test = problem.load()
    assert problem.name == f"paper/resnet34/{folder}"
    tasks = problem.make_tasks()
    assert list(tasks) == list(channels)
    for inputs, targets in (next(iter(train.shuffled(1, 0))), next(iter(test.in_order(1)))):
        assert inputs.shape[:2] == (1, 3)
        for name, task in tasks.items():
            prediction = torch.rand(1, channels[name], *inputs.shape[-2:])
            assert task.loss(prediction, targets[name]).isfinite()
            task.update(prediction, targets[name])
    with torch.device("meta"):
        model = problem.make_model()
        shapes = {name: out.shape[1] for name, out in model(torch.zeros(1, 3, 33, 33)).items()}
    assert shapes == channels


@pytest.mark.parametrize("layout", ["indexed_nyuv2", "taskonomy"])
def test_a_run_trains_and_measures(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    (index,) = folder.glob("*.json")
    with_index(index.name, lambda rows: {split: names * 2 for split, names in rows.items()})(folder)
    problem = paper_problem("mobilenetv2", str(folder), size=33, workers=0)

    def small_model() -> nn.Module:
        heads = {task: DenseHead(8, width) for task, width in CHANNELS[layout].items()}
        return MultiTaskModel(nn.Conv2d(3, 8, 3, stride=2, padding=1), heads)

    short = dataclasses.replace(problem, make_model=small_model, steps=3, batch=2)
    line = run(short, "adaptive (ours)", 0.9, seed=0, bf16=True)
    assert line["zeros"] == round(0.9 * line["weights"])
    assert list(line["metrics"]) == list(problem.make_tasks())
