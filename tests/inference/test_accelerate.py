"""accelerate(): the outputs of any model, though all of its layers are sparse; and its errors."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerating import LAYERS, all_sparse, assert_same, pruned
from strange import CASES, Residual, conv, images, linear, net
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map
from toys import TwoTasks, prepare, train
from untouched import assert_untouched

from torch_adapmtl.inference import AcceleratedModel, accelerate
from torch_adapmtl.inference._fused_layer import FusedLayer
from torch_adapmtl.inference._layers import MOST_PLANS, SparseLayer

# Of torch, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with inputs that it may write to."""
    inputs = tree_map(lambda x: x.clone(memory_format=torch.preserve_format), inputs)
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of any output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)
    elif hasattr(output, "__dict__"):
        yield from tensors(vars(output))


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def check(fast: nn.Module, model: nn.Module, inputs: Any) -> None:
    found, expected = call(fast, inputs), call(model, inputs)
    assert type(found) is type(expected)
    assert_same(tensors(found), tensors(expected))


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_model(name: str) -> None:
    case = CASES[name]
    model = pruned(case.model(), 0.7)
    fast = all_sparse(model, copy.deepcopy(case.inputs))
    for inputs in (case.inputs, *case.others, case.inputs):
        check(fast, model, inputs)
    # Views of outputs are possible where they are for the model's own.
    strides = [[t.stride() for t in tensors(call(m, case.inputs))] for m in (fast, model)]
    if name != "memory: channels last":
        assert strides[0] == strides[1]
    assert list(fast.choices.values()) == ["sparse"] * (len(layers_of(model)) - case.dense)


@pytest.mark.parametrize("name", CASES)
def test_the_given_model_and_the_inputs_are_untouched(name: str) -> None:
    case = CASES[name]
    model, inputs = pruned(case.model(), 0.7), copy.deepcopy(case.inputs)
    given = [x.clone() for x in tensors(inputs)]
    assert_untouched(model, lambda: all_sparse(model, inputs))
    assert all(map(torch.equal, tensors(inputs), given))


@pytest.mark.parametrize(
    "name", ["residual: residual net", "memory: gate", "form: without a graph outside of one"]
)
def test_copies(name: str) -> None:
    case = CASES[name]
    model = pruned(case.model(), 0.7)
    fast = all_sparse(model, case.inputs)
    fast(*case.inputs)
    for other in (copy.deepcopy(fast), copy.copy(fast)):
        check(other, model, case.inputs)


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_saved_and_loaded(copied: Callable[[nn.Module], AcceleratedModel]) -> None:
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast = all_sparse(model, x)
    fast(x)
    loaded = copied(copied(fast))
    check(loaded, model, (x,))
    check(loaded, model, (torch.randn(1, 3, 24, 40),))
    assert loaded.choices == fast.choices
    assert loaded.report() == fast.report()
    # The functions between the layers that work on maps are still those.
    targets = [[node.target for node in m.module.graph.nodes] for m in (fast, loaded)]
    assert targets[0] == targets[1]
    # Nothing is kept but the nonzeros of sparse layers.
    shares = [
        len(pickle.dumps(all_sparse(pruned(conv(64, 64), s), images(1, 64, 4, 4))))
        for s in (0.5, 0.99)
    ]
    assert shares[1] < shares[0] / 10


def test_finalised_models() -> None:
    model = TwoTasks()
    pruner = prepare(model, target_sparsity=0.6)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    x = torch.randn(7, 6)
    in_training = all_sparse(model, x)  # of the weights as they are now
    check(in_training, model.eval(), (x,))
    check(all_sparse(pruner.finalize(), x), model, (x,))


def masked() -> nn.Module:
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv1d(8, 8, 3), linear())
    for part in (model[0], model[2], model[3]):
        prune.l1_unstructured(part, "weight", 0.8)
        prune.random_unstructured(part, "weight", 0.5)
        prune.l1_unstructured(part, "bias", 0.5)
    return nn.Sequential(model[0], model[1], nn.Flatten(2), model[2], linear(142, 5))


def parametrized() -> nn.Module:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Buffer(torch.rand(8, 8, 3, 3) < 0.2)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    first, second = conv(), conv()
    parametrize.register_parametrization(first, "weight", Masked())
    parametrizations.weight_norm(second)
    return nn.Sequential(first, nn.BatchNorm2d(8), second, parametrizations.spectral_norm(conv()))


@pytest.mark.parametrize("make", [masked, parametrized])
@pytest.mark.parametrize("used", [False, True])
def test_weights_that_are_computed(make: Callable[[], nn.Module], used: bool) -> None:
    model, (x,) = make().eval(), images()
    if used:  # the weights have a history
        model(x)
    fast = []
    assert_untouched(model, lambda: fast.append(all_sparse(model, x)))
    check(fast[0], model, (x,))
    assert {*fast[0].choices.values()} == {"sparse"}


def test_tensors_with_a_history_that_a_model_keeps() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if "b" not in self.cache:
            self.cache["b"] = [self.b * 2]
        return self.c(x) + self.cache["b"][0]

    model = pruned(net(forward, c=conv(), b=nn.Parameter(torch.randn(8, 1, 1)), cache={}))
    model(*images())
    assert not model.cache["b"][0].is_leaf
    check(all_sparse(model, images()), model, images())


def test_old_norms_of_weights_stay_dense() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(conv()), nn.BatchNorm2d(8), conv()).eval()
    fast = all_sparse(model, images())
    check(fast, model, images())
    assert fast.choices == {"2": "sparse"}


def test_hooks_of_the_model_itself() -> None:
    model = pruned(nn.Sequential(conv(), nn.ReLU()))
    model.register_forward_hook(lambda *_: _[2] + 1)
    check(all_sparse(model, images()), model, images())


def test_random_models_are_accelerated() -> None:
    """No two outputs are alike, so that nothing can be said of them."""
    noisy = lambda s, x: s.c(x) + torch.rand_like(x)  # noqa: E731
    fast = all_sparse(pruned(net(noisy, c=conv())), images())
    assert fast.choices == {"c": "sparse"}


def test_models_that_keep_what_they_were_called_with() -> None:
    """Such as of streams: nothing is kept of the examples."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.last = self.c(x) if self.last is None else self.c(x) + self.last
        return self.last

    model = pruned(net(forward, c=conv(), last=None))
    fast = all_sparse(model, images())
    assert model.last is None
    assert fast.choices == {"c": "sparse"}
    for _ in range(3):
        check(fast, model, images())


def test_what_a_call_leaves_behind_is_no_output() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.calls.add_(1)
        self.last = self.c(x)
        return self.last * 2

    model = pruned(net(forward, c=conv(), count=0, calls=nn.Buffer(torch.zeros(1))))
    fast = all_sparse(model, images())
    check(fast, model, images())
    check(copy.deepcopy(fast), model, images())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, images())])
def test_scripted_models_stay_as_they_are(make: Callable[[nn.Module], nn.Module]) -> None:
    model = pruned(nn.Sequential(conv(), nn.ReLU(), conv()))
    scripted = make(model)
    for given, choices in ((scripted, {}), (nn.Sequential(scripted, conv()), {"1": "sparse"})):
        fast = all_sparse(given, images())
        check(fast, given, images())
        assert fast.choices == choices


def test_autograd_inside_works() -> None:
    """Such as forces, which are the gradient of an energy."""

    def forces(self: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(y.square().sum(), y)
        return self.c(gradient)

    model = pruned(net(forces, c=conv()))
    check(all_sparse(model, images()), model, images())


def test_inference_mode() -> None:
    model = pruned(Residual())
    with torch.inference_mode():
        fast = all_sparse(model, images(2, 3, 32, 32))
        fast(*images(1, 3, 20, 20))
    check(fast, model, images(1, 3, 20, 20))
    check(pickle.loads(pickle.dumps(fast)), model, images(2, 3, 32, 32))
    with torch.inference_mode():
        fast(*images(1, 3, 28, 20))
    check(fast, model, images(1, 3, 28, 20))


@pytest.mark.parametrize("setting", ["device", "dtype"])
def test_defaults_of_torch_do_not_matter(setting: str) -> None:
    layers = conv(3), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 8, 2, 2), conv(stride=2), linear(5, 2)
    model = pruned(
        nn.Sequential(*layers, nn.Upsample(scale_factor=2), conv(padding_mode="reflect"))
    )
    x, dtype = torch.randn(2, 3, 10, 10), torch.get_default_dtype()
    fast = all_sparse(model, x)
    try:
        if setting == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        check(fast, model, (x,))
        check(fast, model, (x[:1],))
        check(all_sparse(model, x), model, (x,))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def test_torch_may_compile_it() -> None:
    model = pruned(nn.Sequential(conv(), nn.ReLU(), conv()))
    compiled = torch.compile(all_sparse(model, images()), backend="eager")
    check(compiled, model, images())
    check(compiled, model, images(1, 8, 5, 7))


def test_outputs_require_no_gradients() -> None:
    model = pruned(conv())
    model.train().requires_grad_()
    assert not all_sparse(model, images())(*images()).requires_grad


def sparse_parts(fast: nn.Module) -> list[SparseLayer]:
    return [part for part in fast.modules() if isinstance(part, SparseLayer)]


def test_many_sizes_are_few_plans() -> None:
    model = pruned(Residual(), 0.7)
    fast = all_sparse(model, torch.randn(1, 3, 32, 32))
    for n in range(3 * MOST_PLANS):
        check(fast, model, (torch.randn(1 + n % 3, 3, 16 + 3 * n, 40 - n),))
    assert sparse_parts(fast)
    assert all(len(part._plans) <= MOST_PLANS for part in sparse_parts(fast))


def test_threads_call_it_at_once() -> None:
    model = pruned(Residual(), 0.7)
    fast = all_sparse(model, torch.randn(1, 3, 32, 32))
    sizes = [(1 + n % 3, 3, 16 + 4 * (n % 7), 32 - 4 * (n % 5)) for n in range(12)]
    inputs = [torch.randn(size) for size in sizes]
    expected = [list(tensors(call(model, (x,)))) for x in inputs]
    together, failed = threading.Barrier(4), []

    def work(first: int) -> None:
        try:
            together.wait()
            for i in range(2 * len(inputs)):
                i = (first + i) % len(inputs)
                assert_same(tensors(call(fast, (inputs[i],))), expected[i])
        except BaseException as error:
            failed.append(error)
            raise

    workers = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


@pytest.mark.parametrize("parallel", [True, False])
def test_threads_of_torch(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of OpenMP's threads or, where there is none, of Python's."""
    from torch_adapmtl.inference import _call

    kernels = _call.engine()
    if not parallel:
        monkeypatch.setattr(_call, "engine", lambda: dataclasses.replace(kernels, parallel=0))
    monkeypatch.setattr(_call, "SMALL", 0)
    pool, asked = _call._pool(), []
    monkeypatch.setattr(_call, "_pool", lambda: asked.append(None) or pool)
    model = pruned(Residual(), 0.7)
    fast = all_sparse(model, torch.randn(1, 3, 32, 32))
    torch.set_num_threads(2)
    try:
        for n in range(3):
            check(fast, model, (torch.randn(2, 3, 32 + 8 * n, 32),))
    finally:
        torch.set_num_threads(1)
    assert bool(asked) is not bool(parallel and kernels.parallel)


# What is chosen


def test_choices_are_saved_loaded_and_forced() -> None:
    model, x = pruned(Residual()), torch.randn(1, 3, 16, 16)
    names = [name for name, part in model.named_modules() if isinstance(part, LAYERS)]
    for value in ("sparse", "dense"):
        choices = json.loads(json.dumps(dict.fromkeys(names, value)))
        fast = accelerate(model, x, choices=choices)
        assert fast.choices == choices
        check(fast, model, (x,))
        parts = [part for part in fast.modules() if isinstance(part, FusedLayer)]
        assert all((part.sparse is None) == (value == "dense") for part in parts)
    mixed = {name: ("sparse", "dense")[i % 2] for i, name in enumerate(names)}
    fast = accelerate(model, x, choices=mixed)
    assert fast.choices == mixed
    check(fast, model, (x,))
    part = accelerate(model, x, choices={names[2]: "sparse", names[5]: "dense"})
    assert part.choices[names[2]] == "sparse"
    assert part.choices[names[5]] == "dense"
    check(part, model, (x,))
    again = accelerate(model, x, choices=part.choices)
    assert again.choices == part.choices


def test_layers_with_few_zeros_are_not_tried() -> None:
    model, (x,) = nn.Sequential(conv(), conv()), images()
    with torch.no_grad():
        model[0].weight[:, :3] = 0  # 37.5 %
        model[1].weight[:, :5] = 0
    rows = accelerate(model, x).report().layers
    assert rows[0].sparse_seconds is None
    assert rows[1].sparse_seconds is not None
    assert rows[0].choice == "dense"


def test_all_choices_leave_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    counted = lambda s, x: (calls.append(1), s.c(x))[1] if x.sum() < 1e9 else x  # noqa: E731
    model = pruned(net(counted, c=conv()))
    accelerate(model, images(), choices={"c": "sparse"})
    few = len(calls)
    accelerate(model, images(), choices={"c": "dense"})
    assert len(calls) == 2 * few
    calls.clear()
    accelerate(model, images())
    assert len(calls) > few


def test_the_report() -> None:
    model, x = pruned(Residual()), torch.randn(2, 3, 16, 16)
    fast = all_sparse(model, x)
    report = fast.report()
    modules = {name: part for name, part in model.named_modules() if isinstance(part, LAYERS)}
    assert [row.name for row in report.layers] == list(fast.choices)
    assert {row.name for row in report.layers} == {*modules}
    for row in report.layers:
        weight = modules[row.name].weight
        assert row.kind == type(modules[row.name]).__name__
        assert row.weights == weight.numel()
        assert row.nonzeros == int(weight.count_nonzero())
        assert row.sparsity == 1 - row.nonzeros / row.weights
        assert row.dense_seconds > 0
        assert row.sparse_seconds > 0
        assert row.choice == "sparse"
    positions = {row.name: row.positions for row in report.layers}
    assert positions["stem.0"] == 2 * 16 * 16
    assert positions["second.0"] == 2 * 4 * 4
    assert positions["heads.a"] == 2
    assert report.threads == 1
    assert report.speedup == report.original_seconds / report.accelerated_seconds
    text = str(report)
    html = report._repr_html_()
    for row in report.layers:
        for shown in (row.name, row.kind, f"{100 * row.sparsity:.1f} %", f"{row.macs:,}"):
            assert shown in text
            assert shown in html
    assert f"{report.speedup:.2f} times as fast" in text
    assert html.count("<tr") == len(report.layers) + 1
    assert "Residual" not in text


def test_the_report_of_a_model_without_layers() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Softmax(1))
    fast = accelerate(model, images())
    assert fast.choices == {}
    check(fast, model, images())
    assert "0.0 % of the weights are zero, 100.0 % of the multiply-adds are left" in str(
        fast.report()
    )


# Errors


@pytest.fixture(scope="module")
def fast() -> AcceleratedModel:
    torch.manual_seed(0)
    return all_sparse(
        pruned(nn.Sequential(conv(3, 4), nn.Flatten(), linear(100, 2))), torch.ones(1, 3, 5, 5)
    )


def test_it_is_not_trained(fast: AcceleratedModel) -> None:
    assert not fast.training
    assert fast.eval() is fast
    assert fast.train(False) is fast
    with pytest.raises(
        RuntimeError, match=r"cannot be trained: train the model that accelerate\(\)"
    ):
        fast.train()
    assert not any(module.training for module in fast.modules())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="meta"),
    ],
)
def test_it_is_not_converted(
    fast: AcceleratedModel, convert: Callable[[nn.Module], nn.Module]
) -> None:
    with pytest.raises(
        TypeError, match=r"computes float32 on the CPU, it cannot become torch\.\w+ on"
    ):
        convert(fast)
    assert fast.float() is fast
    assert fast.to("cpu") is fast
    assert fast(torch.ones(1, 3, 5, 5)).shape == (1, 2)


def test_inputs_that_are_refused(fast: AcceleratedModel) -> None:
    x = torch.ones(1, 3, 5, 5)
    with pytest.raises(TypeError, match=r"runs on the CPU, but an input is on meta"):
        fast(x.to("meta"))
    with pytest.raises(TypeError, match=r"takes dense tensors, but an input is torch.sparse_coo"):
        fast(x.to_sparse())
    with FakeTensorMode() as mode, pytest.raises(TypeError, match="but an input is a fake tensor"):
        fast(mode.from_tensor(x))
    with pytest.raises(TypeError, match=r"an input is torch.float64: pass x.float\(\)"):
        fast(x.double())
    with pytest.raises(
        RuntimeError, match=r"an input requires them: call it under torch.no_grad\(\)"
    ):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        assert fast(x.clone().requires_grad_()).shape == (1, 2)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"computes float32: call it outside of autocast"),
    ):
        fast(x)
    with pytest.raises(
        ValueError, match=r"expected 3 channels, got an input of shape \(1, 4, 5, 5\)"
    ):
        fast(torch.ones(1, 4, 5, 5))
    with pytest.raises(
        ValueError, match=r"expected 100 features, got an input of shape \(1, 144\)"
    ):
        fast(torch.ones(1, 3, 6, 6))


def test_nested_inputs_are_looked_into() -> None:
    model = pruned(net(lambda s, x: s.c(x["a"][0]), c=conv()))
    (x,) = images()
    fast = all_sparse(model, ({"a": [x]},))
    check(fast, model, ({"a": [x]},))
    with pytest.raises(TypeError, match=r"an input is torch.float16"):
        fast({"a": [x.half()]})


def test_arguments_that_the_examples_lacked() -> None:
    def forward(
        self: Any, x: Tensor, y: Tensor | None = None, scale: float = 2.0, flag: bool = False
    ) -> Tensor:
        x = self.c(x) if y is None else self.c(x) + y
        return x * scale + 1 if flag else x * scale

    model, (x,) = pruned(net(forward, c=conv())), images()
    fast = all_sparse(model, x)
    for args in ((x,), (x, None), (x, None, float("2")), (x, None, 2.0, False)):
        assert_same([fast(*args)], [model(*args).detach()])
    for kwargs in ({}, {"y": None}, {"flag": False, "scale": float("2")}):
        assert_same([fast(x=x, **kwargs)], [model(x, **kwargs).detach()])
    for args, kwargs, name in (
        ((x, x), {}, "y"),
        ((x,), {"y": x}, "y"),
        ((x, None, 3.0), {}, "scale"),
        ((x,), {"flag": True}, "flag"),
    ):
        with pytest.raises(
            TypeError, match=f"has no argument '{name}', because the example inputs"
        ):
            fast(*args, **kwargs)
    with_y = all_sparse(model, {"x": x, "y": x})
    assert_same([with_y(x, y=x + 1)], [model(x, x + 1).detach()])
    with_all = all_sparse(model, (x, None, 3.0, True))
    assert_same([with_all(x, None, 4.0, True)], [model(x, None, 4.0, True).detach()])


def test_arguments_that_are_refused() -> None:
    model, (x,) = conv(), images()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, found function"):
        accelerate(lambda x: x, x)
    with pytest.raises(
        ValueError, match=r"holds an accelerated model: pass the one that it was ma"
    ):
        accelerate(nn.Sequential(all_sparse(model, x)), x)
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, a tuple .* found list"):
        accelerate(model, [x])
    with pytest.raises(TypeError, match=r"computes float32, but an input is torch.float64"):
        accelerate(model, x.double())
    with pytest.raises(ValueError, match=r"not float32: weight is torch.float16; use .float\(\)"):
        accelerate(conv().half(), x)
    with pytest.raises(
        ValueError, match=r"model is not on the CPU: weight is on meta; use .cpu\(\)"
    ):
        accelerate(conv().to("meta"), x)
    with pytest.raises(
        ValueError, match=r"choices names 'nope', which is no .*: the names are 0, 1"
    ):
        accelerate(nn.Sequential(conv(), conv()), x, choices={"nope": "sparse"})
    with pytest.raises(ValueError, match=r"choices names '0', which is no .*: the names are none"):
        accelerate(nn.Sequential(nn.ReLU()), x, choices={"0": "sparse"})
    with pytest.raises(
        ValueError, match=r"choices\[''\] must be \"sparse\" or \"dense\", found 'off'"
    ):
        accelerate(model, x, choices={"": "off"})


def test_llvmlite_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "llvmlite":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"not installed: pip install \"torch-adapmtl\[fast\]\""):
        accelerate(conv(), images())


def test_errors_of_the_model_are_its_own() -> None:
    def fails(self: Any, x: Tensor) -> Tensor:
        raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        accelerate(net(fails, c=conv()), images())


def test_a_norm_that_cannot_be_folded_does_not_cost_the_graph() -> None:
    """Torch folds no batch norm into a transposed convolution of several groups."""
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8), nn.ReLU())
    fast = all_sparse(pruned(model), torch.randn(1, 8, 5, 5))
    assert isinstance(fast.module, torch.fx.GraphModule)
