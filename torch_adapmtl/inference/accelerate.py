"""Sparse models that run faster than dense ones on a CPU."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from torch_adapmtl.components._inputs import call_arguments

from ._fuse import fuse_layers, link
from ._fused_layer import FusedLayer
from ._measure import MOST, Candidate, measure
from ._trace import Calls, trace
from ._windows import SparseConv2d
from .report import AccelerationReport, LayerChoice

__all__ = ["AcceleratedModel", "accelerate"]

FEWEST_ZEROS = 0.4  # a layer with a smaller share of zeros is not tried
GAIN = 0.95  # a layer is sparse if that takes at most so much of the dense time
WORTH = 0.9  # and so is a model: where caches are cold, the kernels lose more than torch


class AcceleratedModel(nn.Module):
    """A model whose sparse layers skip their zeros, for evaluation on a CPU.

    [accelerate][torch_adapmtl.accelerate] makes it. It is called as the model that it was made
    from, with inputs of any size. `copy.deepcopy`, `pickle` and `torch.save` work; the kernels are
    compiled again where they are needed. Several threads may call it at once.

    Attributes:
        module: The model, with its layers replaced.
        choices: For each layer, by its name in the model that was given, `"sparse"` or `"dense"`:
            what [accelerate][torch_adapmtl.accelerate] takes as `choices`. A dict of strings, to be
            saved as JSON.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> fast = accelerate(model, torch.randn(16, 8))
        >>> fast.choices
        {'0': 'dense'}
        >>> accelerate(model, torch.randn(16, 8), choices=fast.choices).choices == fast.choices
        True
    """

    def __init__(
        self,
        module: nn.Module,
        report: AccelerationReport,
        names: Iterable[str],
        defaults: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.module, self._report, self._defaults = module, report, dict(defaults)
        self._names = tuple(names)
        self.choices = {row.name: row.choice for row in report.layers}
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            TypeError: If an input is on another device than the CPU, or is of a floating-point type
                other than float32; if an argument is given that the example inputs lacked.
            RuntimeError: If an input requires gradients while they are enabled, or under
                `torch.autocast`.
        """
        if torch.compiler.is_compiling():  # the kernels are called through pointers
            return torch.compiler.disable(self._call)(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        _check_inputs(args, kwargs)
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("an accelerated model computes float32: call it outside of autocast")
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name in self._defaults.keys() & given.keys():
            kwargs.pop(name, None)
            if not _is_default(given[name], self._defaults[name]):
                raise TypeError(
                    f"an accelerated model has no argument {name!r}, because the example inputs of "
                    f"accelerate() had none: accelerate the model with it"
                )
        with torch.no_grad():  # such as for checkpoints, whose outputs would require gradients
            return self.module(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> AcceleratedModel:
        """What `to()`, `half()`, `cuda()` and the like call: only copies are allowed."""
        probe = fn(torch.zeros(1, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype is not torch.float32:
            raise TypeError(
                f"an accelerated model computes float32 on the CPU, it cannot become {probe.dtype} "
                f"on {probe.device}: convert the model that accelerate() was given"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def report(self) -> AccelerationReport:
        """Return what was chosen for each layer, and the times that it was chosen by."""
        return self._report

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Only `train(False)`, that is `eval()`, is allowed.

        Raises:
            RuntimeError: If `mode` is true.
        """
        if mode:
            raise RuntimeError(
                "an accelerated model cannot be trained: train the model that accelerate() was "
                "given, then call accelerate() again"
            )
        return super().train(mode)


def accelerate(
    model: nn.Module, example_inputs: Any, *, choices: Mapping[str, str] | None = None
) -> AcceleratedModel:
    """Make a copy of a sparse model that skips its zeros, for evaluation on a CPU.

    Convolutions and linear layers get kernels that pass over zero weights, compiled for this
    processor. Batch norms are folded into the layers that they follow; activations and residual
    additions are computed with the layer where the model's graph (`torch.fx`) shows them. Which
    layers become sparse is measured on the example inputs, with the number of threads that torch
    has (`torch.set_num_threads`). A layer for which the kernels are no faster stays as it is.

    Outputs equal those of `model` up to rounding: 1e-5 of the largest output. A zero weight is
    passed over whatever its input is, so that an infinite or NaN input does not become NaN there.

    Args:
        model: Any model with zeros in its weights: finalised by this library, pruned by
            `torch.nn.utils.prune`, or loaded from a file. It must be on the CPU, in float32; it
            is not changed.
        example_inputs: What the model is called with: a tensor, a tuple of positional arguments or
            a dict of keyword arguments. Other sizes and batches work later on, too; sizes like
            these are what the choices are best for.
        choices: Layers that are not to be measured, `{name: "sparse" or "dense"}`; such as
            `AcceleratedModel.choices` of an earlier call.

    Returns:
        The accelerated model, in evaluation mode. `print(fast.report())` says what was chosen.

    Raises:
        ImportError: If llvmlite is not installed: `pip install "torch-adapmtl[fast]"`.
        TypeError: If `model` is no module, if `example_inputs` is none of the above, or if a tensor
            in it is not on the CPU or of another floating-point type than float32.
        ValueError: If the model is not on the CPU in float32 or is accelerated already, or if
            `choices` names a layer that the model does not have or gives it another value.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(torch.nn.Conv2d(64, 64, 3, padding=1), "weight", 0.9)
        >>> model = torch.nn.Sequential(layer, torch.nn.ReLU())
        >>> x = torch.randn(1, 64, 28, 28)
        >>> fast = accelerate(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    if any(isinstance(module, FusedLayer) for module in model.modules()):
        raise ValueError("model holds an accelerated model: pass the one that it was made from")
    args, kwargs = call_arguments(example_inputs, "example_inputs")
    _check_llvmlite()
    with torch.no_grad():
        _check_inputs(args, kwargs)
        plain = _plain_copy(model)
        trial = copy.deepcopy(plain)
        expected = _run(trial, args, kwargs)
        # Not if it is random, or if it keeps what it was called with.
        repeats = _close(_run(trial, args, kwargs), expected)
        module = _fused_copy(plain, args, kwargs, expected, repeats)
        layers = [part for part in module.modules() if isinstance(part, FusedLayer)]
        forced = _checked(choices or {}, layers)
        tried = [
            layer
            for layer in layers
            if forced.get(layer.name, "sparse" if layer.zeros >= FEWEST_ZEROS else "") == "sparse"
        ]
        for layer in tried:
            layer.make_sparse()
        return _choose(plain, module, layers, tried, forced, args, kwargs, repeats)


def _check_llvmlite() -> None:
    try:
        import llvmlite  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "accelerate() compiles its kernels with llvmlite, which is not installed: "
            'pip install "torch-adapmtl[fast]"'
        ) from error


def _check_inputs(args: Any, kwargs: Any) -> None:
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor):
            _check_input(x)


def _check_input(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise TypeError(f"an accelerated model runs on the CPU, but an input is on {x.device}")
    if isinstance(x, FakeTensor):
        raise TypeError("an accelerated model computes values, but an input is a fake tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"an accelerated model takes dense tensors, but an input is {x.layout}")
    if x.is_floating_point() and x.dtype is not torch.float32:
        raise TypeError(
            f"an accelerated model computes float32, but an input is {x.dtype}: pass x.float()"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "an accelerated model computes no gradients, but an input requires them: call it under "
            "torch.no_grad()"
        )


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are parameters, masked and parametrized for good."""
    memo: dict[int, Any] = {}
    # What has a history is not copied: weights under torch's prune, and what a model caches.
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    result = copy.deepcopy(model, memo).eval()
    for module in list(result.modules()):
        if parametrize.is_parametrized(module):
            _bake(module)
        for hook in list(module._forward_pre_hooks.values()):
            # One on a pruner, whose model is still in training, has no tensor.
            if isinstance(hook, prune.BasePruningMethod) and hasattr(hook, "_tensor_name"):
                prune.remove(module, hook._tensor_name)
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"model is not on the CPU: {name} is on {tensor.device}; use .cpu()")
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            raise ValueError(f"model is not float32: {name} is {tensor.dtype}; use .float()")
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    return result


def _bake(module: Any) -> None:
    """Make parameters of what parametrizations compute.

    `remove_parametrizations` would take the weight from the class, which the given module shares.
    """
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _fused_copy(
    plain: nn.Module, args: Any, kwargs: Any, expected: Any, repeats: bool
) -> nn.Module:
    """A copy whose layers are fused with what follows them, if its outputs stay the same.

    A graph that does not hold for the examples is given up for those of the parts, level by level.
    There is none if outputs do not repeat, so that they could not be compared.
    """
    for depth in (0, 1, 2) if repeats else ():
        module = copy.deepcopy(plain)
        calls = Calls(module)
        _run(module, args, kwargs)
        calls.remove()
        try:
            module = fuse_layers(trace(module, calls, depth))
            if _close(_run(module, args, kwargs), expected):
                return module
        except Exception:  # whatever the model's code raises where the graph does not hold
            continue
    module = fuse_layers(copy.deepcopy(plain))
    try:
        if _close(_run(copy.deepcopy(module), args, kwargs), expected):
            return module
    except Exception:  # such as of code that looks into its layers
        return plain
    # Code that asks for the class of a layer may take another way; code that is random always does.
    return plain if _close(_run(copy.deepcopy(plain), args, kwargs), expected) else module


def _run(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a model with copies of the inputs: it may write to them."""
    args, kwargs = _copies(args, kwargs)
    return module(*args, **kwargs)


def _copies(args: Any, kwargs: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))


def _writes(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a model writes to its inputs."""
    own_args, own_kwargs = _copies(args, kwargs)
    module(*own_args, **own_kwargs)
    pairs = zip(tree_leaves((args, kwargs)), tree_leaves((own_args, own_kwargs)), strict=True)
    return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)


def _close(found: Any, expected: Any) -> bool:
    """Whether outputs are of the same form, and the same up to rounding."""
    leaves, spec = tree_flatten(found)
    expected_leaves, expected_spec = tree_flatten(expected)
    return spec == expected_spec and all(map(_same, leaves, expected_leaves))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if not isinstance(a, Tensor):  # a record of tensors may be of any class
        return not hasattr(a, "__dict__") or a is b or _close(dict(vars(a)), dict(vars(b)))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=1e-4 * max(scale, 1e-6), equal_nan=True)


def _checked(choices: Mapping[str, str], layers: Iterable[FusedLayer]) -> dict[str, str]:
    names = {layer.name for layer in layers}
    for name, choice in choices.items():
        if name not in names:
            raise ValueError(
                f"choices names {name!r}, which is no convolution or linear layer of the model: "
                f"the names are {', '.join(sorted(names)) or 'none'}"
            )
        if choice not in ("sparse", "dense"):
            raise ValueError(f'choices[{name!r}] must be "sparse" or "dense", found {choice!r}')
    return dict(choices)


def _choose(
    plain: nn.Module,
    module: nn.Module,
    layers: list[FusedLayer],
    tried: list[FusedLayer],
    forced: dict[str, str],
    args: Any,
    kwargs: Any,
    repeats: bool,
) -> AcceleratedModel:
    """Measure, and keep what is fastest."""
    fresh = None if repeats else copy.deepcopy((plain, module))  # as no call has left them

    def apply(choices: Mapping[str, str]) -> None:
        for layer in layers:
            layer.choice = choices.get(layer.name, "dense")
        link(module)

    call = _run if _writes(plain, args, kwargs) else lambda part, *_: part(*args, **kwargs)

    def run() -> None:
        call(module, args, kwargs)

    chosen = {layer.name: forced.get(layer.name, "sparse") for layer in tried}
    apply(chosen)
    _calibrate(module, run)
    dense = Candidate(run, lambda: apply({}))
    sparse_seconds: dict[str, float] = {}
    measured = [layer for layer in tried if layer.name not in forced]
    changed = bool(measured)
    for _ in range(3):  # a layer that becomes dense changes what its neighbours read
        if not changed:
            break
        sparse = Candidate(run, lambda: apply(chosen))
        measure([dense, sparse], layers)
        sparse_seconds |= {name: sparse.layers[name] for name in chosen if chosen[name] == "sparse"}
        changed = False
        for layer in measured:
            name = layer.name
            if chosen[name] == "sparse" and sparse_seconds[name] > GAIN * dense.layers[name]:
                chosen[name], changed = "dense", True
    original = Candidate(lambda: call(plain, args, kwargs), lambda: None)
    sparse = Candidate(run, lambda: apply(chosen))
    least = Candidate(run, lambda: apply(forced)) if measured and forced else dense
    rounds = MOST if measured or not forced else 1  # nothing is decided by the times
    measure(list(dict.fromkeys([original, dense, least, sparse])), layers, rounds)
    for name in chosen:
        if chosen[name] == "sparse":
            sparse_seconds.setdefault(name, sparse.layers[name])
    fastest, as_given = sparse.total, False
    if measured and least.total < sparse.total:
        chosen, fastest = dict(forced), least.total
    if not forced and WORTH * original.total < fastest:
        as_given, chosen, fastest = True, {}, original.total
    apply(chosen)
    rows = [
        LayerChoice(
            layer.name,
            layer.kind,
            layer.weights,
            layer.nonzeros,
            layer.positions,
            dense.layers[layer.name],
            sparse_seconds.get(layer.name),
            layer.choice,
        )
        for layer in layers
    ]
    if fresh is not None:
        plain, module = fresh
        own = [part for part in module.modules() if isinstance(part, FusedLayer)]
        for part, layer in zip(own, layers, strict=True):
            part.choice, part.is_read = layer.choice, layer.is_read
        layers = own
    for layer in layers:
        layer.settle()
    best = plain if as_given else module
    report = AccelerationReport(
        tuple(rows), original.total, dense.total, fastest, torch.get_num_threads()
    )
    traced = isinstance(best, fx.GraphModule)
    names = inspect.signature(plain.forward).parameters if traced else ()
    defaults = _specialised(plain, best) if traced else {}
    return AcceleratedModel(best, report, names, defaults)


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return isinstance(value, bool | int | float | str) and bool(value == default)


def _specialised(plain: nn.Module, module: nn.Module) -> dict[str, Any]:
    """The parameters that a graph lacks because the examples had none, with their defaults."""
    given = inspect.signature(plain.forward).parameters
    left = inspect.signature(module.forward).parameters
    return {name: p.default for name, p in given.items() if name not in left}


def _calibrate(module: nn.Module, run: Any) -> None:
    """Let the layers agree on the zeros around their maps."""
    convolutions = [part for part in module.modules() if isinstance(part, SparseConv2d)]
    for part in convolutions:
        part.calibrating = True
    for _ in range(3):
        run()
    for part in convolutions:
        part.calibrating = False
