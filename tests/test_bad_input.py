"""Bad input: each row an error that names the argument, what was found and the remedy.

The model is as it was after each of them, bit for bit, and what is done next, a run from the
beginning or the rest of one, is what it would have been.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from toys import TwoTasks, losses, prepare, tensors, train, weights, zeros
from untouched import assert_untouched

from torch_adapmtl import (
    SNIP,
    CallableWeighting,
    DiSparse,
    EqualWeighting,
    FixedWeighting,
    GradientAllocation,
    IterativeMagnitude,
    LAMPAllocation,
    Magnitude,
    Paper,
    Pruner,
    SensitivityAllocation,
    SoftThreshold,
    SoftThresholdPruning,
    SparsitySchedule,
    StabilityWeighting,
    Taylor,
    apply_adapmtl,
    find_components,
    soft_threshold,
    soft_threshold_unstructured,
)
from torch_adapmtl.run.checkpoint import pack, unpack
from torch_adapmtl.weighting.simple import make_weighting

NAN, INF = math.nan, math.inf
STEPS = 8
Error = type[Exception]


# --- what a row is ------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a misuse has at hand: a model and, in the middle of a run, its handle and optimiser."""

    model: Any
    pruner: Any = None
    optimizer: Any = None
    wrapped: Any = None


@dataclass(frozen=True)
class Row:
    """A misuse, and the error that it gives.

    Attributes:
        id: What is wrong, in words.
        do: The misuse.
        error: The type of the error.
        named: What the message must name: the argument, or the object.
        found: What it must say was found.
        remedy: What it must say to do.
        model: What makes the model.
        after: Steps trained before; None if the model has not been prepared.
        options: How it was prepared.
        ignored: Buffers that the error may change: the count that it reports.
        goes_on: Whether the model can be pruned and trained afterwards.
        first: What comes before the misuse.
    """

    id: str
    do: Callable[[Scene], object]
    error: Error
    named: str
    found: str
    remedy: str
    model: Callable[[], nn.Module] = TwoTasks
    after: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ignored: Collection[str] = ()
    goes_on: bool = True
    first: Callable[[Scene], object] = id

    def scene(self) -> Scene:
        torch.manual_seed(0)
        model: Any = self.model()
        scene = Scene(model)
        if self.after is not None:
            scene.pruner = prepare(model, **{"total_steps": STEPS, **self.options})
            scene.optimizer = torch.optim.SGD(scene.pruner.param_groups(lr=0.1))
            train(model, scene.pruner, scene.optimizer, range(self.after))
        self.first(scene)
        return scene


def the_rest(scene: Scene, after: int | None) -> dict[str, Tensor]:
    """Train to the end, or from the beginning, and say what comes out."""
    model, pruner, optimizer = scene.model, scene.pruner, scene.optimizer
    if pruner is None:
        pruner = prepare(model, total_steps=STEPS)
        optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    if not pruner._finalized:
        pruner.weighting.record.nonfinite.zero_()
        train(model, pruner, optimizer, range(pruner._step, STEPS))
        pruner.finalize()
        assert zeros(pruner) == round(pruner.target_sparsity * weights(pruner))
    sum(loss for loss in losses(model, STEPS).values()).backward()
    optimizer.step()
    return tensors(model)


def refused(row: Row) -> None:
    """Check a row, all of it."""
    scene = row.scene()

    def misuse() -> None:
        with pytest.raises(row.error) as caught:
            row.do(scene)
        message = str(caught.value)
        for part in (row.named, row.found, row.remedy):
            assert part in message, message

    assert_untouched(scene.model, misuse, row.ignored)
    if row.goes_on:
        twin = row.scene()
        expected, result = the_rest(twin, row.after), the_rest(scene, row.after)
        assert list(result) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in result.items())


# --- apply_adapmtl: its arguments ---------------------------------------------------------------


def call(**options: Any) -> Callable[[Scene], object]:
    return lambda scene: prepare(scene.model, **{"total_steps": STEPS, **options})


def option(id: str, error: Error, named: str, found: str, remedy: str, **options: Any) -> Row:
    return Row(id, call(**options), error, named, found, remedy)


V, T, R = ValueError, TypeError, RuntimeError
INPUTS = "a tensor, a tuple of positional arguments or a dict of keyword arguments"

ARGUMENTS = [
    *(
        option(
            f"target {value!r}", V, "target_sparsity", f"got {value!r}", "90 % is 0.9",
            target_sparsity=value,
        )
        for value in (1.0, 90, -0.1, NAN, INF, "0.9", None, True, 0.9j)
    ),
    *(
        option(
            f"steps {value!r}", V, "total_steps", f"got {value!r}", "number of optimizer steps",
            total_steps=value,
        )
        for value in (0, -3, 10.0, NAN, INF, True, "10", None, 10**20)
    ),
    option("a schedule by name", T, "schedule", "'cubic'", "SparsitySchedule(shape=",
           schedule="cubic"),
    *(
        option(f"{name} {value!r}", V, name, f"got {value!r}", "must be one of 'l", **{name: value})
        for name, value in (("granularity", "channel"), ("allocation", "uniform"),
                            ("allocation", LAMPAllocation))
    ),
    option("mode", V, "mode", "'fast'", "one of 'adaptive', 'paper'", mode="fast"),
    option("mode, its class", V, "mode", "class", "one of 'adaptive', 'paper'", method=Paper),
    option("gradient", V, "gradient", "'none'", "one of 'straight_through', 'mask'",
           gradient="none"),
    option("reach 1", V, "reach", "got 1.0", "above 1", reach=1.0),
    option("reach in words", T, "reach", "'far'", "a number", reach="far"),
    *(
        option(f"{name} in {method!r}", V, name, f"mode={method!r}", "leave it out",
               method=method, **{name: value})
        for mode, name, value in (
            (Paper(), "granularity", "component"),
            (Paper(), "allocation", "sensitivity"),
            (Paper(), "schedule", SparsitySchedule()),
            (Paper(), "min_density", 0.1),
            (Paper(), "max_density", 0.1),
            (SNIP(), "gradient", "mask"),
            (SNIP(), "allocation", "common"),
            (SNIP(), "reach", 2.0),
        )
    ),
    # Densities.
    option("a floor above 1", V, "min_density of 'shared'", "got 1.5", "lie in [0, 1]",
           min_density=1.5),
    option("a floor of NaN", V, "max_density of 'a'", "got nan", "lie in [0, 1]",
           max_density={"a": NAN}),
    option("a floor in words", T, "min_density of 'shared'", "'some'", "a fraction",
           min_density="some"),
    option("a floor of an unknown component", V, "min_density", "'c'", "['shared', 'a', 'b']",
           min_density={"c": 0.6}),
    option("floors above what is left", V, "min_density", "0 to 36 of 72", "Change the target",
           min_density=0.5),
    option("ceilings below it", V, "max_density", "152 to 1", "Change the target",
           max_density=0.1),
    option("a floor above the ceiling", V, "max_density=0.5", "at least 30 and at most 24",
           "Lower the one", min_density={"a": 0.6}, max_density={"a": 0.5}),
    # Weightings.
    option("weighting", V, "weighting", "'gradnorm'", "one of 'stability'", weighting="gradnorm"),
    option("weighting, a number", T, "weighting", "got 3", "'equal', a mapping", weighting=3),
    option("a weighting without a task", V, "weights", "missing ['b']", "exactly the tasks",
           weighting={"a": 1.0}),
    option("a weighting of an unknown task", V, "weights", "unknown ['c']", "exactly the tasks",
           weighting={"a": 1.0, "b": 1.0, "c": 1.0}),
    option("a weighting of other tasks", V, "weighting", "['x']", "make it for these",
           weighting=EqualWeighting(["x"])),
    # Groups, and what is prunable.
    option("groups, a list", T, "groups", "found list", "map component names", groups=["body"]),
    option("a group that is a number", T, "groups", "found 0", "be a string", groups={0: ["body"]}),
    option("a group of a number", T, "groups['a']", "found int", "a name, glob, module or param",
           groups={"a": 3}),
    option("a group with a number", T, "groups['a']", "found int", "a name, a glob, a module",
           groups={"a": [3]}),
    option("an unknown name", V, "groups['a']", "'bodies' matches no", "model.named_modules()",
           groups={"a": ["bodies"]}),
    option("an unknown glob", V, "groups['a']", "'bodies.*' matches no", "model.named_modules()",
           groups={"a": ["bodies.*"]}),
    option("a foreign module", V, "groups['a']", "the Linear module", "one of model.modules()",
           groups={"a": [nn.Linear(2, 2)]}),
    option("a foreign tensor", V, "groups['a']", "shape (2, 3)", "one of model.parameters()",
           groups={"a": [torch.ones(2, 3)]}),
    option("a bias", V, "groups['a']", "['body.bias']", "leave the group out",
           groups={"a": ["body.bias"]}),
    option("an empty group", V, "groups['a']", "[]", "leave the group out", groups={"a": []}),
    option("groups that overlap", V, "groups: 'a' (by 'body') and 'b' (by '*')", "'body.weight'",
           "leave it to one", groups={"a": ["body"], "b": ["*"]}),
    option("a reserved name", V, "groups['unused']", "'unused'", "rename it",
           groups={"unused": ["body"]}),
    option("a name with a dot", V, "groups['a.b']", "'a.b'", "rename it",
           groups={"a.b": ["body"]}),
    option("shared, joined", V, "groups['a+shared']", "'shared'", "rename it",
           groups={"a+shared": ["body"]}),
    option("joined to nothing", V, "groups['a+']", "''", "rename it", groups={"a+": ["body"]}),
    option("a group of an unknown task", V, "groups['a+c']", "'c' is not a task",
           "the tasks are a, b", groups={"a+c": ["body"]}),
    option("no task", V, "groups", 'everything into "shared"', "task_outputs=",
           groups={"shared": ["*"]}),
    option("exclude everything", V, "exclude=", "TwoTasks has nothing to prune", "narrow",
           exclude=["*"]),
    option("exclude nothing", V, "exclude", "'nothing' matches no", "model.named_modules()",
           exclude=["nothing"]),
    option("exclude a number", T, "exclude", "found int", "a name, glob, module or parameter",
           exclude=3),
    option("prunable, a type", T, "prunable", "found type", "map module types",
           prunable=nn.Linear),
    option("prunable, a type's name", T, "prunable", "'Linear'", "must be module types",
           prunable={"Linear": "weight"}),
    option("prunable, no name", T, "prunable[Linear]", "found None", "a tensor name or glob",
           prunable={nn.Linear: None}),
    option("prunable, no names", T, "prunable[Linear]", "['weight', 3]", "a tensor name or glob",
           prunable={nn.Linear: ["weight", 3]}),
    option("prunable, misspelt", V, "prunable", "'wieght' matches no", "which has bias, weight",
           prunable={nn.Linear: "wieght"}),
    # Inputs and outputs.
    option("no inputs", V, "example_inputs", "is None", "pass example_inputs=",
           example_inputs=None),
    option("inputs in a list", T, "example_inputs", "found list", "(inputs,)",
           example_inputs=[torch.ones(2, 6)]),
    *(
        option(f"inputs {name}", R, "example_inputs", f"failed on example_inputs ({found}",
               INPUTS, example_inputs=inputs)
        for name, found, inputs in (
            ("of another width", "RuntimeError: ", torch.ones(2, 5)),
            ("of another dtype", "RuntimeError: ", torch.ones(2, 6).long()),
            ("too many", "TypeError: ", (torch.ones(2, 6), torch.ones(2, 6))),
            ("none", "TypeError: ", ()),
            ("of another name", "TypeError: ", {"y": torch.ones(2, 6)}),
        )
    ),
    option("outputs, a name", T, "task_outputs", "found str", "a sequence of task names",
           task_outputs="left"),
    option("outputs of an unknown task", V, "task_outputs", "keys ['a', 'b']", "name its keys",
           task_outputs=["a", "c"]),
    option("outputs twice", V, "task_outputs", "'a' twice", "distinct", task_outputs=["a", "a"]),
    option("no outputs", V, "task_outputs", "is empty", "name at least one task", task_outputs=[]),
    option("outputs that are not there", V, "task_outputs: task 'a'", "at 'zz'", "nothing there",
           task_outputs={"a": "zz"}),
]  # fmt: skip


# --- apply_adapmtl: the model -------------------------------------------------------------------


def prepare_whole(scene: Scene) -> object:
    """Name everything, so that the model need not run."""
    groups = {"shared": ["body.weight"], "a": ["heads.a"], "b": ["heads.b"]}
    return prepare(scene.model, groups=groups, task_outputs=["a", "b"])


def body(make: Callable[[Tensor], Any], grad: bool = True) -> Callable[[], nn.Module]:
    """`TwoTasks` with another kind of tensor as the body's weight."""

    def made() -> nn.Module:
        model = TwoTasks()
        model.body.weight = nn.Parameter(make(model.body.weight.detach()), grad)
        return model

    return made


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return TwoTasks()


def lazy() -> nn.Module:
    model: Any = TwoTasks()
    model.body = nn.LazyLinear(12)
    return model


def quantised() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    model: nn.Module = quantization.quantize_dynamic(TwoTasks(), {nn.Linear}, dtype=torch.qint8)
    return model


class Wrapped(torch.Tensor):
    """A tensor that stands for another, as torchao's quantised weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        raise NotImplementedError(f"{func} of a quantised weight")


def with_attribute() -> nn.Module:
    model: Any = TwoTasks()
    model.adapmtl = 3
    return model


def with_threshold() -> nn.Module:
    model = TwoTasks()
    soft_threshold_unstructured(model.body, "weight", 0.1)
    return model


def with_masks() -> nn.Module:
    model = TwoTasks()
    prune.random_unstructured(model.body, "weight", amount=40)
    return model


class Fails(TwoTasks):
    def forward(self, x: Tensor) -> Any:
        raise LookupError("no such thing")


class OneOutput(TwoTasks):
    def forward(self, x: Tensor) -> Any:
        return self.heads["a"](self.body(x))


class Detached(TwoTasks):
    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        return {"a": outputs["a"], "b": outputs["b"].argmax(1)}


def unfit(
    id: str, model: Callable[[], Any], error: Error, named: str, found: str, remedy: str,
    do: Callable[[Scene], object] = prepare_whole,
) -> Row:  # fmt: skip
    return Row(id, do, error, named, found, remedy, model=model, goes_on=False)


DENSE, CAST = "make it one (.to_dense())", "cast it first, or leave it out"
FLOAT_FIRST = "prune the model in floating point"
MODELS = [
    unfit("integer weights", body(lambda w: w.char(), grad=False), V, "body.weight", "torch.int8",
          CAST),
    unfit("float8 weights", body(lambda w: w.to(torch.float8_e4m3fn), grad=False), V,
          "body.weight", "torch.float8_e4m3fn", CAST),
    unfit("complex weights", body(lambda w: w.cfloat()), V, "body.weight", "torch.complex64", CAST),
    unfit("a complex model", lambda: TwoTasks().to(torch.complex64), V, "body.weight",
          "torch.complex64", CAST, do=call()),
    unfit("sparse weights", body(lambda w: w.to_sparse()), V, "body.weight", "torch.sparse_coo",
          DENSE),
    unfit("compressed sparse weights", body(lambda w: w.to_sparse_csr()), V, "body.weight",
          "torch.sparse_csr", DENSE, do=call()),
    unfit("meta weights", body(lambda w: w.to("meta")), V, "body.weight", "the meta device",
          "to_empty(device=...)"),
    unfit("a model on the meta device", lambda: TwoTasks().to("meta"), V, "body.weight",
          "the meta device", "to_empty(device=...)", do=call()),
    unfit("weights of inference mode", in_inference_mode, V, "body.weight", "an inference tensor",
          "outside of torch.inference_mode()", do=call()),
    unfit("the same without a run", in_inference_mode, V, "body.weight", "an inference tensor",
          "copy.deepcopy"),
    unfit("a lazy module", lazy, V, "body.weight", "not initialised yet", "run one batch",
          do=call()),
    unfit("quantised modules", quantised, V, "body", "is a quantised module", FLOAT_FIRST,
          do=call()),
    unfit("quantised weights", body(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
          grad=False), V, "body.weight", "torch.qint8", FLOAT_FIRST),
    unfit("weights of another class", body(Wrapped, grad=False), V, "body.weight", "a Wrapped",
          "before it is quantised"),
    unfit("a scripted model", lambda: torch.jit.script(TwoTasks()), T, "model", "ScriptModule",
          "script it after finalize()", do=call()),
    unfit("a frozen model", lambda: TwoTasks().requires_grad_(False), V, "TwoTasks",
          "3 are frozen", "let some require grad", do=call()),
    unfit("a model without layers", nn.ReLU, V, "ReLU", "nothing to prune", "prunable=", do=call()),
    unfit("a forward that fails", Fails, R, "example_inputs", "LookupError: no such thing", INPUTS,
          do=call()),
    unfit("one output", OneOutput, V, "the model", "one tensor", "task_outputs=", do=call()),
    unfit("an output without gradient", Detached, V, "task 'b'", "torch.int64",
          "what the loss is computed from", do=call()),
    unfit("an attribute in the way", with_attribute, V, "'adapmtl'", "has an attribute",
          "rename it", do=call()),
    unfit("a threshold already", with_threshold, V, "'body.weight'", "has a soft threshold already",
          "prune.remove", do=call()),
    unfit("more masked than the target", with_masks, V, "target_sparsity=0.1", "17 zeros",
          "Change the target", do=call(target_sparsity=0.1)),
    unfit("the same for a baseline", with_masks, V, "target_sparsity=0.1", "hold 40",
          "raise the target", do=call(target_sparsity=0.1, method=Magnitude())),
    *(
        Row(f"{name} for a model", lambda scene, value=value: prepare(value), T, "model",
            found, "pass the model itself")
        for name, value, found in (
            ("None", None, "got a NoneType"),
            ("a class", TwoTasks, "got the class TwoTasks"),
            ("a state dict", {"weight": torch.ones(2, 2)}, "got a dict"),
        )
    ),
]  # fmt: skip


# --- in a run -----------------------------------------------------------------------------------


def running(
    id: str, do: Callable[[Scene], object], error: Error, named: str, found: str, remedy: str,
    after: int = 3, **rest: Any,
) -> Row:  # fmt: skip
    return Row(id, do, error, named, found, remedy, after=after, **rest)


def loss(**made: Any) -> Callable[[Scene], object]:
    """Pass these losses; a callable takes the real one of its task."""

    def passed(scene: Scene) -> object:
        real = losses(scene.model, 0)
        return scene.pruner.loss(
            {task: how(real.get(task)) if callable(how) else how for task, how in made.items()}
        )

    return passed


def load(change: Callable[[dict[str, Any]], Any], **options: Any) -> Callable[[Scene], object]:
    """Load the state of another run, changed."""

    def passed(scene: Scene) -> None:
        with torch.random.fork_rng():
            other = TwoTasks()
            pruner = prepare(other, **{"total_steps": STEPS, **options})
            train(other, pruner, torch.optim.SGD(other.parameters(), lr=0.1), range(5))
            state = copy.deepcopy(other.state_dict())
            state = change(state) or state
        scene.model.load_state_dict(state)

    return passed


OWN = "adapmtl._extra_state"


def own(change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({OWN: change(state[OWN])})


def header(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Another header, or other progress, of a run without masks."""

    def change(packed: Tensor) -> Tensor:
        settings, progress, masks = unpack(packed)
        for name, value in changes.items():
            (progress if name in progress else settings)[name] = value
        return pack(settings, progress, masks, [0] * len(masks))

    return own(change)


def shaped(key: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: torch.ones(shape)})


def foreign(**options: Any) -> Callable[[Scene], object]:
    return load(lambda state: None, **options)


DETACHED = "not detached or made anew"
LOSSES = [
    running("a vector", loss(a=lambda real: real.expand(3)), V, "losses['a']", "(3,)", ".mean()"),
    running("a vector of one", loss(a=lambda real: real.view(1)), V, "losses['a']", "(1,)",
            ".mean()"),
    running("a float", loss(a=1.0), T, "losses['a']", "got float", "not loss.item()"),
    running("an integer", loss(a=torch.tensor(1)), T, "losses['a']", "torch.int64", ".float()"),
    running("a complex loss", loss(a=lambda real: real * 1j), T, "losses['a']", "torch.complex64",
            "cast it"),
    running("an unknown task", loss(c=lambda _: torch.tensor(1.0)), V, "losses", "['c']",
            "the tasks are ['a', 'b']"),
    running("no loss", loss(), V, "losses", "got {}", "at least one of the tasks ['a', 'b']"),
    running("only None", loss(a=None, b=None), V, "losses", "'a': None", "at least one of"),
    running("a list", lambda s: s.pruner.loss(list(losses(s.model, 0).values())), T, "losses",
            "got a list", "name each loss by its task"),
    running("the sum", lambda s: s.pruner.loss(sum(losses(s.model, 0).values())), T, "losses",
            "got a Tensor", "name each loss by its task"),
    running("detached losses", loss(a=Tensor.detach, b=Tensor.detach), V, "losses",
            "['a', 'b']", DETACHED),
    running("made anew", loss(a=lambda real: torch.tensor(1.0)), V, "losses", "['a']", DETACHED),
    *(
        running(f"{name} in {mode}", do, V, "losses", found, remedy, after=0,
                options={"method": mode})
        for method in (SNIP(), DiSparse())
        for name, do, found, remedy in (
            ("a vector", loss(a=lambda real: real.expand(3)), "(3,)", ".mean()"),
            ("detached losses", loss(a=Tensor.detach), "['a']", DETACHED),
        )
    ),
    *(
        running(f"a loss of {value}", lambda s: s.pruner.step(), R, "'b' (1x)",
                "NaN or infinite loss", "look at how this loss is computed",
                first=loss(a=lambda real: real, b=lambda real, v=value: real * v),
                ignored=("nonfinite",))
        for value in (NAN, INF)
    ),
    running("a loss of NaN, strict", loss(a=lambda real: real, b=lambda real: real * NAN), R, "'b'",
            "NaN or infinite loss", "look at how this loss is computed",
            options={"weighting": EqualWeighting(["a", "b"], strict=True)}),
]  # fmt: skip


def compiled(scene: Scene) -> None:
    scene.wrapped = torch.compile(scene.model, backend="eager")


HANDLE = [
    running("applying twice", call(), R, "apply_adapmtl", "on this model before",
            "use its handle (model.adapmtl)"),
    running("applying twice, compiled", lambda s: prepare(s.wrapped), R, "apply_adapmtl",
            "on this model before", "call finalize()", first=compiled),
    running("applying to a part", lambda s: apply_adapmtl(
                s.model.body, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}),
            V, "'weight'", "has a soft threshold already", "call finalize() on the handle"),
    running("finalising early", lambda s: s.pruner.finalize(), R, "finalize()",
            f"after 3 of total_steps={STEPS}", "Call freeze()"),
    running("stepping past the end", lambda s: s.pruner.step(), R, "step()",
            f"more than total_steps={STEPS} times", "train on without calling step()",
            after=STEPS),
    running("stepping after an early freeze", lambda s: s.pruner.step(), R, "step()",
            f"more than total_steps={STEPS} times", "call finalize()",
            first=lambda s: s.pruner.fix_zeros()),
    running("attaching twice", lambda s: s.pruner.attach(s.optimizer), R, "attach()",
            "called already", "leave out this call", first=lambda s: s.pruner.attach(s.optimizer),
            goes_on=False),
    running("stepping beside attach", lambda s: s.pruner.step(), R, "step()",
            "attach() was given", "leave out your own call",
            first=lambda s: s.pruner.attach(s.optimizer), goes_on=False),
    *(
        running(f"a threshold removed, {name}", do, R, "'body.weight'", "was removed",
                "call finalize() instead", goes_on=False,
                first=lambda s: prune.remove(s.model.body, "weight"))
        for name, do in (("then a step", lambda s: s.pruner.step()),
                         ("then a freeze", lambda s: s.pruner.fix_zeros()))
    ),
    running("attaching a name", lambda s: s.pruner.attach("adam"), T, "optimizer", "got a str",
            "pass the one that trains the model"),
    running("attaching a scheduler",
            lambda s: s.pruner.attach(torch.optim.lr_scheduler.StepLR(s.optimizer, 1)), T,
            "optimizer", "got a StepLR", "pass the one that trains the model", after=0),
    *(
        running(f"{name} {value!r}", lambda s, o={name: value}: s.pruner.param_groups(**o), error,
                name, f"got {value!r}", remedy, options={"allocation": "gradient"})
        for name in ("threshold_lr", "lr")
        for value, error, remedy in (
            (-0.1, V, "a finite number >= 0"), (NAN, V, "a finite number >= 0"),
            (INF, V, "a finite number >= 0"), ("high", T, "a number"), (True, T, "a number"),
        )
    ),
    running("groups with parameters", lambda s: s.pruner.param_groups(params=[]), T, "params",
            "must be left out", "param_groups puts"),
    running("sparsity by head", lambda s: s.pruner.sparsity("head"), V, "by", "'head'",
            "'overall', 'component' or 'layer'"),
    running("freezing in paper mode", lambda s: s.pruner.fix_zeros(), R, "freeze()", "mode='paper'",
            "call finalize()", options={"method": "paper"}, goes_on=False),
]  # fmt: skip


def finalised(id: str, do: Callable[[Scene], object]) -> Row:
    """A call on the handle of a model that is plain again."""
    return running(
        f"{id} late", do, R, f"{id}()", "after finalize()", "Call apply_adapmtl", after=STEPS,
        first=lambda s: s.pruner.finalize(),
    )  # fmt: skip


LATE = [
    finalised("finalize", lambda s: s.pruner.finalize()),
    finalised("step", lambda s: s.pruner.step()),
    finalised("freeze", lambda s: s.pruner.fix_zeros()),
    finalised("report", lambda s: s.pruner.report()),
    finalised("sparsity", lambda s: s.pruner.sparsity()),
    finalised("loss", lambda s: s.pruner.loss(losses(s.model, 0))),
    finalised("attach", lambda s: s.pruner.attach(s.optimizer)),
    finalised("param_groups", lambda s: s.pruner.param_groups(lr=1.0)),
]

DAMAGED = "load another checkpoint"
ALIKE = "prepare it alike"
STATES = [
    running(id, do, V, named, found, remedy)
    for id, do, named, found, remedy in (
        ("another target", foreign(target_sparsity=0.7), "target_sparsity=0.7",
         "target_sparsity=0.8", ALIKE),
        ("other steps", foreign(total_steps=30), "total_steps=30", f"total_steps={STEPS}", ALIKE),
        ("other tensors", foreign(exclude=["heads.b"]), "the state dict", "'heads.b.weight': 'b'",
         "prepare the model alike (groups"),
        ("other components", foreign(groups={"b": ["heads.a"]}), "the state dict",
         "'heads.a.weight': 'b'", "prepare the model alike (groups"),
        ("another granularity", foreign(granularity="component"), "granularity", "'component'",
         "prepare it alike"),
        ("another mode", foreign(method="paper"), "mode", "Paper", "prepare it alike"),
        ("another allocation", foreign(allocation="sensitivity"), "allocation",
         "SensitivityAllocation", "prepare it alike"),
        ("a common threshold", foreign(allocation="common"), "allocation", "None",
         "prepare it alike"),
        ("another schedule", foreign(schedule=SparsitySchedule(end=0.3)), "schedule", "end=0.3",
         "prepare it alike"),
        ("another reach", foreign(reach=2.0), "reach", "2.0", "prepare it alike"),
        ("another gradient", foreign(gradient="mask"), "straight_through", "False",
         "prepare it alike"),
        ("another floor", foreign(min_density=0.01), "min_density", "0.01", "prepare it alike"),
        ("another window", foreign(weighting=StabilityWeighting(["a", "b"], window=3, start=0)),
         "weighting", "window=3", "prepare it alike"),
        ("another weighting", foreign(weighting="equal"), "weighting", "EqualWeighting",
         "prepare it alike"),
        ("another direction", foreign(weighting="deviation"), "weighting", "deviating",
         "prepare it alike"),
        ("another version", load(header(version=99)), "adapmtl state", "version 99",
         "the version that it was saved with"),
        ("another width", load(shaped("body.parametrizations.weight.original", 9, 6)),
         "body.parametrizations.weight.original", "shape (9, 6)", "make the model alike"),
        ("a plain state", load(lambda state: TwoTasks().state_dict()), "the state dict",
         "'body.weight'", "before apply_adapmtl, or after finalize()"),
        ("a negative step", load(header(step=-1)), OWN, "step=-1", DAMAGED),
        ("a step in words", load(header(step="three")), OWN, "step='three'", DAMAGED),
        ("no layers", load(header(layers=None)), OWN, "names no layers", DAMAGED),
        ("no bytes", load(own(lambda packed: packed[:0])), OWN, "0 bytes cannot be read", DAMAGED),
        ("too few bytes", load(own(lambda packed: packed[:-1])), OWN, "cannot be read", DAMAGED),
        ("too many", load(own(lambda packed: packed.repeat(2))), OWN, "cannot be read", DAMAGED),
        ("floats", load(own(lambda packed: packed.float())), OWN, "torch.float32", DAMAGED),
        ("rows of bytes", load(own(lambda packed: packed[None])), OWN, "shape (1,", DAMAGED),
        ("no tensor", load(own(lambda packed: {})), OWN, "it is a dict", DAMAGED),
        ("no data", load(own(lambda packed: packed.to("meta"))), OWN, "on meta", DAMAGED),
    )
]  # fmt: skip


# --- settings, made without a model -------------------------------------------------------------


def setting(
    id: str, make: Callable[[], object], error: Error, named: str, found: str, remedy: str
) -> Row:
    return Row(id, lambda _: make(), error, named, found, remedy, goes_on=False)


def schedule(id: str, named: str, found: str, remedy: str, error: Error = V, **options: Any) -> Row:
    return setting(
        f"schedule: {id}", lambda: SparsitySchedule(**options), error, named, found, remedy
    )


def stability(
    id: str, named: str, found: str, remedy: str, error: Error = V, **options: Any
) -> Row:
    options = {"window": 2, "start": 0, **options}
    return setting(
        f"stability: {id}", lambda: StabilityWeighting(["a"], **options), error, named, found,
        remedy,
    )  # fmt: skip


def returned(weights: Any) -> Callable[[], object]:
    weighting = CallableWeighting(["a", "b"], lambda losses: weights)
    return lambda: weighting({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})


IN_ORDER = "0 <= start <= end <= 1"
SETTINGS = [
    schedule("ends before it starts", "start and end", "start=0.7, end=0.6", IN_ORDER,
             start=0.7, end=0.6),
    schedule("starts before", "start and end", "start=-0.1", IN_ORDER, start=-0.1),
    schedule("ends after", "start and end", "end=1.5", IN_ORDER, end=1.5),
    schedule("ends never", "start and end", "end=nan", IN_ORDER, end=NAN),
    schedule("starts in words", "start", "'soon'", "be a number", T, start="soon"),
    schedule("ends at None", "end", "None", "be a number", T, end=None),
    schedule("settles before its end", "settled", "got 0.4", "between end=0.5 and 1", fix_at=0.4),
    schedule("settles never", "settled", "got nan", "between end=0.5 and 1", fix_at=NAN),
    schedule("settles at True", "settled", "True", "be a number", T, fix_at=True),
    schedule("regrows before its end", "regrow_until", "got 0.4", "between end=0.5 and fix_at=0.9",
             regrow_until=0.4),
    schedule("regrows settled zeros", "regrow_until", "got 0.8", "end=0.5 and fix_at=0.7",
             fix_at=0.7, regrow_until=0.8),
    schedule("regrows never", "regrow_until", "got nan", "between end=0.5", regrow_until=NAN),
    schedule("regrows until True", "regrow_until", "True", "be a number", T, regrow_until=True),
    schedule("initial 1", "initial", "got 1.0", "in [0, 1)", initial=1.0),
    schedule("initial below 0", "initial", "got -0.2", "in [0, 1)", initial=-0.2),
    schedule("initial, a tensor", "initial", "tensor(0.1", "be a number", T,
             initial=torch.tensor(0.1)),
    schedule("shape", "shape", "'sigmoid'", "'cubic', 'linear' or 'cosine'", shape="sigmoid"),
    *(
        setting(f"{make.__name__} {options}", lambda m=make, o=options: m(**o), error, named,
                found, remedy)
        for make, options, error, named, found, remedy in (
            (LAMPAllocation, {"strength": -0.1}, V, "strength", "got -0.1", "in [0, 1]"),
            (LAMPAllocation, {"strength": 1.1}, V, "strength", "got 1.1", "in [0, 1]"),
            (LAMPAllocation, {"rate": 0.0}, V, "rate", "got 0.0", "in (0, 1]"),
            (LAMPAllocation, {"rate": NAN}, V, "rate", "got nan", "in (0, 1]"),
            (LAMPAllocation, {"rate": None}, T, "rate", "got None", "be a number"),
            (LAMPAllocation, {"bound": INF}, V, "bound", "got inf", "> 0 and finite"),
            (SensitivityAllocation, {"rate": 0}, V, "rate", "rate=0", "> 0"),
            (SensitivityAllocation, {"rate": "x"}, T, "rate", "'x'", "be a number"),
            (SensitivityAllocation, {"bound": -1}, V, "bound", "bound=-1", "> 0"),
            (SensitivityAllocation, {"decay": 1.0}, V, "decay", "decay=1.0", "in [0, 1)"),
            (SensitivityAllocation, {"prior": INF}, V, "prior", "prior=inf", ">= 0"),
            (GradientAllocation, {"bound": 0}, V, "bound", "got 0", "> 0"),
            (GradientAllocation, {"bound": "x"}, T, "bound", "'x'", "be a number"),
            (Paper, {"start": INF}, V, "start", "got inf", "finite"),
            (Paper, {"weight_decay": -1.0}, V, "weight_decay", "got -1.0", ">= 0"),
            (Paper, {"weight_decay": "x"}, T, "weight_decay", "'x'", "be a number"),
            (Magnitude, {"scope": "layer"}, V, "scope", "'layer'", "'global' or 'uniform'"),
            (Taylor, {"decay": 1.0}, V, "decay", "got 1.0", "in [0, 1)"),
            (Taylor, {"decay": "x"}, T, "decay", "'x'", "be a number"),
            (SNIP, {"batches": 0}, V, "batches", "got 0", "an integer >= 1"),
            (SNIP, {"batches": 1.5}, V, "batches", "got 1.5", "an integer >= 1"),
            (IterativeMagnitude, {"rounds": 0}, V, "rounds", "got 0", "an integer >= 1"),
            (IterativeMagnitude, {"rounds": True}, V, "rounds", "got True", "an integer >= 1"),
            (DiSparse, {"fraction": 1.0}, V, "fraction", "got 1.0", "in (0, 1)"),
            (DiSparse, {"fraction": "x"}, T, "fraction", "'x'", "be a number"),
            (DiSparse, {"interval": 0}, V, "interval", "got 0", "an integer >= 1"),
        )
    ),
    # Weightings.
    setting("no tasks", lambda: EqualWeighting([]), V, "tasks", "got []", "at least one task"),
    setting("a task twice", lambda: EqualWeighting(["a", "a"]), V, "tasks", "got ['a', 'a']",
            "each once"),
    setting("tasks, one name", lambda: EqualWeighting("seg"), T, "tasks", "'seg'", "a sequence"),
    setting("tasks, numbers", lambda: EqualWeighting([1]), T, "tasks", "got [1]", "task names"),
    setting("tasks, a number", lambda: EqualWeighting(3), T, "tasks", "got 3", "a sequence"),
    *(
        setting(f"fixed weights {weights}", lambda w=weights: FixedWeighting(["a"], w), error,
                named, found, remedy)
        for weights, error, named, found, remedy in (
            ({"b": 1.0}, V, "weights", "missing ['a'], unknown ['b']", "exactly the tasks"),
            ({"a": -1.0}, V, "weights['a']", "got -1.0", "finite and not negative"),
            ({"a": INF}, V, "weights['a']", "got inf", "finite and not negative"),
            ({"a": 0.0}, V, "weights", "all 0", "at least one task a positive weight"),
            ({"a": "1"}, T, "weights['a']", "'1'", "be a number"),
            ([1.0], T, "weights", "got [1.0]", "a mapping"),
        )
    ),
    setting("no function", lambda: CallableWeighting(["a"], 3), T, "fn", "got int", "callable"),
    *(
        setting(f"a function returning {weights}", returned(weights), error, named, found, remedy)
        for weights, error, named, found, remedy in (
            ({"a": 1.0}, V, "returned by fn", "missing ['b']", "exactly the tasks"),
            ({"a": 1.0, "b": 1.0, "z": 1.0}, V, "returned by fn", "unknown ['z']", "exactly the"),
            ({"a": 1.0, "b": NAN}, V, "'b' returned by fn", "got nan", "finite"),
            ({"a": -1.0, "b": 1.0}, V, "'a' returned by fn", "got -1", "not negative"),
            ({"a": "x", "b": 1.0}, T, "'a' returned by fn", "'x'", "be a number"),
            ({"a": torch.ones(2), "b": 1.0}, V, "'a' returned by fn", "(2,)", "a scalar"),
            ([1.0, 1.0], T, "returned by fn", "[1.0, 1.0]", "a mapping"),
        )
    ),
    stability("window 1", "window", "got 1", "integer >= 2", window=1),
    stability("window 2.5", "window", "got 2.5", "integer >= 2", window=2.5),
    stability("start below 0", "start", "got -1", "integer >= 0", start=-1),
    stability("start True", "start", "got True", "integer >= 0", start=True),
    stability("direction", "direction", "'calm'", "one of 'stable'", direction="calm"),
    stability("deviation", "deviation", "'std'", "one of 'relative_change'", deviation="std"),
    stability("bounds above 1", "bounds", "got (1.1, 2)", "lower <= 1 <= upper", bounds=(1.1, 2)),
    stability("bounds of NaN", "bounds", "got (0.5, nan)", "None", bounds=(0.5, NAN)),
    stability("one bound", "bounds", "got (0.5,)", "a pair", T, bounds=(0.5,)),
    stability("bounds, a number", "bounds", "got 2", "a pair", T, bounds=2),
    stability("bounds in words", "bounds: upper", "'high'", "be a number", T, bounds=(0, "high")),
    *(
        setting(f"make_weighting {spec!r}, {steps}", lambda w=spec, n=steps:
                make_weighting(w, ["a"], n), error, named, found, remedy)
        for spec, steps, error, named, found, remedy in (
            ("stabel", 10, V, "weighting", "'stabel'", "'stability'"),
            (EqualWeighting, 10, T, "weighting", "class", "LossWeighting instance"),
            ("equal", 0, V, "total_steps", "got 0", "integer >= 1"),
        )
    ),
]  # fmt: skip


# --- thresholds ---------------------------------------------------------------------------------


def thresholded(weight: Any, alpha: Any, **options: Any) -> Callable[[Scene], object]:
    return lambda _: soft_threshold(weight, alpha, **options)


def one_layer() -> nn.Module:
    return nn.Linear(4, 3)


def parametrized(**options: Any) -> Callable[[], nn.Module]:
    """A layer whose threshold or mask does not fit it."""

    def made() -> nn.Module:
        layer = nn.Linear(4, 3)
        threshold = SoftThreshold(options.pop("threshold", 0.1), **options)
        parametrize.register_parametrization(layer, "weight", threshold, unsafe=True)
        return layer

    return made


def moved() -> nn.Module:
    layer: Any = soft_threshold_unstructured(nn.Linear(4, 3), "weight", 0.1)
    layer.parametrizations.weight[0].to("meta")
    return layer


def attach(name: Any = "weight", threshold: Any = 0.1) -> Callable[[Scene], object]:
    return lambda scene: soft_threshold_unstructured(scene.model, name, threshold)


def layer_of(make: Callable[[Tensor], Any], grad: bool = True) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.weight = nn.Parameter(make(layer.weight.detach()), grad)
        return layer

    return made


def inference_layer() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 3)


def forward(scene: Scene) -> object:
    return scene.model(torch.ones(1, 4))


W = torch.linspace(-1, 1, 12).view(3, 4)
THRESHOLDS = [
    Row(f"soft_threshold: {id}", do, error, named, found, remedy, model=one_layer, goes_on=False)
    for id, do, error, named, found, remedy in (
        ("below 0", thresholded(W, -0.1), V, "alpha", "got -0.1", ">= 0"),
        ("NaN", thresholded(W, NAN), V, "alpha", "got nan", "finite"),
        ("infinite", thresholded(W, INF), V, "alpha", "got inf", "finite"),
        ("in words", thresholded(W, "high"), T, "alpha", "'high'", "be a number"),
        ("True", thresholded(W, True), T, "alpha", "True", "be a number"),
        ("too many", thresholded(W, torch.ones(1, 3, 4)), V, "alpha", "shape (1, 3, 4)", "(3, 4)"),
        ("as rows", thresholded(W, torch.ones(3)), V, "alpha", "shape (3,)", "broadcast to"),
        ("integer", thresholded(W, torch.tensor(1)), T, "alpha", "torch.int64", "weight.dtype"),
        ("complex", thresholded(W, torch.tensor(1j)), T, "alpha", "torch.complex64", "cast it"),
        ("on another device", thresholded(W, torch.ones((), device="meta")), V, "alpha", "on meta",
         ".to('cpu')"),
        ("no weight", thresholded([1.0], 0.1), T, "weight", "got list", "be a tensor"),
        ("integer weight", thresholded(W.int(), 0.1), T, "weight", "torch.int32", "float32"),
        ("complex weight", thresholded(W.cfloat(), 0.1), T, "weight", "torch.complex64", "float32"),
        ("sparse weight", thresholded(W.to_sparse(), 0.1), T, "weight", "sparse_coo", DENSE),
        ("reach 1", thresholded(W, 0.1, reach=1.0), V, "reach", "got 1.0", "above 1"),
        ("reach below 0", thresholded(W, 0.1, reach=-1.0), V, "reach", "got -1.0", "above 1"),
        ("reach NaN", thresholded(W, 0.1, reach=NAN), V, "reach", "got nan", "above 1"),
        ("reach, a tensor", thresholded(W, 0.1, reach=torch.tensor(2.0)), T, "reach", "tensor(2.",
         "be a number"),
        ("pruning below 0", lambda _: SoftThresholdPruning(-0.1), V, "threshold", "got -0.1",
         ">= 0"),
        ("a vector", lambda _: SoftThreshold(nn.Parameter(torch.ones(2))), V, "threshold",
         "shape (2,)", "one SoftThreshold a tensor"),
        ("an integer", lambda _: SoftThreshold(nn.Parameter(torch.tensor(1), False)), T,
         "threshold", "torch.int64", "cast it"),
        ("a mask of floats", lambda _: SoftThreshold(0.1, mask=torch.ones(3)), T, "mask",
         "torch.float32", "weight != 0"),
        ("a mask in a list", lambda _: SoftThreshold(0.1, mask=[True]), T, "mask", "a list",
         "weight != 0"),
    )
] + [
    Row(id, do, error, named, found, remedy, model=model, goes_on=False)
    for id, model, do, error, named, found, remedy in (
        ("a mask of another shape", parametrized(mask=torch.ones(4, 3).bool()), forward, V, "mask",
         "shape (4, 3)", "the weight's shape (3, 4)"),
        ("a mask that broadcasts", parametrized(mask=torch.ones(4).bool()), forward, V, "mask",
         "shape (4,)", "the weight's shape (3, 4)"),
        ("a mask on another device", parametrized(mask=torch.ones(3, 4, device="meta").bool()),
         forward, V, "mask", "on meta", "move it with the module"),
        ("a threshold on another device", moved, forward, V, "alpha", "is on meta",
         "move the whole model"),
        ("a learned one on another device",
         parametrized(threshold=nn.Parameter(torch.ones((), device="meta"))), forward, V, "alpha",
         "is on meta", ".to('cpu')"),
        ("attach: no module", one_layer, lambda _: soft_threshold_unstructured("x", "weight", 0.1),
         T, "module", "'x'", "a torch.nn.Module"),
        ("attach: a wrong name", one_layer, attach("wieght"), V, "name", "'wieght'",
         "['weight', 'bias']"),
        ("attach: no name", one_layer, attach(3), V, "name", "no parameter 3",
         "['weight', 'bias']"),
        ("attach: below 0", one_layer, attach(threshold=-0.1), V, "threshold", "got -0.1", ">= 0"),
        ("attach: in words", one_layer, attach(threshold="x"), T, "threshold", "'x'", "a number"),
        ("attach: integers", layer_of(lambda w: w.char(), grad=False), attach(), T, "'weight'",
         "torch.int8", CAST),
        ("attach: complex", layer_of(lambda w: w.cfloat()), attach(), T, "'weight'",
         "torch.complex64", CAST),
        ("attach: sparse", layer_of(lambda w: w.to_sparse()), attach(), T, "'weight'",
         "torch.sparse_coo", DENSE),
        ("attach: lazy", lambda: nn.LazyLinear(3), attach(), V, "'weight'", "not initialised yet",
         "run one batch"),
        ("attach: inference mode", inference_layer, attach(), T, "'weight'",
         "an inference tensor", "copy.deepcopy"),
        ("attach: twice",
         lambda: soft_threshold_unstructured(nn.Linear(4, 3), "weight", 0.1), attach(), R,
         "'weight'", "already has a soft threshold", "prune.remove"),
    )
]  # fmt: skip


# --- the tests ----------------------------------------------------------------------------------

TABLE = [*ARGUMENTS, *MODELS, *LOSSES, *HANDLE, *LATE, *STATES, *SETTINGS, *THRESHOLDS]


@pytest.mark.filterwarnings(
    "ignore:.*(quantiz|torch.jit.script|Sparse CSR|Complex modules).*",
    "ignore:no weight is left",  # SNIP, of a dozen weights
)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_refused(row: Row) -> None:
    refused(row)


def test_rows_have_names_of_their_own() -> None:
    names = [row.id for row in TABLE]
    assert len(set(names)) == len(names)


# --- the ranges ---------------------------------------------------------------------------------

ANYTHING = st.one_of(st.none(), st.booleans(), st.text(), st.complex_numbers(), st.just([0.5]))
NUMBERS = st.one_of(st.floats(), st.integers(-(2**70), 2**70))


def refuse(
    do: Callable[[Scene], object], error: Error, named: str, value: object, remedy: str
) -> None:
    refused(Row("", do, error, named, str(value), remedy, goes_on=False))


@given(NUMBERS | ANYTHING)
def test_targets(value: Any) -> None:
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1:
        assert prepare(TwoTasks(), target_sparsity=value).target_sparsity == value
    else:
        refuse(call(target_sparsity=value), V, "target_sparsity", repr(value), "90 % is 0.9")


@given(NUMBERS | ANYTHING)
def test_steps(value: Any) -> None:
    if type(value) is int and 1 <= value <= 2**53:
        assert prepare(TwoTasks(), total_steps=value).total_steps == value
    else:
        refuse(call(total_steps=value), V, "total_steps", repr(value), "optimizer steps")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    pruner = prepare(TwoTasks(), target_sparsity=kind(0.5), total_steps=np.int64(5), reach=kind(2))
    assert (pruner.target_sparsity, pruner.total_steps) == (0.5, 5)
    SparsitySchedule(
        start=kind(0.25), end=kind(0.5), fix_at=kind(1), regrow_until=kind(1), initial=kind(0)
    )


FRACTIONS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, NAN, INF]), st.floats(-0.5, 1.5))


TIMES = st.none() | FRACTIONS


@given(start=FRACTIONS, end=FRACTIONS, fix_at=TIMES, regrow_until=TIMES, initial=FRACTIONS)
def test_schedules(
    start: float, end: float, settled: float | None, regrow_until: float | None, initial: float
) -> None:
    ordered = 0 <= start <= end <= 1
    settles = settled is None or end <= settled <= 1
    last = max(end, 0.9) if settled is None else settled
    regrows = regrow_until is None or end <= regrow_until <= last
    options = {
        "start": start, "end": end, "settled": settled, "regrow_until": regrow_until,
        "initial": initial,
    }  # fmt: skip
    if ordered and settles and regrows and 0 <= initial < 1:
        schedule = SparsitySchedule(**options)
        assert end <= schedule.regrow_until <= schedule.settled == last <= 1
        assert end * 100 <= schedule.last_update(100) <= 100 or schedule.last_update(100) == 1
        learning = [schedule.regrows(step, 100) for step in range(101)]
        assert learning == sorted(learning, reverse=True)
        assert abs(sum(learning) - 100 * schedule.regrow_until) < 1
        return
    wrong = (
        "start and end" if not ordered else "settled" if not settles
        else "regrow_until" if not regrows else "initial"
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"schedule: {wrong} must .*got .*total_steps|{wrong}"):
        SparsitySchedule(**options)


DENSITY = st.one_of(st.sampled_from([0.0, 0.2, 1.0, NAN]), st.floats(-0.2, 1.2))


@settings(max_examples=100)
@given(
    target=st.floats(0, 0.99),
    least=st.dictionaries(st.sampled_from(["shared", "a", "b"]), DENSITY, max_size=3),
    most=st.dictionaries(st.sampled_from(["shared", "a", "b", "c"]), DENSITY, max_size=3),
)
def test_densities_are_kept_or_refused(
    target: float, least: dict[str, float], most: dict[str, float]
) -> None:
    do = call(target_sparsity=target, min_density=least, max_density=most)
    given = [*least.values(), *most.values()]
    if "c" in most or not all(0 <= density <= 1 for density in given):
        refuse(do, V, "_density", "got" if "c" not in most else "", "")
        return
    model = TwoTasks()
    try:
        pruner: Any = do(Scene(model))
    except ValueError as refusal:
        words = ("no room", "Lower") if "no room" in str(refusal) else ("zeros", "Change the")
        refuse(do, V, "_density", *words)
        return
    pruner.fix_zeros()
    assert zeros(pruner) == round(target * weights(pruner))
    for name, sparsity in pruner.sparsity("component").items():
        size = sum(t.parameter.numel() for t in pruner.components[name])
        kept = (1 - sparsity) * size
        assert least.get(name, 0.0) * size - 1e-4 <= kept + 1
        assert kept - 1 <= most.get(name, 1.0) * size + 1e-4


@given(
    window=st.integers(-3, 40) | ANYTHING,
    start=st.integers(-3, 40) | ANYTHING,
    bounds=st.none() | st.tuples(FRACTIONS, FRACTIONS) | st.lists(FRACTIONS, max_size=3) | ANYTHING,
)
def test_windows_and_bounds(window: Any, start: Any, bounds: Any) -> None:
    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    fine = bounds is None or (pair and 0 <= bounds[0] <= 1 <= bounds[1] < INF)
    if whole(window, 2) and whole(start, 0) and fine:
        weights = StabilityWeighting(["a", "b"], window=window, start=start, bounds=bounds)
        assert weights.as_dict() == {"a": 1.0, "b": 1.0}
        return
    wrong = "window" if not whole(window, 2) else "start" if not whole(start, 0) else "bounds"
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^{wrong} must .*got"):
        StabilityWeighting(["a", "b"], window=window, start=start, bounds=bounds)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_losses_with_a_shape(shape: list[int]) -> None:
    do = loss(a=lambda real: real.expand(shape))
    refused(
        Row("", do, V, "losses['a']", str(tuple(shape)), ".mean()", after=0, goes_on=False)
    )  # fmt: skip


@settings(max_examples=30)
@given(st.data())
def test_bytes_that_are_no_state(data: st.DataObject) -> None:
    """Cut off, or overwritten in the part that says what the rest is."""

    def spoil(packed: Tensor) -> Tensor:
        if data.draw(st.booleans()):
            return packed[: data.draw(st.integers(0, len(packed) - 1))]
        at = data.draw(st.integers(0, 9))
        changed = packed.clone()
        changed[at] ^= data.draw(st.integers(1, 255))
        return changed

    refused(
        Row("", load(own(spoil)), V, OWN, "cannot be read", DAMAGED, after=2, goes_on=False)
    )  # fmt: skip


# --- what is not refused ------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}, {"method": "paper"}], ids=str)
def test_where_it_is_called_does_not_matter(context: Any, options: dict[str, Any]) -> None:
    found = []
    for surroundings in (torch.enable_grad, context):
        torch.manual_seed(0)
        model = TwoTasks()
        with surroundings():
            pruner = prepare(model, total_steps=STEPS, **options)
        train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=0.1)), range(STEPS))
        found.append((tensors(model), pruner.controller.thresholds()))
    assert all(torch.equal(value, found[1][0][key]) for key, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*reduce_range.*")
def test_a_model_in_training_for_quantisation() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = TwoTasks().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    before = tensors(model)  # among them buffers that the first run makes longer
    find_components(model, torch.ones(2, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pruner = prepare(model, total_steps=STEPS)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


@pytest.mark.parametrize("method", ["adaptive", SNIP(), DiSparse()])
def test_losses_to_look_at(method: Any) -> None:
    """In evaluation a loss need not require grad, and it leaves no trace."""
    model = TwoTasks()
    pruner = prepare(model, method=method)

    def look() -> None:
        with torch.no_grad():
            pruner.loss(losses(model, 0))
        with torch.inference_mode():
            pruner.loss(losses(model, 0))
        model.eval()
        pruner.loss({task: loss.detach() for task, loss in losses(model, 0).items()})
        model.train()

    assert_untouched(model, look)


def test_one_loss_without_grad_beside_others() -> None:
    """A batch without labels for a task is no mistake; a task that never learns is told at the end.

    A task may be frozen on purpose, so that it is no error.
    """
    said = []
    for always in (False, True):
        model = TwoTasks()
        pruner = prepare(model, total_steps=STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            found = losses(model, step)
            if always or step % 2:
                found["b"] = torch.zeros(())
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.finalize()
        said.append([str(w.message) for w in caught if "task 'b'" in str(w.message)])
    assert said[0] == []
    assert len(said[1]) == 1
    assert "no loss of task 'b' ever required grad" in said[1][0]
    assert "leave the task out of the losses" in said[1][0]


def idle(model: nn.Module, pruner: Pruner, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            pruner.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("method", ["adaptive", "paper", Magnitude()])
def test_stepping_without_training_is_told_once(method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=400, method=method)
    said = idle(model, pruner, 400)
    assert len(said) == 1
    assert "no weight has changed since the first" in said[0]
    assert "call backward() and the optimizer's step()" in said[0]


class WritesData(torch.optim.SGD):
    """An optimiser of the kind that autograd does not see write."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(losses(model, 0).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, WritesData])
@pytest.mark.parametrize("before", [1, 40])
def test_training_that_is_hard_to_see(kind: Any, before: int) -> None:
    """Losses of the user's own, steps that a scaler skips, writes past autograd: all train."""
    model = TwoTasks()
    pruner = prepare(model, total_steps=400)
    optimizer = kind(model.parameters(), lr=0.1)
    assert idle(model, pruner, before) == []
    one_step(model, optimizer)
    assert idle(model, pruner, 400 - before) == []


def test_an_optimizer_that_a_resume_has_left_behind_is_noticed() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=400)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    idle(model, pruner, 100)
    other = TwoTasks()
    resumed = prepare(other, total_steps=400)
    other.load_state_dict(model.state_dict())
    assert len(idle(other, resumed, 300)) == 1


# --- state dicts --------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_larger_state(strict: bool) -> None:
    """The model may be a part of another: what comes before it is loaded by then, nothing of it."""
    model, other = TwoTasks(), TwoTasks()
    prepare(model, target_sparsity=0.7)
    prepare(other)
    whole, state = nn.ModuleDict({"net": other}), nn.ModuleDict({"net": model}).state_dict()

    def misuse() -> None:
        with pytest.raises(ValueError, match=r"target_sparsity=0\.7, .*=0\.8: prepare it alike"):
            whole.load_state_dict(state, strict=strict)

    assert_untouched(other, misuse)


def test_what_torch_refuses() -> None:
    """A tensor that is not ours is torch's to refuse: it says what is wrong, but loads the rest."""
    model = TwoTasks()
    prepare(model)
    state = copy.deepcopy(model.state_dict())
    state["body.bias"] = torch.ones(3)
    handle = tensors(model.adapmtl)
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.bias"):
        model.load_state_dict(state)
    assert all(torch.equal(value, handle[key]) for key, value in tensors(model.adapmtl).items())
    del state["body.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*body\.bias"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_states_too_and_plain_models_no_more(duplicate: Any) -> None:
    model = TwoTasks()
    plain = copy.deepcopy(model.state_dict())
    prepare(model)
    twin = duplicate(model)
    twin.adapmtl.fix_zeros()
    twin.adapmtl.finalize()
    assert not twin._load_state_dict_pre_hooks
    twin.load_state_dict(plain)
    with pytest.raises(ValueError, match=r"'body\.weight', not 'body\.parametrizations"):
        duplicate(model).load_state_dict(plain)


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_other_devices() -> None:
    model = TwoTasks().cuda()
    refused(
        Row("", call(), R, "example_inputs", "cuda", "on the model's device",
            model=lambda: model, goes_on=False)
    )  # fmt: skip
    on_the_gpu = torch.full((1,), 0.1, device="cuda")
    for weight, alpha in ((W, on_the_gpu), (W.cuda(), on_the_gpu.cpu())):
        with pytest.raises(ValueError, match=f"is on {alpha.device} and the weight on"):
            soft_threshold(weight, alpha)
    soft_threshold(W.cuda(), torch.tensor(0.1))
