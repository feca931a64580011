"""What is refused: models, `groups`, `prunable` and `exclude`, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import Error, Row, Scene, assert_refused, call, option, rows
from torch import Tensor, nn
from toys import TwoTasks, prepare

V, T, R = ValueError, TypeError, RuntimeError
INPUTS = "a tensor, a tuple of positional arguments or a dict of keyword arguments"

GROUPS = [
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
]  # fmt: skip

INPUTS_AND_OUTPUTS = [
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


@pytest.mark.filterwarnings(
    "ignore:.*(quantiz|torch.jit.script|Sparse CSR|Complex modules).*",
)
@rows([*GROUPS, *INPUTS_AND_OUTPUTS, *MODELS])
def test_refused(row: Row) -> None:
    assert_refused(row)
