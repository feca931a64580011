"""The schedule, and the solver against plain sorting."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from torch_adapmtl import SparsitySchedule
from torch_adapmtl.budget.solver import Bounds, Scores, from_bits, select, solve, to_bits

# --- the schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["cubic", "linear", "cosine"])
def test_schedule_is_exact_at_its_ends(shape: Any) -> None:
    schedule = SparsitySchedule(start=0.1, end=0.7, initial=0.25, shape=shape)
    assert [schedule(step, 100, 0.9) for step in (0, 10)] == [0.25, 0.25]
    assert [schedule(step, 100, 0.9) for step in (70, 71, 100, 1000)] == [0.9] * 4
    assert 0.25 < schedule(11, 100, 0.9) < schedule(69, 100, 0.9) < 0.9


@pytest.mark.parametrize(
    ("shape", "halfway"), [("cubic", 0.8 * (1 - 0.5**3)), ("linear", 0.4), ("cosine", 0.4)]
)
def test_schedule_halfway(shape: Any, halfway: float) -> None:
    schedule = SparsitySchedule(start=0.2, end=0.6, shape=shape)
    assert schedule(40, 100, 0.8) == pytest.approx(halfway)


def test_equal_schedules_say_the_same() -> None:
    """A state is refused by a model that was prepared with another schedule, told by its words."""
    assert repr(SparsitySchedule(start=0, end=1)) == repr(SparsitySchedule(start=0.0, end=1.0))


def test_cosine_and_cubic_follow_their_formulae() -> None:
    p = 0.3
    cosine = SparsitySchedule(start=0, end=1, initial=0.1, shape="cosine")(30, 100, 0.9)
    assert cosine == pytest.approx(0.9 + (0.1 - 0.9) * (1 + math.cos(math.pi * p)) / 2)
    cubic = SparsitySchedule(start=0, end=1, initial=0.1)(30, 100, 0.9)
    assert cubic == pytest.approx(0.9 + (0.1 - 0.9) * (1 - p) ** 3)


@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    initial=st.floats(0, 1, exclude_max=True),
    target=st.floats(0, 1, exclude_max=True),
    shape=st.sampled_from(["cubic", "linear", "cosine"]),
    total=st.integers(1, 60),
)
def test_schedule_never_falls_and_ends_at_the_target(
    ends: list[float], initial: float, target: float, shape: Any, total: int
) -> None:
    schedule = SparsitySchedule(start=ends[0], end=ends[1], initial=initial, shape=shape)
    values = [schedule(step, total, target) for step in range(total + 1)]
    assert values[-1] == target
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(values))
    assert all(0 <= value <= target + 1e-12 for value in values)


# --- the solver ---------------------------------------------------------------------------------


class Problem:
    """Layers of scores with bounds, and the plain answer."""

    def __init__(self, seed: int, *, values: int | None = None, bounded: bool = True) -> None:
        rng = random.Random(seed)
        count = rng.randint(1, 6)
        self.sizes = [rng.choice([1, 2, 5, 17, 40]) for _ in range(count)]
        kinds = rng.randint(1, min(3, count))
        found = [*range(kinds), *(rng.randrange(kinds) for _ in range(count - kinds))]
        # Components are numbered in the order of their first layer, as in a model.
        rng.shuffle(found)
        names = list(dict.fromkeys(found))
        self.component = [names.index(c) for c in found]
        scale = [10 ** rng.uniform(-3, 3) for _ in self.sizes]

        def score(layer: int) -> float:
            return rng.randrange(values) / 4 if values else scale[layer] * abs(rng.gauss(0, 1))

        self.scores = [torch.tensor([score(i) for _ in range(n)]) for i, n in enumerate(self.sizes)]
        size = [0] * kinds
        for n, c in zip(self.sizes, self.component, strict=True):
            size[c] += n
        self.layer_max, self.least, self.most = list(self.sizes), [0] * kinds, size
        if bounded:
            self.layer_max = [rng.randint(n // 2, n) for n in self.sizes]
            room = [0] * kinds
            for n, c in zip(self.layer_max, self.component, strict=True):
                room[c] += n
            self.most = [rng.randint(n // 2, n) for n in room]
            self.least = [rng.randint(0, n) if rng.random() < 0.4 else 0 for n in self.most]
        self.zeros = rng.randint(sum(self.least), sum(self.most))

    @property
    def bounds(self) -> Bounds:
        counts = (self.layer_max, self.least, self.most)
        return Bounds(
            torch.tensor(self.component),
            *(torch.tensor(k, dtype=torch.float64) for k in counts),
        )

    def ready(self) -> Scores:
        return Scores(torch.cat(self.scores), self.sizes)

    def plain(self) -> list[list[bool]]:
        """Prune one weight after the other, the smallest score that no bound forbids."""
        gone = [[False] * n for n in self.sizes]
        layer, component = [0] * len(self.sizes), [0] * len(self.most)
        order = sorted(
            (float(score), self.component[i], i, j)
            for i, scores in enumerate(self.scores)
            for j, score in enumerate(scores)
        )

        def sweep(limit: list[int], budget: int) -> None:
            for _, c, i, j in order:
                if sum(component) == budget:
                    return
                if not gone[i][j] and layer[i] < self.layer_max[i] and component[c] < limit[c]:
                    gone[i][j] = True
                    layer[i] += 1
                    component[c] += 1

        sweep(self.least, sum(self.least))  # what each component has to lose in any case
        sweep(self.most, self.zeros)
        return gone


def _marked(scores: list[Tensor], levels: list[int], numbers: list[int]) -> list[list[bool]]:
    """Prune what is below the level, and of the ties the first ones."""
    found = []
    for score, level, number in zip(scores, levels, numbers, strict=True):
        bits = to_bits(score).tolist()
        order = sorted(range(len(bits)), key=lambda j: (bits[j], j))
        gone = set(order[:number])
        assert all(bits[j] < level for j in order[:number] if bits[j] != level)
        assert all(bits[j] >= level for j in order[number:])
        found.append([j in gone for j in range(len(bits))])
    return found


@given(st.integers(0, 10**6), st.sampled_from([None, 1, 3, 20]), st.booleans())
def test_select_is_plain_sorting(seed: int, values: int | None, bounded: bool) -> None:
    problem = Problem(seed, values=values, bounded=bounded)
    levels, numbers = select(problem.ready(), problem.bounds, problem.zeros)
    assert sum(numbers) == problem.zeros
    assert _marked(problem.scores, levels, numbers) == problem.plain()


@given(st.integers(0, 10**6), st.booleans())
def test_solve_meets_the_budget_where_no_scores_tie(seed: int, bounded: bool) -> None:
    problem = Problem(seed, bounded=bounded)
    budget = torch.tensor(problem.zeros, dtype=torch.float64)
    level = from_bits(solve(problem.ready(), problem.bounds, budget))
    plain = problem.plain()
    for scores, threshold, gone in zip(problem.scores, level, plain, strict=True):
        expected = torch.tensor(gone)
        # Level 0 stands for "prunes nothing", and no score here is 0.
        assert torch.equal(scores <= threshold, expected)


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_solve_stays_within_one_tie_of_the_budget(seed: int, values: int) -> None:
    problem = Problem(seed, values=values, bounded=False)
    budget = torch.tensor(problem.zeros, dtype=torch.float64)
    common = solve(problem.ready(), problem.bounds, budget).max()
    flat = to_bits(torch.cat(problem.scores))
    assert int((flat < common).sum()) <= problem.zeros <= int((flat <= common).sum())


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_order_of_the_layers_does_not_matter(seed: int, rng: random.Random) -> None:
    problem = Problem(seed)
    levels, numbers = select(problem.ready(), problem.bounds, problem.zeros)
    order = list(range(len(problem.sizes)))
    rng.shuffle(order)
    other = Problem(seed)
    names = list(dict.fromkeys(problem.component[i] for i in order))
    other.sizes, other.scores, other.layer_max = (
        [values[i] for i in order] for values in (problem.sizes, problem.scores, problem.layer_max)
    )
    other.component = [names.index(problem.component[i]) for i in order]
    other.least, other.most = (
        [values[c] for c in names] for values in (problem.least, problem.most)
    )
    found = select(other.ready(), other.bounds, problem.zeros)
    assert found == ([levels[i] for i in order], [numbers[i] for i in order])


@given(st.integers(0, 10**6), st.sampled_from([None, 3, 20]), st.randoms(use_true_random=False))
def test_scores_near_the_levels_are_enough(
    seed: int, values: int | None, rng: random.Random
) -> None:
    problem = Problem(seed, values=values)
    expected = select(problem.ready(), problem.bounds, problem.zeros)
    reach = 2 ** rng.choice([4, 16, 22, 28])
    slip = rng.choice([0, 0, reach // 2])
    windows = [
        (level - rng.randint(-slip, reach), level + rng.randint(-slip, reach))
        for level in expected[0]
    ]
    near, below = [], []
    for scores, (low, high) in zip(problem.scores, windows, strict=True):
        bits = to_bits(scores)
        near.append(scores[(bits >= low) & (bits <= high)])
        below.append((bits < low).sum())
    lengths = [len(part) for part in near]
    window = Scores(torch.cat(near), lengths, below=torch.stack(below))
    found = select(window, problem.bounds, problem.zeros)
    # Whoever calls it with windows has to look whether the levels lie inside.
    if all(low <= at <= high for at, (low, high) in zip(found[0], windows, strict=True)):
        assert sum(found[1]) == problem.zeros
        assert _marked(problem.scores, *found) == problem.plain()
    else:
        event("a window was missed")


def test_what_cannot_be_compared_is_pruned_last() -> None:
    scores = torch.tensor([math.nan, 1.0, math.inf, 0.0])
    problem = Problem(0, bounded=False)
    problem.sizes, problem.component, problem.layer_max = [4], [0], [4]
    problem.least, problem.most, problem.scores = [0], [4], [scores]
    found = []
    for zeros in range(5):
        levels, numbers = select(problem.ready(), problem.bounds, zeros)
        assert numbers == [zeros]
        found.append(_marked([scores], levels, numbers)[0])
    assert found[1:3] == [[False, False, False, True], [False, True, False, True]]
    assert [sum(gone) for gone in found] == [0, 1, 2, 3, 4]


_FLOATS = st.floats(0, torch.finfo(torch.float32).max, width=32)


@given(_FLOATS, _FLOATS)
def test_bits_are_ordered_as_the_numbers_are(a: float, b: float) -> None:
    bits = to_bits(torch.tensor([a, b]))
    assert (bits[0] < bits[1]).item() == (a < b)
    assert from_bits(bits).tolist() == [a, b]


def test_what_is_gone_in_any_case_goes_before_a_zero() -> None:
    scores = torch.tensor([0.0, 0.0, -1.0, 0.0])
    ready = Scores(scores, [4])
    gone, zero = to_bits(torch.tensor([-1.0, 0.0]))
    assert [ready.count(level).item() for level in (torch.tensor(-1), gone, zero)] == [0, 1, 4]
    assert from_bits(torch.stack([torch.tensor(-1), gone, zero])).tolist() == [0.0, 0.0, 0.0]


def test_a_sample_stands_for_all() -> None:
    ready = Scores(torch.tensor([1.0, 2.0, 3.0, 4.0]), [2, 2], torch.tensor([10.0, 1.0]))
    level = to_bits(torch.tensor(3.0))
    assert ready.count(level).tolist() == [20, 1]
