"""Checks of arguments. The errors name the argument, the value and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "check_alpha",
    "check_boolean",
    "check_choice",
    "check_count",
    "check_flag",
    "check_fraction",
    "check_keys",
    "check_mask",
    "check_numbers",
    "check_place",
    "check_rate",
    "check_reach",
    "check_steps",
    "check_threshold",
    "obstacle",
    "outputs_named_like",
    "trouble_of_inference",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of prunable weights."""

# Above this, not every integer is a float, and the schedule computes with floats.
_MOST_STEPS = 2**53


def check_numbers(where: str = "", /, **values: object) -> None:
    """Raise a `TypeError` unless all values are real numbers, of Python or NumPy.

    Args:
        where: A prefix of the names in the error, such as "schedule: ".
        **values: The values by name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"{where}{name} must be a number, got {value!r} ({type(value).__name__})"
            )


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return `value` as an int if it is an integer >= `least`, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def check_choice(name: str, value: object, choices: tuple[str, ...], besides: str = "") -> None:
    """Raise an error unless `value` is one of `choices`.

    Args:
        name: The name of the argument, for the error.
        value: The value.
        choices: The allowed values.
        besides: A further kind of allowed values, for the error.
    """
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join([*map(repr, choices), *([f"or {besides}"] if besides else [])])
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_keys(name: str, values: Mapping[str, object], kind: str, keys: Sequence[str]) -> None:
    """Raise a `ValueError` unless a mapping has exactly these keys.

    Args:
        name: The name of the argument, for the error.
        values: The mapping.
        kind: What the keys are, in the plural, for the error.
        keys: The keys.
    """
    if set(values) != set(keys):
        missing = [key for key in keys if key not in values]
        unknown = [key for key in values if key not in keys]
        raise ValueError(
            f"{name} must be for exactly the {kind} {list(keys)}: missing {missing}, unknown "
            f"{unknown}"
        )


def check_flag(name: str, value: object) -> None:
    """Raise a `TypeError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_fraction(name: str, value: object) -> float:
    """Return `value` as a float if it is a fraction in [0, 1)."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0.0 <= value < 1.0):  # type: ignore[operator]
        raise ValueError(f"{name} must be a fraction in [0, 1), got {value!r}; 90 % is 0.9")
    return float(value)  # type: ignore[arg-type]


def check_steps(value: object) -> int:
    """Return `value` as an int if it can be the number of steps of a run."""
    try:
        steps = check_count("total_steps", value)
    except ValueError as error:
        raise ValueError(f"{error}; it is the number of optimizer steps of the run") from None
    if steps > _MOST_STEPS:
        raise ValueError(
            f"total_steps must be at most 2**53, got {value!r}; it is the number of optimizer "
            f"steps of the run"
        )
    return steps


def check_rate(name: str, value: object) -> None:
    """Raise an error unless `value` is a valid learning rate; None and tensors are accepted."""
    if value is None or isinstance(value, Tensor):  # capturable optimisers take tensors
        return
    check_numbers(**{name: value})
    if not 0.0 <= cast(float, value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def outputs_named_like(names: Iterable[object], outputs: Iterable[str], *, rest: bool) -> str:
    """Return the argument `task_outputs=` that gives `names` to outputs such as `<name>_logits`.

    It is for errors about names that are not outputs.

    Args:
        names: The names that the user has given.
        outputs: The names of the model's outputs.
        rest: Whether the argument lists the other outputs too, under their names.

    Returns:
        The argument, or an empty string if there is not one output for each name.
    """
    outputs = list(outputs)
    chosen: dict[str, str] = {}
    for name in map(str, names):
        word = re.compile(rf"(^|[^a-z0-9]){re.escape(name.lower())}($|[^a-z0-9])")
        similar = [name] if name in outputs else [o for o in outputs if word.search(o.lower())]
        if len(similar) != 1 or similar[0] in chosen.values():
            return ""
        chosen[name] = similar[0]
    if not chosen or all(name == output for name, output in chosen.items()):
        return ""
    if rest:
        names_of = {output: name for name, output in chosen.items()}
        chosen = {names_of.get(output, output): output for output in outputs}
    entries = (f'"{name}": "{output}"' for name, output in chosen.items())
    return f"task_outputs={{{', '.join(entries)}}}"


def check_reach(reach: float) -> None:
    """Raise an error unless `reach` is a number above 1."""
    check_numbers(reach=reach)
    if not reach > 1.0:
        raise ValueError(f"reach must be above 1 (inf for the soft threshold), got {reach}")


def check_threshold(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite number >= 0; `name` is for the error."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    check_numbers(**{name: value})
    number = float(cast(float, value))
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {number}")
    return number


def check_alpha(alpha: Tensor, weight: Tensor) -> None:
    """Raise an error unless a threshold is floating point and fits the weight."""
    if not alpha.is_floating_point():
        raise TypeError(
            f"alpha must be floating point, got a tensor of {alpha.dtype}; cast it with "
            f"alpha.to(weight.dtype)"
        )
    expanded = (1,) * (weight.ndim - alpha.ndim) + tuple(alpha.shape)
    if alpha.ndim > weight.ndim or any(
        a not in (1, w) for a, w in zip(expanded, weight.shape, strict=True)
    ):
        raise ValueError(
            f"alpha must broadcast to the weight's shape {tuple(weight.shape)}, got a tensor of "
            f"shape {tuple(alpha.shape)}"
        )
    check_place(alpha, weight)


def check_place(alpha: Tensor, weight: Tensor) -> None:
    """Raise an error if a threshold is on another device than the weight."""
    # As everywhere in torch, a 0-d tensor on the CPU can be combined with any device.
    if alpha.device != weight.device and (alpha.ndim or alpha.device.type != "cpu"):
        raise ValueError(
            f"alpha, the threshold, is on {alpha.device} and the weight on {weight.device}: move "
            f"it with .to({str(weight.device)!r}), or move the whole model, which takes its "
            f"thresholds along"
        )


def check_boolean(name: str, value: object) -> None:
    """Raise a `TypeError` unless `value` is a boolean tensor or None."""
    if value is None or (isinstance(value, Tensor) and value.dtype is torch.bool):
        return
    kind = f"one of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"{name} must be a boolean tensor, got {kind}; make it with weight != 0")


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """Raise an error unless a mask is boolean and has the weight's shape and device."""
    if mask.dtype is not torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(
            f"mask must be a boolean tensor of the weight's shape {tuple(weight.shape)} on "
            f"{weight.device}, got one of {mask.dtype}, shape {tuple(mask.shape)} on "
            f"{mask.device}: make it with weight != 0, for instance, and move it with the module"
        )


def obstacle(weight: Tensor) -> str:
    """Explain why a tensor cannot be pruned, with a remedy; an empty string if it can."""
    if weight.is_quantized:
        return (
            f"is quantised ({weight.dtype}); prune the model in floating point and quantise it "
            f"after finalize()"
        )
    if weight.layout != torch.strided or weight.is_nested:
        kind = "a nested tensor" if weight.is_nested else f"stored as {weight.layout}"
        return f"is {kind}; only dense tensors can be pruned: make it one (.to_dense())"
    if weight.dtype not in DTYPES:
        return (
            f"is of {weight.dtype}; only weights of float16, bfloat16, float32 and float64 can be "
            f"pruned: cast it first, or leave it out"
        )
    return ""


def trouble_of_inference(weight: Tensor) -> str:
    """Explain that a weight was made in inference mode, with a remedy; else an empty string."""
    if not weight.is_inference() or torch.is_inference_mode_enabled():
        return ""
    return (
        "is an inference tensor, which cannot be trained; make the model outside of "
        "torch.inference_mode(), or take a copy.deepcopy of it outside"
    )
