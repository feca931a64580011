"""Running a model on example inputs to see which tasks depend on which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_adapmtl.components._graph import leaf_masks
from torch_adapmtl.components._inputs import FORMS, call_arguments, encoder_images
from torch_adapmtl.components._outputs import OutputError, TaskOutputs, split_output
from torch_adapmtl.components._probe import probe
from torch_adapmtl.components._weight_use import WeightUse

__all__ = ["Detection", "detect", "detect_each", "keep_zeros", "observe_use"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Detection:
    """Which tasks depend on which parameters.

    Attributes:
        tasks: The tasks in declared order.
        masks: For each parameter that a task depends on, by id: a bit mask in which bit `i` is set
            if the output of task `i` depends on it.
        use: What operations receive of the prunable weights.
        cut_off: Ids of parameters that outputs depend on only through `detach`, `no_grad` or
            `inference_mode`.
        output_type: The type of what the model returned.
    """

    tasks: tuple[str, ...]
    masks: dict[int, int]
    use: WeightUse
    cut_off: frozenset[int] = frozenset()
    output_type: type = object


def detect(
    model: nn.Module,
    example_inputs: Any,
    task_outputs: TaskOutputs | None,
    parameter_ids: Iterable[int],
    weights: Sequence[nn.Parameter],
    argument: str = "example_inputs",
) -> Detection:
    """Run `model` and follow the autograd graph from each task's output.

    Args:
        model: The model, unwrapped.
        example_inputs: What the model is called with, or None for images made for its encoder.
        task_outputs: How the output splits into tasks.
        parameter_ids: Ids of the parameters whose tasks are wanted. If no task depends on some of
            them, the model is run again, to see whether they are cut off, dropped at random or
            unused.
        weights: The parameters whose use is wanted. If operations do not receive zeros of some of
            them, the model is run again in eval mode, because noise in training does not matter.
        argument: The name of `example_inputs` in errors.
    """

    def read(output: Any, use: WeightUse) -> Detection:
        outputs = split_output(output, task_outputs)
        _check_grad(outputs)
        masks = leaf_masks(list(outputs.values()))
        return Detection(tuple(outputs), masks, use, output_type=type(output))

    detection, run = _run(model, example_inputs, read, weights, argument)
    missing, in_eval = set(parameter_ids) - detection.masks.keys(), None
    if missing and (in_eval := _attempt(run, read, training=False)) is not None:
        # Train mode can drop layers at random. Eval mode can return something else: other tasks,
        # or a tensor in place of a tuple, in which an index means something else too.
        same_tasks = in_eval.tasks == detection.tasks
        if same_tasks and in_eval.output_type is detection.output_type:
            dropped = {key: in_eval.masks[key] for key in missing & in_eval.masks.keys()}
            detection = replace(detection, masks={**detection.masks, **dropped})
            missing -= dropped.keys()
    if missing and (seen_through := _attempt(run, read, weights=(), see_through=True)) is not None:
        cut_off = frozenset(missing & seen_through.masks.keys())
        detection = replace(detection, cut_off=cut_off)
    use = _use_in_both_modes(detection.use, in_eval and in_eval.use, run)
    return replace(detection, use=use)


def detect_each(
    model: nn.Module,
    task_inputs: Mapping[str, Any],
    parameter_ids: Iterable[int],
    weights: Sequence[nn.Parameter],
) -> Detection:
    """Run `model` once for each task, on the task's inputs; all it returns belongs to the task.

    Args:
        model: The model, unwrapped.
        task_inputs: The example inputs of each task.
        parameter_ids: As for `detect`.
        weights: As for `detect`.
    """
    parameter_ids = list(parameter_ids)
    masks: dict[int, int] = {}
    cut_off: set[int] = set()
    use = WeightUse()
    for bit, (task, inputs) in enumerate(task_inputs.items()):
        whole: TaskOutputs = {task: lambda output: output}
        argument = f"task_inputs[{task!r}]"
        detection = detect(model, inputs, whole, parameter_ids, weights, argument)
        for key in detection.masks:
            masks[key] = masks.get(key, 0) | 1 << bit
        cut_off |= detection.cut_off
        use |= detection.use
    return Detection(tuple(task_inputs), masks, use, frozenset(cut_off - masks.keys()))


def observe_use(
    model: nn.Module,
    example_inputs: Any,
    task_inputs: Mapping[str, Any] | None,
    weights: Sequence[nn.Parameter],
) -> WeightUse:
    """Run `model` on the inputs only to see how it uses its weights.

    Without inputs, it runs on images made for its encoder, if it has one and runs on them.
    """

    def read(output: Any, use: WeightUse) -> WeightUse:
        return use

    calls = {"example_inputs": example_inputs}
    if task_inputs is not None:
        calls = {f"task_inputs[{task!r}]": inputs for task, inputs in task_inputs.items()}
    total = WeightUse()
    for argument, inputs in calls.items():
        try:
            use, run = _run(model, inputs, read, weights, argument)
        except (ValueError, RuntimeError):
            if inputs is None:  # nobody has said that the model can run
                break
            raise
        total |= _use_in_both_modes(use, None, run)
    return total


class _Product(nn.Module):
    """The product of its input with what parametrizations make of a weight."""

    def __init__(self, weight: nn.Parameter, parametrizations: Iterable[nn.Module]) -> None:
        super().__init__()
        self.weight, self.chain = weight, nn.Sequential(*parametrizations)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = x * self.chain(self.weight)
        return product


def keep_zeros(weight: nn.Parameter, parametrizations: Iterable[nn.Module]) -> bool:
    """Whether what parametrizations make of a weight is zero wherever the weight is.

    If they cannot be run, the answer is yes: the model's forward pass raises the error then.
    """
    product = _Product(weight, parametrizations)
    try:
        use = observe_use(product, torch.ones((), device=weight.device), None, [weight])
    except RuntimeError:
        return True
    return id(weight) not in use.remade | use.written | use.replaced


def _use_in_both_modes(
    in_training: WeightUse, in_eval: WeightUse | None, run: Callable[..., WeightUse]
) -> WeightUse:
    """Return what both modes do, without what is remade in train mode only, as by noise."""
    if in_eval is None and in_training.remade:
        in_eval = _attempt(run, lambda output, use: use, training=False)
    if in_eval is None:
        return in_training
    only_in_training = (in_training.remade & in_eval.used) - in_eval.remade
    use = in_training | in_eval
    positions = {**in_eval.positions, **in_training.positions}  # of one run, not the sum of two
    return replace(use, remade=use.remade - only_in_training, positions=positions)


def _run(
    model: nn.Module,
    example_inputs: Any,
    read: Callable[[Any, WeightUse], _T],
    weights: Sequence[nn.Parameter],
    argument: str,
) -> tuple[_T, Callable[..., Any]]:
    """Return what a run of the model shows, and a function that runs it again."""
    if example_inputs is None:
        return _run_on_images(model, read, weights)
    run = partial(probe, model, *call_arguments(example_inputs, argument), weights=weights)
    try:
        return run(read), run
    except OutputError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the model failed on {argument} ({_first_line(error)}); pass what the training loop "
            f"gives the model, {FORMS}, on the model's device"
        ) from error


def _run_on_images(
    model: nn.Module, read: Callable[[Any, WeightUse], _T], weights: Sequence[nn.Parameter]
) -> tuple[_T, Callable[..., Any]]:
    """The same on images made for the encoder in the model, of the first shape that works."""
    encoder, batches = encoder_images(model)
    failure: Exception | None = None
    for batch in batches:
        run = partial(probe, model, (batch,), {}, weights=weights)
        try:
            return run(read), run
        except OutputError:
            raise
        except Exception as error:
            failure = failure or error
    shapes = " or ".join("x".join(map(str, batch.shape)) for batch in batches)
    raise RuntimeError(
        f"the model failed on images of {shapes}, made for its encoder {encoder} "
        f"({_first_line(failure)}); pass example_inputs=, what the training loop gives the model: "
        f"{FORMS}"
    ) from failure


def _attempt(
    run: Callable[..., _T], read: Callable[[Any, WeightUse], _T], **options: Any
) -> _T | None:
    """Return what a run in another mode shows; None if the model does not run in that mode."""
    try:
        return run(read, **options)
    except Exception:
        return None


def _check_grad(outputs: Mapping[str, list[Tensor]]) -> None:
    for task, tensors in outputs.items():
        if not any(tensor.requires_grad for tensor in tensors):
            dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
            raise OutputError(
                f"the output of task {task!r} has no gradient (found {dtypes} that depends on no "
                "parameter); return what the loss is computed from, not an argmax or a detached "
                "tensor, or choose the tasks' outputs with task_outputs="
            )


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
