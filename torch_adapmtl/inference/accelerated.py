"""Sparse models that run faster than dense ones on a CPU."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from torch_adapmtl.components._inputs import call_arguments

from ._choose import FEWEST_ZEROS, checked, choose
from ._copy_model import call_once, close, fused_copy, plain_copy
from ._fused_layer import FusedLayer
from ._program import Programs
from .report import AccelerationReport

__all__ = ["AcceleratedModel", "accelerate"]


class AcceleratedModel(nn.Module):
    """A model whose sparse layers skip their zeros, for evaluation on a CPU.

    [accelerate][torch_adapmtl.accelerate] makes it. It is called as the model that it was made
    from, with inputs of any size. `copy.deepcopy`, `pickle` and `torch.save` work; the kernels are
    compiled again where they are needed. Several threads may call it at once.

    The second call with inputs of one shape records what the model does, and later calls repeat it
    without the model's Python, if the model only computes float32 tensors from float32 tensors. A
    record takes up to 64 MiB; the last four shapes have one.

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
        >>> again = accelerate(model, torch.randn(16, 8), choices=fast.choices)
        >>> again.choices == fast.choices
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
        self._programs = Programs(module)
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
        _check_inputs((args, kwargs))
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("an accelerated model computes float32: call it outside of autocast")
        if self._defaults:
            kwargs = self._without_defaults(args, kwargs)
        with torch.no_grad():  # such as for checkpoints, whose outputs would require gradients
            return self._programs(args, kwargs)

    def _without_defaults(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments that the graph has; the others must be what it was made for."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name in self._defaults.keys() & given.keys():
            if not _is_default(given[name], self._defaults[name]):
                raise TypeError(
                    f"an accelerated model has no argument {name!r}, because the example inputs of "
                    f"accelerate() had none: accelerate the model with it"
                )
        return {name: value for name, value in kwargs.items() if name not in self._defaults}

    def _apply(self, fn: Any, recurse: bool = True) -> AcceleratedModel:
        """What `to()`, `half()`, `cuda()` and the like call: only copies are allowed."""
        probe = fn(torch.zeros(1, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype is not torch.float32:
            raise TypeError(
                f"an accelerated model computes float32 on the CPU, it cannot become {probe.dtype} "
                f"on {probe.device}: convert the model that accelerate() was given"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._programs = Programs(self.module)
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
    has (`torch.set_num_threads`). A layer for which the kernels are no faster stays as it is; so
    does the whole model if it would not become faster by a tenth, unless `choices` are given.

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
        >>> layer = prune.l1_unstructured(
        ...     torch.nn.Conv2d(64, 64, 3, padding=1), "weight", 0.9
        ... )
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
        _check_inputs((args, kwargs))
        plain = plain_copy(model)
        trial = copy.deepcopy(plain)
        expected = call_once(trial, args, kwargs)
        # Not if it is random, or if it keeps what it was called with.
        repeats = close(call_once(trial, args, kwargs), expected)
        module = fused_copy(plain, args, kwargs, expected, repeats)
        layers = [part for part in module.modules() if isinstance(part, FusedLayer)]
        forced = checked(choices or {}, layers)
        tried = [
            layer
            for layer in layers
            if forced.get(layer.name, "sparse" if layer.zeros >= FEWEST_ZEROS else "") == "sparse"
        ]
        for layer in tried:
            layer.make_sparse()
        best, report = choose(plain, module, layers, tried, forced, args, kwargs, repeats)
    traced = isinstance(best, fx.GraphModule)
    names = inspect.signature(plain.forward).parameters if traced else ()
    return AcceleratedModel(best, report, names, _specialised(plain, best) if traced else {})


def _check_llvmlite() -> None:
    try:
        import llvmlite  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "accelerate() compiles its kernels with llvmlite, which is not installed: "
            'pip install "torch-adapmtl[fast]"'
        ) from error


def _check_inputs(given: Iterable[Any]) -> None:
    for x in given:
        if isinstance(x, Tensor):
            _check_input(x)
        elif isinstance(x, list | tuple):  # much faster than torch's search for leaves
            _check_inputs(x)
        elif isinstance(x, dict):
            _check_inputs(x.values())
        else:
            for leaf in tree_leaves(x):
                if isinstance(leaf, Tensor):
                    _check_input(leaf)


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


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return isinstance(value, bool | int | float | str) and bool(value == default)


def _specialised(plain: nn.Module, module: nn.Module) -> dict[str, Any]:
    """The parameters that a graph lacks because the examples had none, with their defaults."""
    given = inspect.signature(plain.forward).parameters
    left = inspect.signature(module.forward).parameters
    return {name: p.default for name, p in given.items() if name not in left}
