"""The problems that methods are compared on, in sizes that a CPU core trains in half a minute.

The suite of the results page is split by family, before the first run of it, into problems that
defaults are chosen on and problems that they are reported on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from examples.benchmark.paper_scale import paper_problem
from examples.benchmark.problem import Problem
from examples.benchmark.problems.digits import digits_problems
from examples.benchmark.problems.rooms import rooms_problems
from examples.benchmark.problems.signals import signals
from examples.benchmark.problems.sprites import sprites_problems
from examples.benchmark.problems.tables import tabular, teachers
from examples.benchmark.problems.words import WordModel, words

__all__ = ["CHOOSING", "PROBLEMS", "REPORTED", "WordModel", "find_problem"]

#: The problems that defaults are chosen on, by family: residual convolutions, depthwise
#: convolutions, a text transformer, and a plain perceptron.
CHOOSING: tuple[str, ...] = (
    *("rooms3", "rooms5", "digits"),
    *("rooms3 mobilenet", "digits convnext", "digits efficientnet"),
    "words",
    "teachers",
)

#: The problems that defaults are reported on, by family: a U-Net, a vision transformer, grouped
#: convolutions with squeeze-and-excitation, plain convolutions without norms from a pretrained
#: dense net, a residual perceptron, and a recurrent net.
REPORTED: tuple[str, ...] = (
    *("sprites unet", "sprites vit", "sprites regnet", "sprites vgg", "tabular", "signals"),
)

#: The problems of both halves, by name.
PROBLEMS: Mapping[str, Problem] = {
    problem.name: problem
    for problem in (
        *rooms_problems(),
        *digits_problems(),
        words(),
        *sprites_problems(),
        signals(),
        tabular(),
        teachers(),
    )
}


@cache
def find_problem(name: str) -> Problem:
    """A problem by its name: one of `PROBLEMS`, or `paper/ENCODER/DATA`.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> from examples.benchmark import find_problem
        >>> find_problem("paper/mobilenetv2/rooms").steps
        20000
    """
    if name in PROBLEMS:
        return PROBLEMS[name]
    kind, _, rest = name.partition("/")
    encoder, _, data = rest.partition("/")
    if kind == "paper" and data:
        return paper_problem(encoder, data)
    raise ValueError(
        f"problem must be one of {list(PROBLEMS)} or 'paper/ENCODER/DATA', got {name!r}"
    )
