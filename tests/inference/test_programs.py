"""Passes that are repeated without their Python: the same outputs, whatever the inputs are then."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerating import all_sparse, assert_same, pruned
from hypothesis import given
from hypothesis import strategies as st
from skipping import seeds
from strange import CASES, Residual, conv, linear
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from torch_adapmtl.inference import (
    AcceleratedModel,
    _call,
    _elementwise,
    _filters,
    _map_modules,
    _program,
    accelerate,
)
from torch_adapmtl.inference._program import MOST_PROGRAMS, Program
from torch_adapmtl.inference._record import STATE, Arena, NotRepeatableError, Recording
from torch_adapmtl.inference._repeatable import is_repeatable, keeps_images_apart

MOST = 2**24

# Of torch, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def other_values(x: Any) -> Any:
    """Another tensor of the same form; integers, which may be indices, stay."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return torch.empty_like(x).copy_(torch.randn(x.shape))  # with the strides of `x`


def call(model: nn.Module, inputs: Any) -> Any:
    inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def check(fast: nn.Module, model: nn.Module, inputs: Any) -> None:
    found, expected = (tree_leaves(call(part, inputs)) for part in (fast, model))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(b, Tensor)]
    assert_same([a for a, _ in pairs], [b for _, b in pairs])


def programs(fast: AcceleratedModel) -> list[Program]:
    return [x for x in fast._programs._found.values() if isinstance(x, Program)]


def recorded(model: nn.Module, *inputs: Any) -> AcceleratedModel:
    """The model accelerated, with a program for inputs of that form."""
    fast = all_sparse(model, inputs)
    for _ in range(2):
        fast(*inputs)
    return fast


@pytest.mark.parametrize("name", CASES)
def test_passes_with_other_values(name: str) -> None:
    case = CASES[name]
    model = pruned(case.model(), 0.7)
    fast = all_sparse(model, copy.deepcopy(case.inputs))
    for _ in range(4):
        for inputs in (case.inputs, *case.others):
            check(fast, model, tree_map(other_values, inputs))


def test_most_graphs_are_repeated() -> None:
    found = []
    for case in CASES.values():
        fast = all_sparse(pruned(case.model(), 0.7), copy.deepcopy(case.inputs))
        for _ in range(2):
            call(fast, case.inputs)
        if fast._programs._is_repeatable:
            found.append(bool(programs(fast)))
    assert len(found) > len(CASES) / 2
    assert sum(found) > 0.8 * len(found)


def test_nothing_of_the_models_python_runs() -> None:
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast = recorded(model, x)
    fast.module.forward = None  # type: ignore[assignment]
    for _ in range(2):
        check(fast, model, (torch.randn(2, 3, 32, 32),))


def test_outputs_and_inputs_are_the_callers() -> None:
    model, x = pruned(nn.Sequential(conv(3, 8), nn.ReLU()), 0.7), torch.randn(2, 3, 16, 16)
    fast = recorded(model, x)
    before, y = x.clone(), fast(x)
    kept = y.clone()
    fast(torch.randn(2, 3, 16, 16))
    assert torch.equal(y, kept)  # the next pass has other memory for its outputs
    y.zero_()
    assert torch.equal(fast(x), kept)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_recorded_in_one_mode_repeated_in_another(mode: Callable[[], Any]) -> None:
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast = all_sparse(model, x)
    with mode():
        for _ in range(3):
            y = fast(x)["a"]
        assert y.is_inference() == torch.is_inference_mode_enabled()
    for other in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with other():
            check(fast, model, (torch.randn(2, 3, 32, 32),))
    assert len(programs(fast)) == 1


def test_those_who_watch_operations_see_them() -> None:
    model, x = pruned(nn.Sequential(conv(3, 8), conv()), 0.7), torch.randn(2, 3, 16, 16)
    fast = accelerate(model, x, choices={"0": "dense", "1": "sparse"})
    for _ in range(4):
        fast(x)
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() > 0


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(3, 8), linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.body(x) * scale
        return self.head(y.mean((2, 3))), {"sum": y + 1, "size": y.shape[-1]}


def test_structures_and_tensors_without_dimensions() -> None:
    model = pruned(Several(), 0.7)
    fast = recorded(model, torch.randn(2, 3, 16, 16), torch.tensor(2.0))
    assert programs(fast)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor(-3.0)
    assert fast(*inputs)[1]["size"] == 16
    check(fast, model, inputs)


class Peak(nn.Module):
    """Keeps the largest value that it met."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = conv(3, 8)
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.peak.copy_(torch.maximum(self.peak, x.max()))
        return self.layer(x) + self.peak


def rows(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)[x[:, 0] > 0].sum(0)


def masked(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) * (x > 0).t_().t()


def split(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.tensor_split(layer(x), x.argmax(0)[:1] + 1)[0].sum(0)


def noisy(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.rrelu(layer(x)))


def constant(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) + layer(x.new_tensor([[float(i) for i in range(8)]] * 8))


def imaginary(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.view_as_complex(layer(x).view(8, 4, 2)).conj().imag * 1


def written(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.zeros(8, 8).scatter_(1, x.argmax(1, keepdim=True), 1.0) + layer(x)


def sparse_product(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.sparse.mm(torch.eye(8).to_sparse(), layer(x))


def of_integers(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) + x.argmax(1, keepdim=True) * 2


def added_to_input(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer(x).add_(x), x


@pytest.mark.parametrize(
    "function",
    [
        *(rows, masked, split, noisy, constant, imaginary, written, sparse_product),
        *(of_integers, added_to_input),
    ],
)
def test_what_a_list_of_steps_would_get_wrong(function: Callable[..., Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return function(x, self.layer)

    model, x = pruned(Net(), 0.5), torch.randn(8, 8)
    fast = all_sparse(model, x)
    for _ in range(5):
        check(fast, model, (torch.randn(8, 8),))


def test_a_model_with_a_state_goes_on() -> None:
    model, x = pruned(Peak(), 0.7), torch.zeros(1, 3, 16, 16)
    fast = all_sparse(model, x)
    for i in range(5):
        check(fast, model, (torch.rand(1, 3, 16, 16) + i,))
    assert not programs(fast)


def test_attention_and_random_numbers_are_repeated() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = linear(8, 24), linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(y), torch.rand_like(y)

    model, x = pruned(Attends(), 0.5), torch.randn(2, 5, 8)
    program = Program(torch.fx.symbolic_trace(model), [x], None)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        (found, first), (_, second) = program([x]), program([x])
        torch.testing.assert_close(found, model(x)[0])
    assert not torch.equal(first, second)


def test_integers_are_not_recorded() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 8), linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.table(ids))

    model = pruned(Words(), 0.5)
    fast = all_sparse(model, torch.randint(9, (2, 5)))
    for _ in range(4):
        check(fast, model, (torch.randint(9, (2, 5)),))
    assert not programs(fast)


def test_a_parameter_may_be_moved() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = conv(3, 8), nn.Parameter(torch.rand(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    model, x = pruned(Scaled(), 0.7), torch.randn(1, 3, 16, 16)
    fast = recorded(model, x)
    assert programs(fast)
    fast.share_memory()
    for _ in range(3):
        check(fast, model, (torch.randn(1, 3, 16, 16),))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("batch", [2, 7, 12])
@pytest.mark.parametrize("make", [Residual, Centred])
def test_parts_of_a_batch(
    make: Callable[[], nn.Module], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned(make(), 0.7)
    fast = all_sparse(model, torch.zeros(batch, 3, 16, 16))
    one = recorded(model, torch.zeros(1, 3, 16, 16))
    monkeypatch.setattr(_program, "MOST_IN_CACHE", 3 * programs(one)[0].size)
    for _ in range(2):
        fast(torch.zeros(batch, 3, 16, 16))  # whose images are alike
    (program,) = programs(fast)
    parts = {2: None, 7: 1, 12: 3}[batch] if make is Residual else None
    assert program._part == parts
    for _ in range(2):
        check(fast, model, (torch.randn(batch, 3, 16, 16),))
    seconds = program.seconds()
    assert set(seconds) - {""} == set(fast.choices)
    assert all(value > 0 for value in seconds.values())


def test_what_takes_too_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_program, "MOST_FLOATS", 1000)
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast = recorded(model, x)
    assert not programs(fast)
    check(fast, model, (x,))


def test_only_so_many_forms_are_remembered() -> None:
    model = pruned(nn.Sequential(conv(3, 8)), 0.7)
    fast = all_sparse(model, torch.randn(1, 3, 8, 8))
    for _ in range(3):
        for size in range(8, 8 + 2 * MOST_PROGRAMS):
            for _ in range(3):
                check(fast, model, (torch.randn(1, 3, size, 8),))
    assert len(fast._programs._found) == MOST_PROGRAMS


def test_the_number_of_threads_may_change() -> None:
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast, before = recorded(model, x), torch.get_num_threads()
    try:
        for threads in (2, 1, 2, 1, 2):
            torch.set_num_threads(threads)
            check(fast, model, (torch.randn(2, 3, 32, 32),))
    finally:
        torch.set_num_threads(before)


def test_copies_record_anew() -> None:
    model, x = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32)
    fast = recorded(model, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not programs(other)
        for _ in range(3):
            check(other, model, (torch.randn(2, 3, 32, 32),))
        assert programs(other)[0] is not programs(fast)[0]


def test_several_threads_at_once() -> None:
    model = pruned(Residual(), 0.7)
    inputs = [torch.randn(2, 3, 24 + 8 * (i % 2), 32) for i in range(4)]
    expected = [call(model, (x,)) for x in inputs]
    fast, faults = all_sparse(model, inputs[0]), []

    def work(i: int) -> None:
        try:
            for _ in range(20):
                assert_same(tree_leaves(fast(inputs[i])), tree_leaves(expected[i]))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x.add_(1),
        lambda x: x.relu().t_(),
        lambda x: (x > 0) * x,
        lambda x: x.unique(),
        lambda x: x * (1 if bool((x > 0).any()) else 2),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_cannot_be_repeated(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3)
    with pytest.raises(NotRepeatableError), Recording(MOST):
        function(x)
    assert STATE.recording is None


def test_functions_that_torch_does_not_see() -> None:
    def graph(function: Callable[[Tensor], Any]) -> torch.fx.GraphModule:
        made, root = torch.fx.Graph(), nn.Module()
        made.output(made.call_function(function, (made.placeholder("x"),)))
        return torch.fx.GraphModule(root, made)

    assert is_repeatable(graph(torch.relu))
    assert not is_repeatable(graph(lambda x: torch.from_numpy(x.numpy() + 1)))
    assert not is_repeatable(nn.ReLU())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), max_size=60), seeds)
def test_an_arena_gives_no_memory_twice(steps: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    arena, live = Arena(MOST), []
    for count, dropped in steps:
        x = arena.take(count)[:count]
        x.copy_(torch.randn(count))
        live.append((x, x.clone()))
        for other, values in live:
            assert torch.equal(other, values)
            unclaimed = arena.unclaimed(other[1:])
            assert torch.equal(unclaimed, values[1:])
        del live[:dropped]
        x = other = None  # type: ignore[assignment]
        gc.collect(0)
    assert arena.size <= sum(max(count, 1) for count, _ in steps)


def test_an_arena_uses_memory_again() -> None:
    x = torch.randn(1, 8, 32, 32)
    layers = [pruned(conv(8, 8), 0.7) for _ in range(12)]
    few, many = (recorded(nn.Sequential(*layers[:n]).eval(), x) for n in (3, 12))
    assert programs(many)[0].size == programs(few)[0].size


def test_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of Python's are no part of a program, which would call what is not there."""
    without = dataclasses.replace(_call.engine(), parallel=0)
    for module in (_call, _filters, _map_modules, _elementwise, _program):
        monkeypatch.setattr(module, "engine", lambda: without)
    monkeypatch.setattr(_call, "SMALL", 100)
    model, x, before = pruned(Residual(), 0.7), torch.randn(2, 3, 32, 32), torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            fast = recorded(model, x)
            assert bool(programs(fast)) == (threads == 1)
            check(fast, model, (torch.randn(2, 3, 32, 32),))
    finally:
        torch.set_num_threads(before)


def test_parts_lie_in_memory_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_program, "MOST_IN_CACHE", 1)
    model = pruned(nn.Sequential(conv(3, 8), nn.ReLU(), conv()), 0.7)
    x = torch.randn(6, 3, 16, 16).to(memory_format=torch.channels_last)
    fast = accelerate(model, x, choices={"0": "sparse", "2": "dense"})
    before = [fast(x).stride() for _ in range(3)]
    assert programs(fast)[0]._part == 1
    assert len({*before}) == 1
    check(fast, model, (x,))


def test_numbers_about_the_batch_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv(3, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return self.layer(x), x.shape[0]

    monkeypatch.setattr(_program, "MOST_IN_CACHE", 1)
    model, x = pruned(Counts(), 0.7), torch.randn(6, 3, 16, 16)
    fast = recorded(model, x)
    assert fast(x)[1] == 6


@pytest.mark.parametrize(
    "size",
    [
        lambda x: x.shape[2:],
        lambda x: (x.shape[2:][0], x.shape[2:][1]),
        lambda x: (x.shape[-2], x.size()[3]),
    ],
)
def test_sizes_of_images_are_no_numbers_about_the_batch(
    size: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders enlarge maps to the sizes of those of the encoder."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.out = nn.Conv2d(3, 8, 3, 2, 1), conv(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.interpolate(self.down(x), size=size(x), mode="bilinear"))

    monkeypatch.setattr(_program, "MOST_IN_CACHE", 1)
    model, x = pruned(Decoder(), 0.7), torch.randn(4, 3, 18, 15)
    fast = recorded(model, x)
    assert programs(fast)[0]._part == 1
    check(fast, model, (torch.randn(4, 3, 18, 15),))


def extreme(x: Tensor) -> Tensor:
    return x / x.abs().max().clamp(min=10)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def ranked(x: Tensor) -> Tensor:
    return x.softmax(0)


@pytest.mark.parametrize("function", [extreme, standardised, ranked, lambda x: x.flip(0)])
def test_images_that_see_each_other_stay_together(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(function(x))

    monkeypatch.setattr(_program, "MOST_IN_CACHE", 1)
    model = pruned(Net(), 0.7)
    fast = all_sparse(model, torch.zeros(4, 3, 16, 16))
    for i in range(5):
        check(fast, model, (30 * torch.rand(4, 3, 16, 16) * i + 0.1,))
    assert not keeps_images_apart(fast.module)


def test_forms_that_change_all_the_time_are_not_recorded() -> None:
    fast = all_sparse(pruned(nn.Sequential(conv(3, 8)), 0.7), torch.randn(1, 3, 8, 8))
    for size in range(8, 8 + 3 * MOST_PROGRAMS):
        for _ in range(2):
            fast(torch.randn(1, 3, size, 8))
    assert not programs(fast)


def test_constant_indices_are_repeated() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = linear(8, 8), nn.Parameter(torch.randn(5, 8))
            self.register_buffer("index", torch.tensor([4, 0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table[self.index]

    model, x = pruned(Biased(), 0.5), torch.randn(3, 8)
    fast = recorded(model, x)
    assert programs(fast)
    check(fast, model, (torch.randn(3, 8),))
