"""The zoo: real models through detection, a short training to an exact target, and finalize.

Each is also pruned at random and accelerated.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerating import LAYERS, all_sparse, assert_same, pruned
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from zoo import ENTRIES, SAMPLE, Entry
from zoo.entry import images

from examples.benchmark import read
from torch_adapmtl import apply_adapmtl
from torch_adapmtl.components._outputs import split_output
from torch_adapmtl.components.find import FROZEN, SHARED, UNUSED

DOCS = Path(__file__).resolve().parent.parent / "docs"
TARGET = 0.7
STEPS = 3
# Rounding decides how many boxes these find: compared are the features that they are found from.
BEFORE_BOXES = {"ssdlite320_mobilenet_v3_large"}
Weights = dict[str, tuple[nn.Module, str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        whole = metafunc.config.getoption("zoo") == "whole"
        chosen = [entry for entry in ENTRIES if whole or entry.name in SAMPLE]
        metafunc.parametrize("entry", chosen, ids=lambda entry: entry.name)


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)
    elif dataclasses.is_dataclass(output):
        yield from tensors(list(vars(output).values()))


def by_task(output: Any, entry: Entry) -> dict[str, list[Tensor]]:
    """The tensors of each task that a loss can be computed from."""
    parts = split_output(output, entry.arguments().get("task_outputs"))
    return {task: [t for t in own if t.is_floating_point()] for task, own in parts.items()}


def prunable_weights(model: nn.Module, entry: Entry) -> Weights:
    """Each prunable tensor by its name, once, with a module that uses it and its name there."""
    kinds = {
        _ConvNd: "weight",
        nn.Linear: "weight",
        nn.MultiheadAttention: "*_proj_weight",
        **entry.arguments().get("prunable", {}),
    }
    exclude = entry.arguments().get("exclude", ())
    names = {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if not any(fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*") for part in exclude)
    }
    found: Weights = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            for kind, pattern in kinds.items():
                own = id(parameter) in names
                if own and isinstance(module, kind) and fnmatchcase(name, pattern):
                    found.setdefault(names[id(parameter)], (module, name))
    return found


def zeros(weights: Weights) -> int:
    """The zeros in the weights as the model uses them."""
    return sum(int((getattr(module, name) == 0).sum()) for module, name in weights.values())


def outputs(model: nn.Module, entry: Entry) -> list[Tensor]:
    with torch.no_grad():
        found = list(tensors(run(model, entry.inputs())))
    assert found
    return found


def check_values(model: nn.Module, entry: Entry, components: dict[str, str]) -> None:
    """Whether NaN in a component's weights reaches the outputs of its tasks, and of no other."""
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    model.train()
    for component in {*components.values()} - {FROZEN}:
        with torch.no_grad():
            for name, own in components.items():
                if own == component:
                    parameters[name].fill_(float("nan"))
            parts = by_task(run(model, entry.inputs()), entry)
        model.load_state_dict(state)
        reached = [task for task, own in parts.items() if any(t.isnan().any() for t in own)]
        tasks = {SHARED: list(parts), UNUSED: []}.get(component, component.split("+"))
        assert reached == tasks, f"{component} reaches {reached}"


def test_zoo(entry: Entry, record: Callable[..., None]) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    with warnings.catch_warnings():
        for message in entry.ignored:
            warnings.filterwarnings("ignore", message)
        check(entry, record)


def check(entry: Entry, record: Callable[..., None]) -> None:
    model, inputs = entry.make(), entry.inputs()
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    weights = prunable_weights(model, entry)
    expected = entry.components(weights)

    start = time.perf_counter()
    pruner = apply_adapmtl(
        model,
        target_sparsity=TARGET,
        total_steps=STEPS,
        example_inputs=inputs if entry.given else None,
        **entry.arguments(),
    )
    applied = time.perf_counter() - start
    assert {tensor.name: tensor.component for tensor in pruner.components.tensors} == expected

    # Look-ups multiply nothing.
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = {name for name, (module, _) in weights.items() if isinstance(module, kinds)}
    assert all(layer.positions for layer in pruner.layers if layer.name not in tables)

    sizes = {name: getattr(*weights[name]).numel() for name in expected}
    trained = {n: weights[n] for n, part in expected.items() if part not in (UNUSED, FROZEN)}
    total = sum(sizes[name] for name in trained)
    start = time.perf_counter()
    optimizer = torch.optim.SGD(pruner.param_groups(lr=1e-3))
    for _ in range(STEPS):
        parts = by_task(run(model, inputs), entry)
        losses = {t: sum(out.square().mean() for out in own) for t, own in parts.items()}
        pruner.loss(losses).backward()
        # A batch norm over two pixels can make gradients of millions, and weights that overflow.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    stepped = time.perf_counter() - start
    assert zeros(trained) == round(TARGET * total)

    model.eval()
    before = outputs(model, entry)
    assert pruner.finalize() is model
    after = outputs(model, entry)
    assert all(output.isfinite().all() for output in before)
    assert all(map(torch.equal, before, after))
    assert len(before) == len(after)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert zeros(trained) == round(TARGET * total)
    if entry.values:
        check_values(model, entry, expected)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    record(
        "zoo",
        name=entry.name,
        family=entry.family,
        tasks=list(pruner.tasks),
        components={
            part: [
                sum(own == part for own in expected.values()),
                sum(sizes[name] for name, own in expected.items() if own == part),
            ]
            for part in (*pruner.components.names, UNUSED, FROZEN)
            if part in expected.values()
        },
        parameters=parameters,
        covered=total / parameters,
        seconds_apply=round(applied, 3),
        seconds_steps=round(stepped, 3),
        versions={p: version(p) for p in ("torch", entry.needs) if p},
    )


def test_accelerated(entry: Entry) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    with warnings.catch_warnings():
        for message in entry.ignored:
            warnings.filterwarnings("ignore", message)
        model, inputs = pruned(entry.make()), entry.inputs()
        if entry.name in BEFORE_BOXES:
            model, inputs = model.get_submodule("backbone"), images(64)
        expected = list(tensors(run(model, inputs)))
        fast = all_sparse(model, inputs)
        passes = [list(tensors(run(fast, inputs))) for _ in range(3)]  # the third repeats steps
    if any(isinstance(module, LAYERS) for module in model.modules()):
        assert "sparse" in fast.choices.values()
    exact = [t.detach() for t in expected]
    # A head may give small differences of large numbers, of which torch's own error is as large.
    largest = max(float(t.abs().max()) for t in exact if t.numel())
    for found in passes:
        assert_same(found, exact, largest)


def test_the_names_are_told_apart() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len({*names})
    assert {*names} >= SAMPLE


def test_the_page_says_what_the_lines_say(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("record"):
        pytest.skip("the page is filled from the lines afterwards")
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, tables.blocks()) == page, "run python docs/tables.py"


def test_the_lines_are_those_of_the_zoo() -> None:
    lines = read(DOCS / "compatibility" / "zoo.jsonl")
    found = sorted((line["name"], line["family"]) for line in lines)
    assert found == sorted((entry.name, entry.family) for entry in ENTRIES)
