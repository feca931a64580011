"""The solver against plain sorting."""

from __future__ import annotations

import math
import random

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from sorting import Limits
from torch import Tensor

from torch_adapmtl.budget.solver import Bounds, Scores, from_bits, select, solve, to_bits


class Problem:
    """Layers of scores with bounds, and the plain answer."""

    def __init__(self, seed: int, *, values: int | None = None, bounded: bool = True) -> None:
        rng = random.Random(seed)
        self.sizes = [rng.choice([1, 2, 5, 17, 40]) for _ in range(rng.randint(1, 6))]
        scale = [10 ** rng.uniform(-3, 3) for _ in self.sizes]

        def score(layer: int) -> float:
            return rng.randrange(values) / 4 if values else scale[layer] * abs(rng.gauss(0, 1))

        self.scores = [torch.tensor([score(i) for _ in range(n)]) for i, n in enumerate(self.sizes)]
        self.limits = Limits(rng, self.sizes, bounded=bounded)

    @property
    def zeros(self) -> int:
        return self.limits.zeros

    @property
    def bounds(self) -> Bounds:
        return self.limits.bounds

    def ready(self) -> Scores:
        return Scores(torch.cat(self.scores), self.sizes)

    def plain(self) -> list[list[bool]]:
        return self.limits.prune(self.scores)


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


class Priced(Problem):
    """The same with costs, and with bounds and a budget that are costs."""

    def __init__(self, seed: int, *, values: int | None = None, bounded: bool = True) -> None:
        super().__init__(seed, values=values, bounded=bounded)
        rng = random.Random(seed)
        self.costs = [rng.choice([1.0, 2.0, 7.0, 64.0, 1024.0, 10 / 3]) for _ in self.sizes]
        limits = self.limits
        room = [0.0] * len(limits.most)
        for c, n, cost in zip(limits.component, limits.layer_max, self.costs, strict=True):
            room[c] += n * cost
        self.most = [n * rng.uniform(0.5, 1) if bounded else n for n in room]
        self.least = [n * rng.random() if bounded and rng.random() < 0.4 else 0 for n in self.most]
        self.budget = rng.uniform(sum(self.least), sum(self.most))

    @property
    def bounds(self) -> Bounds:
        limits = self.limits
        numbers = (limits.layer_max, self.least, self.most, self.costs)
        tensors = (torch.tensor(k, dtype=torch.float64) for k in numbers)
        return Bounds(torch.tensor(limits.component), *tensors)

    def by_component(self, numbers: list[int]) -> list[float]:
        found = [0.0] * len(self.most)
        for c, number, cost in zip(self.limits.component, numbers, self.costs, strict=True):
            found[c] += number * cost
        return found


SLIP = 1 + 1e-9  # of rounding errors: costs are not all integers


@given(st.integers(0, 10**6), st.sampled_from([None, 1, 3, 20]), st.booleans())
def test_costs_are_met_to_half_of_the_largest(seed: int, values: int | None, bounded: bool) -> None:
    problem = Priced(seed, values=values, bounded=bounded)
    levels, numbers = select(problem.ready(), problem.bounds, problem.budget)
    marked = _marked(problem.scores, levels, numbers)
    assert [sum(gone) for gone in marked] == numbers
    found, largest = problem.by_component(numbers), max(problem.costs)
    assert abs(sum(found) - problem.budget) <= largest / 2 * SLIP
    assert all(n <= m for n, m in zip(numbers, problem.limits.layer_max, strict=True))
    for cost, least, most in zip(found, problem.least, problem.most, strict=True):
        assert least - largest * SLIP <= cost <= most + largest * SLIP
    if not bounded:  # then nothing that is left has a lower score than what is pruned
        bits = [to_bits(score).tolist() for score in problem.scores]
        pairs = [
            pair
            for own, gone in zip(bits, marked, strict=True)
            for pair in zip(own, gone, strict=True)
        ]
        pruned, left = ([b for b, gone in pairs if gone == which] for which in (True, False))
        assert max(pruned, default=0) <= min(left, default=math.inf)


@given(st.integers(0, 10**6))
def test_without_ties_costs_are_those_of_the_lowest_scores(seed: int) -> None:
    """Plain sorting: one weight after the other, as long as that comes nearer to the budget."""
    problem = Priced(seed, bounded=False)
    order = sorted((score, i) for i, own in enumerate(problem.scores) for score in own.tolist())
    expected, pruned = [0] * len(problem.sizes), 0.0
    for _, i in order:
        if pruned + problem.costs[i] / 2 >= problem.budget:
            break
        pruned += problem.costs[i]
        expected[i] += 1
    assert select(problem.ready(), problem.bounds, problem.budget)[1] == expected


@given(
    st.integers(0, 10**6),
    st.sampled_from([None, 3, 20]),
    st.booleans(),
    st.sampled_from([1.0, 3.0, 1024.0]),
)
def test_equal_costs_are_a_budget_of_weights(
    seed: int, values: int | None, bounded: bool, cost: float
) -> None:
    problem = Problem(seed, values=values, bounded=bounded)
    plain = problem.bounds
    costly = Bounds(
        plain.component,
        plain.layer_max,
        plain.least * cost,
        plain.most * cost,
        torch.full_like(plain.layer_max, cost),
    )
    expected = select(problem.ready(), plain, problem.zeros)
    assert select(problem.ready(), costly, problem.zeros * cost) == expected
    budget = torch.tensor(problem.zeros, dtype=torch.float64)
    level = solve(problem.ready(), plain, budget)
    assert torch.equal(solve(problem.ready(), costly, budget * cost), level)


@given(st.integers(0, 10**6))
def test_solve_reaches_costs_and_not_a_weight_more(seed: int) -> None:
    problem = Priced(seed, bounded=False)
    budget = torch.tensor(problem.budget, dtype=torch.float64)
    level = from_bits(solve(problem.ready(), problem.bounds, budget))
    numbers = [int((s <= at).sum()) for s, at in zip(problem.scores, level, strict=True)]
    pruned = sum(problem.by_component(numbers))
    assert problem.budget / SLIP <= pruned < problem.budget + max(problem.costs)


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
    problem, other = Problem(seed), Problem(seed)
    levels, numbers = select(problem.ready(), problem.bounds, problem.zeros)
    order = list(range(len(problem.sizes)))
    rng.shuffle(order)
    mine, theirs = problem.limits, other.limits
    names = list(dict.fromkeys(mine.component[i] for i in order))
    other.sizes, other.scores, theirs.layer_max = (
        [values[i] for i in order] for values in (problem.sizes, problem.scores, mine.layer_max)
    )
    theirs.component = [names.index(mine.component[i]) for i in order]
    theirs.least, theirs.most = ([values[c] for c in names] for values in (mine.least, mine.most))
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
    problem.sizes, problem.scores = [4], [scores]
    problem.limits = Limits(random.Random(0), [4], bounded=False)
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
