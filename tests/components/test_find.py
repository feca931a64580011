"""Components: found from the autograd graph or given, and the probe that leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import awkward
import pytest
import torch
import torch.utils.checkpoint
from awkward import ZOO, Case, Net, Pair, Record, Returns, TypedPair, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from untouched import assert_untouched

from torch_adapmtl.components.find import (
    FROZEN,
    SHARED,
    UNUSED,
    Components,
    find_components,
    unwrap,
)

X = torch.linspace(-1, 1, 2 * awkward.WIDTH).view(2, awkward.WIDTH)
zoo = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


def by_name(components: Components) -> dict[str, str]:
    return {tensor.name: tensor.component for tensor in components.tensors}


def detected(model: nn.Module, *args: Any, **options: Any) -> dict[str, str]:
    return by_name(find_components(model, *(args or (X,)), **options))


# --- Detection ---------------------------------------------------------------------------------


@zoo
def test_zoo(case: Case) -> None:
    components = find_components(case.build(), case.inputs(), **case.options)
    assert by_name(components) == case.expected
    assert components.tasks == case.tasks


@zoo
def test_tensors_are_the_models_parameters_in_order_and_once(case: Case) -> None:
    model = case.build()
    tensors = find_components(model, case.inputs(), **case.options).tensors
    order = [id(parameter) for parameter in model.parameters()]
    assert [id(t.parameter) for t in tensors] == sorted(
        {id(t.parameter) for t in tensors}, key=order.index
    )
    for tensor in tensors:
        assert tensor.owners
        for module, name in tensor.owners:
            assert hasattr(module, name)
            assert getattr(module, name).shape == tensor.parameter.shape


class Random(nn.Module):
    """A random tree or net of layers: node `i` adds up what `parents[i]` give."""

    def __init__(self, parents: list[list[int]], tasks: list[int], tied: bool) -> None:
        super().__init__()
        self.parents, self.tasks = parents, tasks
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in parents)
        if tied:
            self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values: list[Tensor] = []
        for parents, layer in zip(self.parents, self.layers, strict=True):
            inputs = sum((values[p] for p in parents), start=x)
            values.append(layer(inputs).tanh())
        return {f"t{i}": values[node] for i, node in enumerate(self.tasks)}


@st.composite
def nets(draw: st.DrawFn, most_parents: int) -> Random:
    size = draw(st.integers(2, 9))
    parents = [
        draw(st.lists(st.integers(0, i - 1), unique=True, max_size=most_parents)) if i else []
        for i in range(size)
    ]
    tasks = draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=4))
    return Random(parents, tasks, tied=draw(st.booleans()))


def moved_outputs(model: nn.Module, parameter: nn.Parameter, x: Tensor) -> tuple[str, ...]:
    """The oracle: the outputs that turn into NaN when the parameter does."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
        outputs = model(x)
        parameter.copy_(before)
    return tuple(task for task, output in outputs.items() if output.isnan().any())


@settings(max_examples=40)
@given(model=st.one_of(nets(most_parents=1), nets(most_parents=3)))
def test_detection_equals_filling_with_nan(model: Random) -> None:
    x = torch.randn(2, 3)
    components = find_components(model, x)
    assert components.tasks == tuple(f"t{i}" for i in range(len(model.tasks)))
    for tensor in components.tensors:
        moved = moved_outputs(model, tensor.parameter, x)
        expected = SHARED if moved == components.tasks else "+".join(moved) or UNUSED
        assert tensor.component == expected


@settings(max_examples=20)
@given(model=nets(most_parents=3), frozen=st.sets(st.integers(1, 8)))
def test_freezing_changes_only_what_is_frozen(model: Random, frozen: set[int]) -> None:
    x = torch.randn(2, 3)
    model.tasks[0] = 0  # whose layer is never frozen, so that something is left to prune
    before = detected(model, x)
    for i in frozen & set(range(1, len(model.layers))):
        if model.layers[i].weight is not model.layers[0].weight:
            model.layers[i].requires_grad_(False)
    for tensor in find_components(model, x).tensors:
        was = before[tensor.name]
        stays = tensor.parameter.requires_grad or was == UNUSED
        assert tensor.component == (was if stays else FROZEN)


def test_tied_weights_have_all_their_owners() -> None:
    model = awkward.Tied()
    tied = find_components(model, X)["a+b"]
    assert [(tensor.name, tensor.parameter) for tensor in tied] == [
        ("heads.a.weight", model.embedding.weight)
    ]
    assert tied[0].owners == (
        (model.heads["a"], "weight"),
        (model.heads["b"], "weight"),
        (model.embedding, "weight"),
    )


def test_an_aliased_module_is_one_owner() -> None:
    model = awkward.Aliased()
    (head,) = find_components(model, X)["a"]
    assert head.owners == ((model.heads["a"], "weight"),)


def test_pruned_and_parametrized_tensors_count_as_weight() -> None:
    pruned, parametrized = awkward.Pruned(), awkward.Parametrized()
    first = find_components(pruned, X).tensors[0]
    assert first.name == "body.0.weight"
    assert first.parameter is pruned.body[0].weight_orig
    assert first.owners == ((pruned.body[0], "weight"),)
    first = find_components(parametrized, X).tensors[0]
    assert first.name == "body.0.weight"
    assert first.parameter is parametrized.body[0].parametrizations.weight.original
    assert first.owners == ((parametrized.body[0], "weight"),)


def test_a_batch_of_one_passes_batch_norm_in_train_mode() -> None:
    assert detected(awkward.Auxiliary(), X[:1])["heads.aux.weight"] == "aux"


def test_auxiliary_heads_are_found_in_eval_mode_too() -> None:
    model = awkward.Auxiliary().eval()
    assert find_components(model, X).tasks == ("a", "b", "aux")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert detected(Net().to(dtype), X.to(dtype)) == detected(Net())


def test_reentrant_checkpointing_of_what_has_no_grad_before_it() -> None:
    class First(Net):
        def features(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=True)

    assert detected(First()) == detected(Net())


def test_inputs_by_position_and_by_keyword() -> None:
    class Two(Net):
        def forward(self, x: Tensor, *, y: Tensor) -> Any:
            return super().forward(x + y)

    assert detected(Two(), {"x": X, "y": X}) == detected(Net(), (X,))


def test_cuda_model_on_its_device(device: torch.device) -> None:
    assert detected(Net().to(device), X.to(device)) == detected(Net())


# --- Wrappers and the caller's state -------------------------------------------------------------


def test_unwrap_and_detection_through_wrappers() -> None:
    model = Net()
    for wrap in (torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))):
        wrapped = wrap(model)
        assert unwrap(wrapped) is model
        assert detected(wrapped) == detected(model)


def test_compiled_in_place_and_inside() -> None:
    model = Net()
    model.compile(backend="eager")
    model.body = torch.compile(model.body, backend="eager")
    calls = model._compiled_call_impl
    found = detected(model, groups={"shared": ["body.0"]})
    assert found["body._orig_mod.0.weight"] == found["body._orig_mod.2.weight"] == SHARED
    assert found["heads.a.weight"] == "a"
    assert model._compiled_call_impl is calls


def test_a_compiled_model_is_not_compiled_by_the_probe() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = Net()
    model.body = torch.compile(model.body, backend=backend)
    find_components(model, X)
    assert compiled == []
    model(X)
    assert len(compiled) == 1
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_is_looked_through() -> None:
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert unwrap(torch.compile(wrapped)) is model
    assert detected(wrapped) == detected(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random:UserWarning")  # torch 2.6, on a CPU
def test_sharded_models_are_refused() -> None:
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = Net()
    weight = tensors.distribute_tensor(model.body[0].weight, mesh, [tensors.Shard(0)])
    model.body[0].weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"body\.0\.weight is sharded .* before sharding"):
        find_components(model, X)


@pytest.mark.parametrize(
    "state",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_state_does_not_matter(state: Callable[[], Any]) -> None:
    model, expected = Net(), detected(Net())
    with state():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x = X.clone()  # made in inference mode, perhaps
        cached = model(x) if torch.is_autocast_enabled("cpu") else None
        assert detected(model, x) == expected
        assert torch.is_grad_enabled() == grad
        assert torch.is_inference_mode_enabled() == inference
        if cached is not None:
            assert torch.is_autocast_cache_enabled()
            assert torch.equal(model(x)["a"], cached["a"])


def test_the_autocast_cache_holds_nothing_of_the_probe() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        find_components(model, X)
        sum(output.sum() for output in model(X).values()).backward()
    assert all(type(p.grad) is Tensor for p in model.parameters())


def test_torch_is_put_back() -> None:
    before = dict(vars(torch.inference_mode))
    find_components(awkward.NoGradBody(), X)  # looks a second time, through no_grad
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)
    assert dict(vars(torch.inference_mode)) == before


def test_the_second_look_may_fail() -> None:
    class Teacher(Net):
        """Writes to a parameter under no_grad, which fails when that is ignored."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = linear()

        def features(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.body[0].weight.mul_(0.5)
            return self.body(x)

    model = Teacher()
    weight = model.body[0].weight.detach().clone()
    assert detected(model)["spare.weight"] == UNUSED
    assert torch.equal(model.body[0].weight, weight)


# --- No trace ------------------------------------------------------------------------------------


@zoo
@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(case: Case, training: bool) -> None:
    model, x = case.build(), case.inputs()
    loss = torch.stack(list(case.losses(model(x)).values())).sum()
    loss.backward()  # gradients, caches and statistics that are not those of the start
    model.train(training)
    next(iter(model.children())).train(not training)
    kept = x.clone()
    assert_untouched(model, lambda: find_components(model, x, **case.options))
    assert torch.equal(x, kept)


class Leaky(Net):
    """Keeps whatever it computes, in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {}
        self.nested = {"deep": [[], {"x": set()}], "queue": deque(maxlen=3)}
        self.ordered: OrderedDict[str, Any] = OrderedDict(a=1)
        self.object = types.SimpleNamespace(last=None, items=[])
        self.hidden = [nn.BatchNorm1d(awkward.WIDTH)]
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(awkward.WIDTH))
        self.register_buffer("lazy", None)
        self.generator = torch.Generator().manual_seed(3)
        self.table["self"] = self.table

    def features(self, x: Tensor) -> Tensor:
        self.step += 1
        self.ema.copy_(self.hidden[0](x).mean(0).detach())
        self.lazy = x
        x = x + torch.rand(1) + random.random() + torch.rand(1, generator=self.generator)
        self.table[str(len(self.table))] = x
        self.nested["deep"][0].append(x)
        self.nested["deep"][1]["x"].add(1)
        self.nested["queue"].append(x)
        self.ordered.move_to_end("a")
        self.ordered["b"] = x
        self.object.last = x
        self.object.items.append(x)
        self.body[0].added = nn.Linear(1, 1)
        self.body[1].register_forward_hook(lambda *_: None)
        self.body[0].weight.note = x
        self.body[0].weight.register_hook(lambda grad: grad)
        self.body.eval()
        return self.body(x)


def test_leaky_models_keep_nothing() -> None:
    model = Leaky()
    x = X.clone()
    generator = model.generator.get_state()
    assert_untouched(model, lambda: find_components(model, x))
    assert torch.equal(model.generator.get_state(), generator)
    torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(model.body)


@functools.lru_cache
def _ramp(width: int) -> tuple[Tensor, list[Tensor]]:
    return torch.linspace(0, 1, width), [torch.ones(width)]


@functools.lru_cache
def _column(width: int) -> Tensor:
    return torch.zeros(1, width)[0]  # a view, and nothing but it keeps its base


_TABLES: dict[int, Tensor] = {}


class Caching(Net):
    """Keeps tables outside of itself: of the Python module, of the class, behind lru_cache."""

    shared: ClassVar[dict[str, Any]] = {"tables": {}}

    def features(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        if width not in _TABLES:
            _TABLES[width] = torch.ones(width) / width
        tables = self.shared["tables"]
        if width not in tables:
            tables[width] = torch.zeros(width)
        ramp, (ones,) = _ramp(width)
        x = (x + ramp) * ones + _TABLES[width] + tables[width]
        return self.body(x + _column(width))


def test_caches_outside_the_model_serve_later_runs() -> None:
    model = Caching()
    assert find_components(model, X).names == find_components(Net(), X).names
    outputs = model(X)
    sum(output.sum() for output in outputs.values()).backward()
    for cache in (_TABLES, Caching.shared["tables"]):
        assert all(type(kept) is Tensor and not kept.requires_grad for kept in cache.values())
        cache.clear()
    _ramp.cache_clear()
    _column.cache_clear()
    expected = model(X)
    assert all(torch.equal(outputs[task], expected[task]) for task in expected)


class Dropping(Net):
    """Leaves its inner layer out at random while it trains, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(awkward.WIDTH, awkward.WIDTH)

    def features(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if self.training and torch.rand(()) < 0.99 else self.inner(x)


def test_a_layer_that_training_drops_at_random_is_found() -> None:
    torch.manual_seed(0)
    model = Dropping()
    components = {t.name: t.component for t in find_components(model, X).tensors}
    assert components["inner.weight"] == SHARED


class Sneaky(Net):
    """Writes to buffers where no schema says so, and to gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(awkward.WIDTH))
        self.register_buffer("var", torch.ones(awkward.WIDTH))

    def features(self, x: Tensor) -> Tensor:
        x.sum().item()
        x = nn.functional.batch_norm(x, self.mean, self.var, training=True)
        self.body(x).sum().backward()
        return self.body(x)


@pytest.mark.parametrize("with_grad", [True, False])
def test_statistics_and_gradients_written_in_forward_are_put_back(with_grad: bool) -> None:
    model = Sneaky()
    if with_grad:
        sum(output.sum() for output in model(X).values()).backward()
    assert_untouched(model, lambda: find_components(model, X))


class Fails(Net):
    def features(self, x: Tensor) -> Tensor:
        self.calls = 1
        self.heads["a"].weight.data += 1
        torch.rand(1)
        self.body(x)
        raise LookupError("no such thing\nin this model")


def test_a_failing_model_is_named_and_untouched() -> None:
    model = Fails()

    def run() -> None:
        with pytest.raises(
            RuntimeError, match=r"failed on example_inputs \(LookupError: no such thing\)"
        ) as caught:
            find_components(model, X)
        assert isinstance(caught.value.__cause__, LookupError)

    assert_untouched(model, run)


def test_models_can_be_copied_and_trained_after_the_probe() -> None:
    for case in ZOO:
        model = case.build()
        find_components(model, case.inputs(), **case.options)
        if case.name != "Hooked":  # its hook is bound to the original
            with contextlib.suppress(RuntimeError):  # torch's own limits for non-leaf attributes
                copy.deepcopy(model)
        torch.stack(list(case.losses(model(case.inputs())).values())).sum().backward()
        assert all(p.grad is None or type(p.grad) is Tensor for p in model.parameters())


# --- Outputs -------------------------------------------------------------------------------------

LEFT_RIGHT = {
    "body.0.weight": "shared",
    "body.2.weight": "shared",
    "heads.a.weight": "left",
    "heads.b.weight": "right",
}
NAMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda a, b: {"left": a, "right": b},
    "ordered": lambda a, b: OrderedDict(left=a, right=b),
    "namedtuple": lambda a, b: Pair(a, b),
    "typed": lambda a, b: TypedPair(a, b),
    "dataclass": lambda a, b: Record(a, b),
    "nested": lambda a, b: {"left": {"x": [a, None], "y": 3}, "right": (b, "text")},
    "no tensors": lambda a, b: {"left": a, "none": None, "right": b, "epoch": 3, "names": ["x"]},
    "loss": lambda a, b: {"loss": a.sum() + b.sum(), "left": a, "right": b},
    "distribution": lambda a, b: {"left": torch.distributions.Normal(a, 1.0), "right": b},
    "partly without grad": lambda a, b: {"left": (a.argmax(1), a), "right": b},
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED.keys())
def test_named_outputs(make: Callable[[Tensor, Tensor], Any]) -> None:
    components = find_components(Returns(make), X)
    assert components.tasks == ("left", "right")
    assert by_name(components) == LEFT_RIGHT


@pytest.mark.parametrize("make", [lambda a, b: (a, b), lambda a, b: [a, b]], ids=["tuple", "list"])
def test_positional_outputs(make: Callable[[Tensor, Tensor], Any]) -> None:
    assert find_components(Returns(make), X).tasks == ("0", "1")
    components = find_components(Returns(make), X, task_outputs=["left", "right"])
    assert components.tasks == ("left", "right")
    assert by_name(components) == LEFT_RIGHT


def splits() -> dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]]:
    return {
        "callables": (
            lambda a, b: torch.stack([a.sum(1), b.sum(1)]),
            {"left": lambda o: o[0], "right": lambda o: o[1]},
        ),
        "keys": (lambda a, b: {"l": a, "r": b, "x": a}, {"left": "l", "right": "r"}),
        "indices": (lambda a, b: (a, b, a.argmax()), {"left": 0, "right": 1}),
        "attributes": (lambda a, b: Pair(a, b), {"left": "left", "right": "right"}),
        "any object": (
            lambda a, b: types.SimpleNamespace(p=a, q=b),
            {"left": "p", "right": lambda o: o.q},
        ),
        "some keys": (lambda a, b: {"x": a + 1, "right": b, "left": a}, ["left", "right"]),
        "renamed fields": (lambda a, b: TypedPair(a, b), ["left", "right"]),
    }


@pytest.mark.parametrize(("make", "task_outputs"), splits().values(), ids=splits().keys())
def test_task_outputs(make: Callable[[Tensor, Tensor], Any], task_outputs: Any) -> None:
    components = find_components(Returns(make), X, task_outputs=task_outputs)
    assert components.tasks == ("left", "right")
    if make(torch.zeros(2, 2), torch.zeros(2, 2)) is not None and not callable(
        next(iter(task_outputs.values())) if isinstance(task_outputs, dict) else None
    ):
        assert by_name(components) == LEFT_RIGHT


def test_one_task_as_the_user_says() -> None:
    model = nn.Sequential(linear(), linear())
    components = find_components(model, X, task_outputs={"main": lambda output: output})
    assert components.names == components.tasks == ("main",)


def test_model_output_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.utils import ModelOutput

    def make(a: Tensor, b: Tensor) -> Any:
        return ModelOutput(loss=a.sum() + b.sum(), left=a, right=b, hidden_states=None)

    assert detected(Returns(make)) == LEFT_RIGHT


ERRORS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, str]] = {
    "one tensor": (lambda a, b: a, None, r"returns one tensor.*task_outputs=.*groups=\{\"main\""),
    "an object": (lambda a, b: types.SimpleNamespace(a=a), None, "returns a SimpleNamespace"),
    "one entry": (lambda a, b: {"out": a, "aux": None}, None, r"one output \('out'\) only"),
    "no entry": (lambda a, b: {}, None, "returns no tensor, so it is not multi-task"),
    "argmax": (lambda a, b: {"x": a, "y": b.argmax(1)}, None, r"'y' has no gradient .*int64"),
    "detached": (lambda a, b: {"x": a, "y": b.detach()}, None, r"'y' has no gradient .*float32"),
    "reserved": (lambda a, b: {"shared": a, "y": b}, None, "'shared' cannot be a task name"),
    "unused": (lambda a, b: {"unused": a, "y": b}, None, "'unused' cannot be a task name"),
    "plus": (lambda a, b: {"x+y": a, "y": b}, None, r"'x\+y' cannot be a task name"),
    "dot": (lambda a, b: {"x.y": a, "y": b}, None, r"'x\.y' cannot be a task name"),
    "empty": (lambda a, b: {"": a, "y": b}, None, "'' cannot be a task name"),
    "integer": (lambda a, b: {0: a, 1: b}, None, "must be a string, found 0"),
    "function": (
        lambda a, b: {"x": a},
        {"y": lambda out: out["typo"]},
        r"function of task 'y' failed on the model's output \(a dict\): KeyError: 'typo'",
    ),
    "no tensor": (lambda a, b: (a, None), ["x", "y"], "task 'y' holds no tensor"),
    "too few": (lambda a, b: (a, b), ["x"], "names 1 tasks, but the model returns 2"),
    "wrong keys": (lambda a, b: {"p": a, "q": b}, ["x", "y"], r"returns keys \['p', 'q'\]"),
    "unsplit": (lambda a, b: a, ["x", "y"], "but the model returns one tensor"),
    "missing key": (lambda a, b: {"p": a}, {"x": "p", "y": "q"}, "task 'y' .* at 'q'"),
    "missing index": (lambda a, b: (a,), {"x": 0, "y": 4}, "task 'y' .* at 4"),
    "frozen name": (lambda a, b: (a, b), ["x", "frozen"], "'frozen' cannot be a task name"),
    "twice": (lambda a, b: (a, b), ["x", "x"], "names 'x' twice"),
    "none": (lambda a, b: (a, b), [], "task_outputs is empty"),
}


@pytest.mark.parametrize(("make", "task_outputs", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_output_errors(
    make: Callable[[Tensor, Tensor], Any], task_outputs: Any, match: str
) -> None:
    model = Returns(make)

    def run() -> None:
        with pytest.raises(ValueError, match=match):
            find_components(model, X, task_outputs=task_outputs)

    assert_untouched(model, run)


# --- Groups --------------------------------------------------------------------------------------


class Never(Net):
    def forward(self, x: Tensor) -> Any:
        raise AssertionError("the model must not be run")


def test_groups_for_everything_need_no_run() -> None:
    model = Never()
    components = find_components(
        model,
        groups={"shared": ["body"], "b": model.heads["b"], "a": [model.heads["a"].weight]},
    )
    assert components.tasks == ("b", "a")
    assert by_name(components) == detected(Net())
    assert find_components(Never(), groups={"main": ["*"]}).names == ("main",)
    declared = find_components(
        Never(), groups={"shared": "*"}, task_outputs={"a": lambda o: o, "b": lambda o: o}
    )
    assert (declared.tasks, declared.names) == (("a", "b"), ("shared",))


def test_groups_override_a_part() -> None:
    components = find_components(
        awkward.UnusedParts(), X, groups={"stem": ["body.0.*"], "b+a": "heads.?", "a": "dropped"}
    )
    assert by_name(components) == {
        "body.0.weight": "stem",
        "body.2.weight": "shared",
        "heads.a.weight": "shared",
        "heads.b.weight": "shared",
        "spare.weight": "unused",
        "dropped.weight": "a",
    }
    assert components.names == ("shared", "a", "stem")


def test_groups_put_partly_shared_names_in_declared_order() -> None:
    components = find_components(awkward.Branching(), X, groups={"b+a": ["trunk"], "x": ["a"]})
    assert components["a+b"][0].name == "trunk.weight"
    assert components.names == ("c", "b", "c+b", "a+b", "x")


def test_groups_can_prune_what_is_frozen_or_unused() -> None:
    assert detected(awkward.FrozenBody(), groups={"shared": ["body"]}) == detected(Net())
    assert detected(awkward.UnusedParts(), groups={"b": ["spare"]})["spare.weight"] == "b"


def test_selectors_find_aliases_wrapped_and_pruned_tensors() -> None:
    assert detected(awkward.Aliased(), groups={"stem": ["alias"]})["heads.a.weight"] == "stem"
    pruned = awkward.Pruned()
    for selector in ("body.0.weight", "body.0.weight_orig", "body.0", pruned.body[0].weight_orig):
        assert detected(pruned, groups={"stem": [selector]})["body.0.weight"] == "stem"
    model = Net()
    model.body = torch.compile(model.body)
    found = detected(model, groups={"stem": ["body.0", model.body._orig_mod[2]]})
    assert list(found.values()) == ["stem", "stem", "a", "b"]
    everything = find_components(torch.compile(model), groups={"main": [torch.compile(model)]})
    assert everything.names == ("main",)


def test_tied_weights_in_two_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"'heads.a.weight' \(tied to 'heads.b.weight'"):
        find_components(awkward.Tied(), X, groups={"a": ["heads.a"], "b": ["heads.b"]})


# --- What is prunable ----------------------------------------------------------------------------


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


def test_exclude_leaves_tensors_out() -> None:
    model = Net()
    assert detected(model, exclude="body.*") == {"heads.a.weight": "a", "heads.b.weight": "b"}
    selectors = [model.body[2], model.heads["a"].weight, "heads.b.bias"]
    assert detected(model, exclude=selectors) == {"body.0.weight": SHARED, "heads.b.weight": "b"}
    tied = awkward.Tied()
    assert "heads.a.weight" not in detected(tied, exclude=["embedding"])


def test_only_real_floating_weights() -> None:
    model = Net()
    model.other = nn.Linear(2, 2, dtype=torch.complex64)
    model.whole = nn.Linear(2, 2)
    model.whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert detected(model) == detected(Net())


# --- The result ----------------------------------------------------------------------------------


def test_components_as_a_container() -> None:
    components = find_components(awkward.Branching(), X, exclude="a")
    assert components.names == ("shared", "c", "b", "c+b")
    assert "c+b" in components
    assert "a" not in components
    assert components["a"] == components[UNUSED] == ()
    assert [tensor.name for tensor in components["c+b"]] == ["branch.weight"]
    with pytest.raises(KeyError, match="no component 'd'; there are shared"):
        components["d"]


def test_the_table() -> None:
    table = str(find_components(awkward.UnusedParts(), X)).splitlines()
    assert [line.split() for line in table] == [
        ["component", "tensors", "weights", "share"],
        ["shared", "2", "72", "70.6", "%"],
        ["a", "1", "12", "11.8", "%"],
        ["b", "1", "18", "17.6", "%"],
        ["unused", "2", "72", "dense"],
    ]
    assert len({len(line) for line in table[1:-1]}) == 1


def test_pruned_twice_is_still_found() -> None:
    model = awkward.Pruned()
    prune.random_unstructured(model.body[0], "weight", 0.5)
    assert detected(model) == detected(Net())


def test_other_outputs_in_eval_mode_tell_nothing() -> None:
    """By index, a task is an entry of a tuple in training, and a sample of a tensor otherwise."""

    class TwoMinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
            self.blend = nn.Linear(4, 2)  # in evaluation only

        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            return (self.a(h), self.b(h)) if self.training else self.blend(h)

    found = find_components(TwoMinds(), torch.ones(2, 4), task_outputs={"first": 0, "second": 1})
    assert [tensor.name for tensor in found["unused"]] == ["blend.weight"]
