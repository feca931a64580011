"""The rows of the conformance matrix: what people do to a model, and frameworks that train it."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import (
    STAGES,
    STEPS,
    TARGET,
    Loop,
    Row,
    Run,
    adam,
    plain_loop,
    prepare,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import TwoTasks, batch

# --- what is done -------------------------------------------------------------------------------


def on_copy(copier: Callable[[Any], Any], *, forward: bool = False) -> Callable[[Run], Run]:
    """Go on with a copy of model and optimiser."""

    def act(run: Run) -> Run:
        if forward:
            run.loss(0)
            run = replace(run, net=copier(run.net))  # and a copy of the copy
            run.optimizer = _like(run.optimizer, run.net)
        net = copier(run.net)
        return Run(
            net, getattr(net, "adapmtl", None), _like(run.optimizer, net), run.step, names=run.names
        )

    return act


def _like(optimizer: torch.optim.Optimizer, net: nn.Module) -> torch.optim.Optimizer:
    other = adam(net)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def _pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def _saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def loaded(**options: Any) -> Callable[[Run], Run]:
    """Go on with a freshly prepared model that loads the saved state."""

    def act(run: Run) -> Run:
        buffer = io.BytesIO()
        torch.save((run.net.state_dict(), run.optimizer.state_dict()), buffer)
        state, optimizer = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        torch.manual_seed(1)
        net = TwoTasks()
        pruner = None if run.pruner is None else prepare(net)
        net.load_state_dict(state, strict=True, **options)
        again = adam(net)
        again.load_state_dict(optimizer)
        return Run(net, pruner, again, run.step, names=run.names)

    return act


def to_and_back(run: Run) -> Run:
    run.net.to(torch.float64)
    run.net(batch(0)[0].double())
    run.net.to(torch.float32)
    return run


def to_dtype(dtype: torch.dtype) -> Callable[[Run], Run]:
    def act(run: Run) -> Run:
        run.net.to(dtype)
        run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.1)
        run.call = lambda x: run.net(x.to(dtype))
        return run

    return act


def to_cuda(run: Run) -> Run:
    run.net.cuda()
    run.optimizer = adam(run.net)
    run.call = lambda x: {task: out.cpu() for task, out in run.net(x.cuda()).items()}
    return run


def compiled(run: Run) -> Run:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        assert len(graphs) <= 3, "compiled anew as the budget moves"
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    run.call = torch.compile(run.net, backend=backend, fullgraph=True)
    return run


def autocast_loop(run: Run, steps: int) -> None:
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run.loss(run.step)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.advance()


def scaler_loop(fused: bool) -> Loop:
    """Float16 with a scaler, of whose steps every fourth overflows: attached, they do not count."""

    def loop(run: Run, steps: int) -> None:
        optimizer = torch.optim.Adam(run.net.parameters(), lr=1e-2, fused=fused)
        if run.pruner is not None:
            run.pruner.attach(optimizer)
            run.attached = True
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
        taken = index = 0
        while taken < steps:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = run.loss(run.step)
            overflows = index % 4 == 1
            scaler.scale(loss * torch.inf if overflows else loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**4)
            optimizer.zero_grad()
            index += 1
            if not overflows:
                taken += 1
                run.advance()
                if run.pruner is not None and not fused:  # else known at the next update
                    assert run.pruner.report().step == min(run.step, STEPS)

    return loop


def accumulating_loop(run: Run, steps: int) -> None:
    for _ in range(steps):
        for part in range(4):
            (run.loss(4 * run.step + part) / 4).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.advance()


def clipping_loop(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.loss(run.step).backward()
        nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
        nn.utils.clip_grad_value_(run.net.parameters(), 0.01)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.advance()


class Checkpointed(TwoTasks):
    """The same, with activations computed again in the backward pass."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.utils.checkpoint.checkpoint(lambda x: self.body(x).tanh(), x, use_reentrant=False)
        return {task: head(h) for task, head in self.heads.items()}


def two_optimizers_loop(run: Run, steps: int) -> None:
    heads = [p for name, p in run.net.named_parameters() if name.startswith("heads")]
    body = [p for name, p in run.net.named_parameters() if name.startswith("body")]
    optimizers = [torch.optim.SGD(body, lr=0.1), torch.optim.Adam(heads, lr=1e-2)]
    for _ in range(steps):
        run.loss(run.step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.advance()


def lbfgs_loop(run: Run, steps: int) -> None:
    # In small steps: its idea of the curvature is of thresholds that have moved on since.
    optimizer = torch.optim.LBFGS(run.net.parameters(), lr=0.01, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = run.loss(run.step)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        run.advance()


def optimizer_loop(**options: Any) -> Loop:
    def loop(run: Run, steps: int) -> None:
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=1e-2, **options)
        plain_loop(run, steps)

    return loop


def freezing_loop(run: Run, steps: int) -> None:
    for step in range(steps):
        run.net.get_submodule("body").requires_grad_(step % 4 >= 2)
        plain_loop(run, 1)
    run.net.requires_grad_(True)


def functional(run: Run) -> Run:
    x = batch(3)[0]
    values = {**dict(run.net.named_parameters()), **dict(run.net.named_buffers())}
    again = torch.func.functional_call(run.net, values, (x,))
    assert all(torch.equal(out, again[task]) for task, out in run.net(x).items())

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(run.net, parameters, (x,))["a"].square().mean()

    parameters = dict(run.net.named_parameters())
    gradients = torch.func.grad(objective)(parameters)
    objective(parameters).backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            # Only gradients in `grad` are masked.
            found = torch.where(parameter != 0, gradients[name], parameter.grad)
            torch.testing.assert_close(found, parameter.grad)
    run.net.zero_grad()
    return run


def mapped(run: Run) -> Run:
    x = batch(3)[0]
    each = torch.func.vmap(lambda row: run.net(row)["a"])(x)
    torch.testing.assert_close(each, run.net(x)["a"])
    twins = [copy.deepcopy(run.net) for _ in range(2)]
    stacked = torch.func.stack_module_state(twins)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(twins[0], (parameters, buffers), (x,))["a"]

    for out in torch.func.vmap(call)(*stacked):
        torch.testing.assert_close(out, run.net(x)["a"])
    return run


def averaged(make: Callable[[nn.Module], Any], update: str) -> Loop:
    """Train, and check that the average ends as sparse."""

    def loop(run: Run, steps: int) -> None:
        average = make(run.net)
        for _ in range(steps):
            plain_loop(run, 1)
            getattr(average, update)(run.net)
        own = replace(run, net=average.module)
        if run.pruner is not None:
            handle = average.module.adapmtl
            handle.load_state_dict(run.pruner.state_dict())
            handle.finalize()
        assert own.zeros() == run.zeros()

    return loop


def _timm_average(net: nn.Module) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(net, decay=0.5)


def _torch_average(net: nn.Module) -> Any:
    swa = torch.optim.swa_utils
    return swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5))


def exported(run: Run) -> Run:
    x = batch(3)[0]
    program = torch.export.export(run.net.eval(), (x,))
    for task, out in program.module()(x).items():
        torch.testing.assert_close(out, run.net(x)[task])
    run.net.train()
    return run


def to_onnx(run: Run) -> Run:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = batch(3)[0]
    expected = run.net.eval()(x)
    with quiet():
        program = torch.onnx.export(run.net, (x,), dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for out, want in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(out), want.detach(), rtol=1e-5, atol=1e-6)
    run.net.train()
    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_norm(run: Run) -> Run:
    """A parametrization of the user's, on top."""
    body = run.net.get_submodule("body")
    parametrizations.spectral_norm(body)
    return run


def with_weight_norm(run: Run) -> Run:
    parametrizations.weight_norm(run.net.get_submodule("body"))
    return run


def normed() -> nn.Module:
    net = TwoTasks()
    parametrizations.spectral_norm(net.body)
    return net


def weight_normed() -> nn.Module:
    net = TwoTasks()
    parametrizations.weight_norm(net.body)
    return net


def masked_before() -> nn.Module:
    net = TwoTasks()
    prune.random_unstructured(net.body, "weight", amount=0.5)
    return net


def masked_now(run: Run) -> Run:
    prune.l1_unstructured(run.net.get_submodule("body"), "weight", amount=0.5)
    return run


class TwoHeads(nn.Module):
    """An encoder of Hugging Face's with two heads, on the toy's inputs."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=10, max_position_embeddings=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embedded = nn.functional.pad(x, (0, 2)).unsqueeze(1)
        h = self.bert(inputs_embeds=embedded).last_hidden_state[:, 0]
        return {task: head(h) for task, head in self.heads.items()}


# --- frameworks ---------------------------------------------------------------------------------


def lightning_loop(run: Run, steps: int) -> None:
    import lightning.pytorch as pl

    from torch_adapmtl.lightning import AdapMTLCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.net

        def training_step(self, _: Any, index: int) -> Tensor:
            return run.loss(run.step + index)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return run.optimizer

    callbacks = [] if run.pruner is None else [AdapMTLCallback(target_sparsity=TARGET)]
    with quiet():
        pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        ).fit(Module(), torch.utils.data.DataLoader(range(steps)))  # fmt: skip
    run.step += steps


def accelerate_loop(run: Run, steps: int) -> None:
    import accelerate

    with quiet():
        accelerator = accelerate.Accelerator(cpu=True)
    run.call, optimizer = accelerator.prepare(run.net, run.optimizer)
    if run.pruner is not None:
        run.pruner.attach(optimizer)
        run.attached = True
    for _ in range(steps):
        accelerator.backward(run.loss(run.step))
        optimizer.step()
        optimizer.zero_grad()
        run.advance()


def tensorboard_loop(run: Run, steps: int) -> None:
    with quiet():
        from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for _ in range(steps):
            plain_loop(run, 1)
            if run.pruner is not None:
                for name, value in run.pruner.report().scalars().items():
                    writer.add_scalar(name, value, run.step)


# --- the rows -----------------------------------------------------------------------------------

ROWS: dict[str, Row] = {
    "`copy.deepcopy`": Row(on_copy(copy.deepcopy), same=True),
    "`copy.deepcopy` of a copy, after a forward pass": Row(on_copy(copy.deepcopy, forward=True)),
    "`pickle`": Row(on_copy(_pickled), same=True),
    "`torch.save` of the model": Row(on_copy(_saved, forward=True)),
    "`state_dict` into a freshly prepared model, `weights_only=True`": Row(loaded(), same=True),
    "`load_state_dict(assign=True)`": Row(loaded(assign=True), same=True),
    "to another device": Row(to_cuda),
    "`.double()` and back": Row(to_and_back, same=True),
    "`.bfloat16()`": Row(to_dtype(torch.bfloat16)),
    "`.half()`": Row(to_dtype(torch.float16)),
    "`torch.compile(fullgraph=True)`": Row(compiled),
    "autocast to bfloat16": Row(loop=autocast_loop),
    "float16 with `GradScaler`, attached": Row(loop=scaler_loop(fused=False)),
    "the same with a fused optimiser": Row(loop=scaler_loop(fused=True)),
    "gradient accumulation": Row(loop=accumulating_loop),
    "gradient clipping": Row(loop=clipping_loop),
    "activation checkpointing": Row(make=Checkpointed),
    "several optimisers": Row(loop=two_optimizers_loop),
    "LBFGS with a closure": Row(loop=lbfgs_loop),
    "fused optimiser": Row(loop=optimizer_loop(fused=True)),
    "foreach optimiser": Row(loop=optimizer_loop(foreach=True)),
    "parameters frozen and unfrozen": Row(loop=freezing_loop),
    "`torch.func.functional_call` and `grad`": Row(functional, same=True),
    "`torch.func.vmap`, over samples and models": Row(mapped, same=True),
    "`swa_utils.AveragedModel`": Row(loop=averaged(_torch_average, "update_parameters"), same=True),
    "timm's `ModelEmaV3`": Row(loop=averaged(_timm_average, "update"), same=True, needs="timm"),
    "Lightning": Row(loop=lightning_loop, same=True, needs="lightning"),
    "Accelerate": Row(loop=accelerate_loop, same=True, needs="accelerate"),
    "TensorBoard scalars": Row(loop=tensorboard_loop, same=True, needs="tensorboard"),
    "`torch.export`": Row(exported, same=True),
    "ONNX, in ONNX Runtime": Row(to_onnx, same=True, needs="onnxruntime"),
    "a parametrization put on top (`spectral_norm`)": Row(with_norm),
    "a parametrization that was there (`spectral_norm`)": Row(make=normed),
    "`weight_norm` put on top": Row(
        with_weight_norm,
        raises={
            **dict.fromkeys(
                STAGES[:3],
                (RuntimeError, "'body.weight' is no longer a parameter .*before apply_adapmtl"),
            ),
            STAGES[3]: (ValueError, "_WeightNorm makes it from several .*remove_parametrizations"),
        },
    ),
    "`weight_norm` that was there": Row(make=weight_normed),
    "masks of `torch.nn.utils.prune` that were there": Row(make=masked_before),
    "`torch.nn.utils.prune` put on top": Row(
        masked_now,
        raises=dict.fromkeys(
            STAGES[:3],
            (RuntimeError, "'body.weight' was masked by .*torch.nn.utils.prune.remove"),
        ),
    ),
    "Hugging Face encoder with two heads": Row(make=TwoHeads, needs="transformers"),
}
