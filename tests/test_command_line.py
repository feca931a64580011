"""The command line: the same files as the functions write, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_adapmtl import apply_adapmtl, load_sparse, save_sparse
from torch_adapmtl.__main__ import main


def state() -> dict[str, torch.Tensor]:
    weight = torch.randn(90, 80) * (torch.rand(90, 80) < 0.1)
    return {"weight": weight, "tied": weight, "bias": torch.randn(80)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_there_and_back(
    key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = state()
    torch.save(given if key is None else {"state_dict": given, "epoch": 3}, tmp_path / "model.pt")
    packed, out = str(tmp_path / "packed"), str(tmp_path / "out.pt")
    keys = [] if key is None else ["--key", key]
    assert main(["pack", str(tmp_path / "model.pt"), packed, *keys]) == 0
    assert "% of" in capsys.readouterr().out
    assert_same(load_sparse(packed), given)
    assert main(["unpack", packed, out]) == 0
    assert_same(torch.load(out, weights_only=True), given)


def test_a_checkpoint_of_a_run_is_packed_as_plain_weights(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    pruner = apply_adapmtl(model, target_sparsity=0.5, total_steps=9, groups={"main": ["*"]})
    pruner.fix_zeros()
    torch.save({"model": model.state_dict()}, tmp_path / "run.pt")
    packed = tmp_path / "packed"
    assert main(["pack", str(tmp_path / "run.pt"), str(packed), "--key", "model"]) == 0
    loaded = load_sparse(packed, nn.Linear(4, 4))
    assert torch.equal(loaded.weight, model.weight)


def test_files_of_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    save_sparse(state(), tmp_path / "x")
    assert main(["unpack", str(tmp_path / "x"), str(tmp_path / "y.safetensors")]) == 0
    assert_same(safetensors.load_file(tmp_path / "y.safetensors"), load_sparse(tmp_path / "x"))


def test_fewer_bits(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pt")
    arguments = ["pack", str(tmp_path / "model.pt"), str(tmp_path / "x"), "--dtype", "int8"]
    assert main(arguments) == 0
    given = torch.load(tmp_path / "model.pt")
    save_sparse(given, tmp_path / "y", dtype=torch.int8)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_sparse(state(), tmp_path / "x")
    assert main(["inspect", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{file}\n\n{file.table()}\n"
    assert main(["inspect", str(tmp_path / "x"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == file.to_dict()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (nn.Linear(2, 2), [], "save model.state_dict() instead of the model"),
        ([torch.ones(2)], [], "holds no state dict but a list: name its place with --key"),
        ({"model": {"w": torch.ones(2)}, "epoch": 3}, [], "but a dict with 'model', 'epoch': name"),
        ({"model": {"w": torch.ones(2)}}, ["--key", "net"], "has no 'net': a dict with 'model'"),
        (b"no file of torch.save", [], "is no file of torch.save"),
        (b"", [], "was cut off"),
        (b"hello world", [], "is no file of torch.save"),
    ],
)
def test_errors_are_one_line(
    content: object,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert main(["pack", str(path), str(tmp_path / "x"), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(tmp_path / "nothing")]) == 1


@pytest.mark.parametrize("out", ["nowhere/x.pt", "nowhere/x.safetensors", "."])
def test_files_that_cannot_be_written(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_sparse(state(), "x")
    assert main(["unpack", "x", out]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out} cannot be written: ")
    assert said.count("\n") == 1


def test_as_a_module(tmp_path: Path) -> None:
    save_sparse(state(), tmp_path / "x")
    command = [sys.executable, "-m", "torch_adapmtl", "inspect", str(tmp_path / "x")]
    assert "weight" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
