"""Finding which tasks depend on which parameters, from one run of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.components._graph import reached
from torch_adapmtl.components._inputs import REMEDY, call_arguments, made_inputs
from torch_adapmtl.components._outputs import OutputError, TaskOutputs, split_output
from torch_adapmtl.components._probe import probe

__all__ = ["Detection", "detect", "detect_each"]


@dataclass(frozen=True)
class Detection:
    """What one run of a model showed.

    Attributes:
        tasks: The tasks in declared order.
        masks: By id of a parameter, in bit `i` whether the output of task `i` depends on it.
        cut_off: Ids of parameters that are used, but only where the model lets no gradient through.
    """

    tasks: tuple[str, ...]
    masks: dict[int, int]
    cut_off: frozenset[int] = field(default=frozenset())


def detect(
    model: nn.Module,
    example_inputs: Any,
    task_outputs: TaskOutputs | None,
    keys: Iterable[int],
    argument: str = "example_inputs",
) -> Detection:
    """Runs `model` (unwrapped) and follows its graph from each task's output.

    `keys` are the ids of the parameters of interest: only for those that no task depends on is it
    worth looking a second time, through `detach` and `no_grad`. `argument` is what errors call
    `example_inputs`.
    """
    kind: type = object

    def read(output: Any) -> Detection:
        nonlocal kind
        kind = type(output)
        parts = split_output(output, task_outputs)
        _check_grad(parts)
        return Detection(tuple(parts), reached(list(parts.values())))

    if example_inputs is not None:
        args, kwargs = call_arguments(example_inputs)
        try:
            seen = probe(model, args, kwargs, read)
        except OutputError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the model failed on {argument} ({_brief(error)}); {REMEDY}, on the model's device"
            ) from error
    else:
        kwargs = {}
        encoder, batches = made_inputs(model)
        failure: Exception | None = None
        for batch in batches:
            args = (batch,)
            try:
                seen = probe(model, args, kwargs, read)
                break
            except OutputError:
                raise
            except Exception as error:
                failure = failure or error
        else:
            shapes = " or ".join("x".join(map(str, batch.shape)) for batch in batches)
            raise RuntimeError(
                f"the model failed on images of {shapes}, made for its encoder {encoder} "
                f"({_brief(failure)}); {REMEDY}"
            ) from failure
    lost = {key for key in keys if key not in seen.masks}
    trained = kind
    if lost:  # training may have dropped a layer at random
        try:
            calm = probe(model, args, kwargs, read, training=False)
        except Exception:  # a model may not run in eval mode, or have other outputs there
            calm = seen
        # An index means an output in a tuple, and something else in a tensor.
        if calm.tasks == seen.tasks and kind is trained:
            found = {key: calm.masks[key] for key in lost & calm.masks.keys()}
            seen = Detection(seen.tasks, {**seen.masks, **found})
            lost -= found.keys()
    if not lost:
        return seen
    try:
        through = probe(model, args, kwargs, read, see_through=True)
    except Exception:  # it can break a model; what it would have told apart stays unused
        return seen
    return Detection(seen.tasks, seen.masks, frozenset(lost & through.masks.keys()))


def detect_each(model: nn.Module, task_inputs: Mapping[str, Any], keys: Iterable[int]) -> Detection:
    """The same for a model that is called once for each task, with the inputs of that task."""
    keys, masks, cut_off = list(keys), dict[int, int](), set[int]()
    for bit, (task, inputs) in enumerate(task_inputs.items()):
        whole: TaskOutputs = {task: lambda output: output}
        own = detect(model, inputs, whole, keys, f"task_inputs[{task!r}]")
        for key in own.masks:
            masks[key] = masks.get(key, 0) | 1 << bit
        cut_off |= own.cut_off
    return Detection(tuple(task_inputs), masks, frozenset(cut_off - masks.keys()))


def _check_grad(parts: Mapping[str, list[Tensor]]) -> None:
    for task, tensors in parts.items():
        if not any(tensor.requires_grad for tensor in tensors):
            kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
            raise OutputError(
                f"the output of task {task!r} has no gradient (found {kinds} that depends on no "
                "parameter); return what the loss is computed from, not an argmax or a detached "
                "tensor, or choose the tasks' outputs with task_outputs="
            )


def _brief(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
