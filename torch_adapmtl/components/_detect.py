"""Running a model on example inputs to see which tasks depend on which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.components._graph import leaf_masks
from torch_adapmtl.components._inputs import FORMS, call_arguments, encoder_images
from torch_adapmtl.components._outputs import OutputError, TaskOutputs, split_output
from torch_adapmtl.components._probe import probe

__all__ = ["Detection", "detect", "detect_each"]


@dataclass(frozen=True)
class Detection:
    """Which tasks depend on which parameters.

    Attributes:
        tasks: The tasks in declared order.
        masks: For each parameter that a task depends on, by id: a bit mask in which bit `i` is set
            if the output of task `i` depends on it.
        cut_off: Ids of parameters that outputs depend on only through `detach`, `no_grad` or
            `inference_mode`.
        output_type: The type of what the model returned.
    """

    tasks: tuple[str, ...]
    masks: dict[int, int]
    cut_off: frozenset[int] = frozenset()
    output_type: type = object


def detect(
    model: nn.Module,
    example_inputs: Any,
    task_outputs: TaskOutputs | None,
    parameter_ids: Iterable[int],
    argument: str = "example_inputs",
) -> Detection:
    """Run `model` and follows the autograd graph from each task's output.

    Args:
        model: The model, unwrapped.
        example_inputs: What the model is called with, or None for images made for its encoder.
        task_outputs: How the output splits into tasks.
        parameter_ids: Ids of the parameters whose tasks are wanted. If no task depends on some of
            them, the model is run again, to see whether they are cut off, dropped at random or
            unused.
        argument: The name of `example_inputs` in errors.
    """

    def read(output: Any) -> Detection:
        outputs = split_output(output, task_outputs)
        _check_grad(outputs)
        masks = leaf_masks(list(outputs.values()))
        return Detection(tuple(outputs), masks, output_type=type(output))

    if example_inputs is None:
        detection, run = _run_on_images(model, read)
    else:
        detection, run = _run_on_inputs(model, example_inputs, read, argument)
    missing = set(parameter_ids) - detection.masks.keys()
    if missing and (in_eval := _attempt(run, training=False)) is not None:
        # Train mode can drop layers at random. Eval mode can return something else: other tasks,
        # or a tensor in place of a tuple, in which an index means something else too.
        same_tasks = in_eval.tasks == detection.tasks
        if same_tasks and in_eval.output_type is detection.output_type:
            dropped = {key: in_eval.masks[key] for key in missing & in_eval.masks.keys()}
            detection = replace(detection, masks={**detection.masks, **dropped})
            missing -= dropped.keys()
    if missing and (seen_through := _attempt(run, see_through=True)) is not None:
        cut_off = frozenset(missing & seen_through.masks.keys())
        detection = replace(detection, cut_off=cut_off)
    return detection


def detect_each(
    model: nn.Module, task_inputs: Mapping[str, Any], parameter_ids: Iterable[int]
) -> Detection:
    """Run `model` once for each task, on the task's inputs; all it returns belongs to the task.

    Args:
        model: The model, unwrapped.
        task_inputs: The example inputs of each task.
        parameter_ids: As for `detect`.
    """
    parameter_ids = list(parameter_ids)
    masks: dict[int, int] = {}
    cut_off: set[int] = set()
    for bit, (task, inputs) in enumerate(task_inputs.items()):
        whole: TaskOutputs = {task: lambda output: output}
        detection = detect(model, inputs, whole, parameter_ids, f"task_inputs[{task!r}]")
        for key in detection.masks:
            masks[key] = masks.get(key, 0) | 1 << bit
        cut_off |= detection.cut_off
    return Detection(tuple(task_inputs), masks, frozenset(cut_off - masks.keys()))


def _run_on_inputs(
    model: nn.Module, example_inputs: Any, read: Callable[[Any], Detection], argument: str
) -> tuple[Detection, Callable[..., Detection]]:
    """Return what a run on the user's inputs shows, and a function that runs the model again."""
    run = partial(probe, model, *call_arguments(example_inputs, argument), read)
    try:
        return run(), run
    except OutputError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the model failed on {argument} ({_first_line(error)}); pass what the training loop "
            f"gives the model, {FORMS}, on the model's device"
        ) from error


def _run_on_images(
    model: nn.Module, read: Callable[[Any], Detection]
) -> tuple[Detection, Callable[..., Detection]]:
    """The same on images made for the encoder in the model, of the first shape that works."""
    encoder, batches = encoder_images(model)
    failure: Exception | None = None
    for batch in batches:
        run = partial(probe, model, (batch,), {}, read)
        try:
            return run(), run
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


def _attempt(run: Callable[..., Detection], **options: bool) -> Detection | None:
    """Return what a run in another mode shows; None if the model does not run in that mode."""
    try:
        return run(**options)
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
