"""The callback for Lightning trains, resumes and logs like the plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import EARLY, assert_like, plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import TwoTasks, batch

from torch_adapmtl import Adaptive, Paper, plain_state_dict


@pytest.fixture
def _their_warnings() -> Iterator[None]:
    """Frameworks warn of what is none of our business: workers, folders, their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batches(number: int) -> TensorDataset:
    """The batches of the toy, as a data set of samples in order."""
    found = [batch(step) for step in range(number)]
    return TensorDataset(
        torch.cat([x for x, _ in found]),
        torch.cat([y["a"] for _, y in found]),
        torch.cat([y["b"] for _, y in found]),
    )


def lightning_module(model: nn.Module) -> Any:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, rows: list[Tensor], _: int) -> Tensor:
            x, a, b = rows
            out = self.model(x)
            found = {"a": (out["a"] - a).square().mean(), "b": (out["b"] - b).square().mean()}
            return self.model.adapmtl.loss(found)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.adapmtl.param_groups(lr=1e-2))

    return Module()


def fit(module: Any, folder: Path, steps: int, accumulate: int = 1, **options: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    from torch_adapmtl.lightning import AdapMTLCallback

    callback = AdapMTLCallback(
        **{"target_sparsity": 0.8, "method": Adaptive(schedule=EARLY),
           "weighting": "stability", "example_inputs": torch.ones(2, 6),
           **options.pop("callback", {})},
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[callback], **options.pop("trainer", {}),
    )  # fmt: skip
    loader = DataLoader(batches(options.pop("number", 20 * accumulate)), batch_size=8)
    trainer.fit(module, loader, **options)
    return trainer


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_trains_like_the_plain_loop(accumulate: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    optimizer = fit(lightning_module(model), tmp_path, 20, accumulate).optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert model.adapmtl.finalize() is model
    assert_like(model, plain(20, accumulate))


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("stop", [7, 16])
def test_lightning_resumes(stop: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # One batch an epoch: in the middle of one, Lightning starts the data anew.
    run: dict[str, Any] = {"callback": {"total_steps": 20}, "number": 1}
    first = fit(lightning_module(TwoTasks()), tmp_path, stop, **run)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    model = TwoTasks()
    fit(lightning_module(model), tmp_path, 20, ckpt_path=tmp_path / "stopped.ckpt", **run)
    model.adapmtl.finalize()
    assert_like(model, plain(20, same=True))


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("method", [Adaptive(schedule=EARLY), Paper(start=-3.0)], ids=str)
def test_a_checkpoint_of_a_run_loads_into_a_plain_module(method: Any, tmp_path: Path) -> None:
    base: Any = type(lightning_module(TwoTasks()))

    class Loadable(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = TwoTasks()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # as documented
            if not hasattr(self.model, "adapmtl"):
                checkpoint["state_dict"] = plain_state_dict(checkpoint["state_dict"])

    trained = Loadable()
    options: dict[str, Any] = {"callback": {"total_steps": 20, "method": method}}
    fit(trained, tmp_path, 12, **options).save_checkpoint(tmp_path / "stopped.ckpt")
    loaded = Loadable.load_from_checkpoint(tmp_path / "stopped.ckpt")
    x = torch.randn(4, 6)
    expected, found = trained.model(x), loaded.model(x)
    assert all(torch.equal(found[task], expected[task]) for task in expected)
    resumed = Loadable()
    fit(resumed, tmp_path, 20, ckpt_path=tmp_path / "stopped.ckpt", **options)
    assert resumed.model.adapmtl.step_count == 20


@pytest.mark.usefixtures("_their_warnings")
def test_lightning_logs(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    model = TwoTasks()
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module = lightning_module(model)
    from lightning.pytorch import Trainer

    from torch_adapmtl.lightning import AdapMTLCallback

    callback = AdapMTLCallback(target_sparsity=0.8, example_inputs=torch.ones(2, 6))
    Trainer(
        max_steps=20, accelerator="cpu", logger=logger, log_every_n_steps=6,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback],
    ).fit(module, DataLoader(batches(20), batch_size=8))  # fmt: skip
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().split("\n")
    names = lines[0].split(",")
    assert {"sparsity/overall", "sparsity/shared", "sparsity/a", "task_weight/b"} <= set(names)
    assert {"threshold_min/shared", "threshold_max/a", "loss/a", "loss/b"} <= set(names)
    overall = [float(line.split(",")[names.index("sparsity/overall")]) for line in lines[1:-1]]
    assert len(overall) == 4
    assert overall[0] < overall[-1]
    assert overall[-1] == pytest.approx(round(0.8 * 168) / 168)


@pytest.mark.usefixtures("_their_warnings")
def test_what_the_callback_refuses(tmp_path: Path) -> None:
    module = lightning_module(TwoTasks())
    with pytest.raises(AttributeError, match=r"model: Module has no module 'net'; name the") as e:
        fit(module, tmp_path, 20, callback={"model": "net"})
    assert e.value.__context__ is None  # no second error while the trainer handles the first
    with pytest.raises(RuntimeError, match=r"total_steps: .* estimate .* is inf; pass total_steps"):
        fit(module, tmp_path, -1, trainer={"max_epochs": -1})
    assert not hasattr(module.model, "adapmtl")


@pytest.mark.usefixtures("_their_warnings")
def test_several_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Manual(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = TwoTasks(), False

        def training_step(self, rows: list[Tensor], _: int) -> None:
            out = self.model(rows[0])
            found = {task: out.square().mean() for task, out in out.items()}
            self.manual_backward(self.model.adapmtl.loss(found))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            parts = (self.model.body, self.model.heads)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    with pytest.raises(RuntimeError, match=r"its 2 optimizers together; pass total_steps="):
        fit(Manual(), tmp_path, 40)
    module = Manual()
    fit(module, tmp_path, 40, callback={"total_steps": 20})
    assert module.model.adapmtl.report().step == 20
    module.model.adapmtl.finalize()


@pytest.mark.usefixtures("_their_warnings")
def test_a_module_that_is_the_model_trains_in_two_goes(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Whole(TwoTasks, pl.LightningModule):  # type: ignore[misc, name-defined]
        def training_step(self, rows: list[Tensor], _: int) -> Tensor:
            return self.adapmtl.loss({t: out.square().mean() for t, out in self(rows[0]).items()})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Whole()
    for steps in (8, 12):
        fit(module, tmp_path, steps, callback={"model": None, "total_steps": 20})
    assert module.adapmtl.report().step == 20
    assert module.adapmtl.finalize() is module


@pytest.mark.usefixtures("_their_warnings")
def test_what_is_not_prepared_or_finalized_is_left_alone(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from torch_adapmtl.lightning import AdapMTLCallback

    callback = AdapMTLCallback(target_sparsity=0.8, example_inputs=torch.ones(2, 6), total_steps=20)
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "callbacks": [callback],
    }  # fmt: skip

    class Tested(type(lightning_module(TwoTasks()))):  # type: ignore[misc]
        def test_step(self, rows: list[Tensor], index: int) -> None:
            self.model(rows[0])

    plain_module, trained = Tested(), Tested()
    plain_module.model, trained.model = TwoTasks(), TwoTasks()
    loader = DataLoader(batches(20), batch_size=8)
    pl.Trainer(**options).test(plain_module, loader, verbose=False)
    assert not hasattr(plain_module.model, "adapmtl")

    pl.Trainer(max_steps=20, **options).fit(trained, loader)
    trained.model.adapmtl.finalize()
    pl.Trainer(**options).test(trained, loader, verbose=False)
    assert not hasattr(trained.model, "adapmtl")


@pytest.mark.usefixtures("_their_warnings")
def test_data_that_the_module_makes_too_late(tmp_path: Path) -> None:
    module = lightning_module(TwoTasks())
    module.train_dataloader = lambda: module.data  # made in setup
    pl = pytest.importorskip("lightning.pytorch")
    from torch_adapmtl.lightning import AdapMTLCallback

    callback = AdapMTLCallback(target_sparsity=0.8, example_inputs=torch.ones(2, 6))
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"not known before setup\(\) .*pass total_steps="):
        trainer.fit(module)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A trainer without anything that writes or prints."""
    pl = pytest.importorskip("lightning.pytorch")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)


def pruning(**options: Any) -> Any:
    from torch_adapmtl.lightning import AdapMTLCallback

    return AdapMTLCallback(
        **{"target_sparsity": 0.8, "example_inputs": torch.ones(2, 6), **options}
    )


def zeros_of(model: TwoTasks) -> int:
    """The zeros of the weights that are pruned."""
    return sum(int((layer.weight == 0).sum()) for layer in (model.body, *model.heads.values()))


@pytest.mark.usefixtures("_their_warnings")
@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_lightning_come_after_the_callback(average: str, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    made = getattr(pl.callbacks, average, None)
    if made is None:
        pytest.skip("this Lightning has no such average")
    options = {"swa_lrs": 1e-3} if average.startswith("Stochastic") else {}
    loader = DataLoader(batches(10), batch_size=8)
    module = lightning_module(TwoTasks())
    with pytest.raises(RuntimeError, match=rf"{average} .* list AdapMTLCallback before it"):
        trainer(tmp_path, made(**options), pruning(), max_epochs=4).fit(module, loader)
    assert not hasattr(module.model, "adapmtl")
    trainer(tmp_path, pruning(), made(**options), max_epochs=4).fit(module, loader)
    model = module.model.adapmtl.finalize()
    assert zeros_of(model) == round(0.8 * 168)


@pytest.mark.usefixtures("_their_warnings")
def test_layers_that_are_frozen_at_first_are_pruned(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class HeadsFirst(pl.callbacks.BaseFinetuning):  # type: ignore[misc, name-defined]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.model.body)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.model.body, optimizer)

    loader = DataLoader(batches(10), batch_size=8)
    module = lightning_module(TwoTasks())
    module.configure_optimizers = lambda: torch.optim.SGD(module.model.heads.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match=r"HeadsFirst has frozen .*list AdapMTLCallback before"):
        trainer(tmp_path, HeadsFirst(), pruning(), max_epochs=4).fit(module, loader)
    module.model.requires_grad_(True)
    trainer(tmp_path, pruning(), HeadsFirst(), max_epochs=4).fit(module, loader)
    assert zeros_of(module.model.adapmtl.finalize()) == round(0.8 * 168)


@pytest.mark.usefixtures("_their_warnings")
def test_one_callback_for_two_models_logs_both(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    callback = pruning()
    for run in range(2):
        logger = CSVLogger(tmp_path, version=run, flush_logs_every_n_steps=1)
        options = {"logger": logger, "max_steps": 10, "log_every_n_steps": 10}
        module = lightning_module(TwoTasks())
        trainer(tmp_path, callback, **options).fit(module, DataLoader(batches(10), batch_size=8))
        assert len((Path(logger.log_dir) / "metrics.csv").read_text().split()) == 2


def test_a_run_that_ends_early_says_so(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 2})
    loader = DataLoader(batches(10), batch_size=8)

    def warnings_of(*callbacks: Any, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, *callbacks, **options).fit(lightning_module(TwoTasks()), loader)
        return [str(w.message) for w in caught if "total_steps" in str(w.message)]

    (early,) = warnings_of(pruning(), scheduler, max_epochs=4)
    assert "ended after 30 of total_steps=40" in early
    assert "is not at its target" in early
    assert not warnings_of(pruning(), max_epochs=4)
    assert not warnings_of(pruning(total_steps=80), max_epochs=4)  # as the user says
