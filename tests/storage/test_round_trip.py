"""What is loaded is what was saved, bit by bit, and so it is for other readers of the format."""

from __future__ import annotations

import ast
import io
import json
import os
import stat
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_reader import assert_same_bits, bits, code, read_sparse
from torch import Tensor

from torch_adapmtl import SparseFile, load_sparse, save_sparse
from torch_adapmtl.storage import _blocks
from torch_adapmtl.storage import save as save_module
from torch_adapmtl.storage._blocks import PLANES, decode, encode
from torch_adapmtl.storage._safetensors import CODES

STRANGE = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 65504.0, 1.0)
SPARSITIES = (0.0, 0.02, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0)


def any_bits(dtype: torch.dtype, count: int, sparsity: float) -> Tensor:
    """A tensor of random bits, NaNs with payloads among them, with that share of zeros."""
    if dtype is torch.bool:
        return torch.rand(count) >= sparsity
    x = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    gone = torch.rand(count) < sparsity
    x.view(torch.uint8).view(count, dtype.itemsize)[gone] = 0
    return x


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(found), bits(expected))


@given(
    st.sampled_from(list(CODES)),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(SPARSITIES),
    st.integers(0, 999),
)
def test_all_bits_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    sparsity: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    count = int(np.prod(shape, dtype=int))
    given = {
        "x": any_bits(dtype, count, sparsity).view(shape),
        "long": any_bits(dtype, 5000, sparsity),
        "small": any_bits(dtype, 70, sparsity).view(7, 10),
        "float": torch.randn(3),
    }
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_sparse(given, path)
    found, plain = load_sparse(path), read_sparse(str(path))
    assert list(found) == list(given)
    for name, x in given.items():
        assert_equal(found[name], x)
        assert_same_bits(plain[name], x)


@given(
    st.sampled_from(list(PLANES)),
    st.integers(0, 3000),
    st.sampled_from(SPARSITIES),
    st.integers(1, 900),
    st.integers(0, 999),
)
def test_blocks_of_any_size(
    dtype: torch.dtype, count: int, sparsity: float, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = any_bits(dtype, count, sparsity)
    pieces = []
    for part in x.split(size) if count else ():
        block, contents = encode(part)
        data = io.BytesIO(b"".join(contents))
        assert len(data.getvalue()) == block.size
        pieces.append(decode(block, dtype, data.read))
        assert not data.read()
    assert_equal(torch.cat([x[:0], *pieces]), x)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 2000])
def test_gaps_around_what_a_byte_holds(gap: int, tmp_path: Path) -> None:
    x = torch.zeros(20 * (gap + 1) + 3000)
    x[gap :: gap + 1][:20] = torch.randn(20)
    save_sparse({"x": x}, tmp_path / "x")
    assert_equal(load_sparse(tmp_path / "x")["x"], x)
    assert_same_bits(read_sparse(str(tmp_path / "x"))["x"], x)


@pytest.mark.parametrize("dtype", [t for t in PLANES if t.is_floating_point])
def test_numbers_that_are_not_finite_or_negative_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor(STRANGE, dtype=dtype)
    x = values[torch.randint(len(STRANGE), (5000,))] * (torch.rand(5000) < 0.3)
    assert SparseFile.read(save(x, tmp_path)).tensors[0].blocks
    assert_equal(load_sparse(tmp_path / "x")["x"], x)


def save(x: Tensor, folder: Path) -> Path:
    save_sparse({"x": x}, folder / "x")
    return folder / "x"


def test_tensors_larger_than_a_block(tmp_path: Path) -> None:
    x = torch.randn(2 * _blocks.BLOCK + 5) * (torch.rand(2 * _blocks.BLOCK + 5) < 0.1)
    x[_blocks.BLOCK : 2 * _blocks.BLOCK] = 0
    assert_equal(load_sparse(save(x, tmp_path))["x"], x)
    assert_same_bits(read_sparse(str(tmp_path / "x"))["x"], x)


def test_memory_formats_and_views(tmp_path: Path) -> None:
    base = torch.randn(8, 6, 10, 10) * (torch.rand(8, 6, 10, 10) < 0.1)
    given = {
        "last": base.to(memory_format=torch.channels_last),
        "view": base[:, ::2, 1:, 3],
        "transposed": base.transpose(0, 3),
        "expanded": torch.randn(1, 300).expand(7, 300),
        "negative": torch.randn(900, dtype=torch.complex64).conj().imag,
    }
    save_sparse(given, tmp_path / "x")
    for name, x in load_sparse(tmp_path / "x").items():
        assert torch.equal(x, given[name])


def test_views_that_change_the_sign_are_not_tied(tmp_path: Path) -> None:
    x, z = torch.randn(300), torch.randn(300, dtype=torch.complex64)
    given = {"x": x, "-x": torch._neg_view(x), "z": z, "z*": z.conj()}
    assert save_sparse(given, tmp_path / "x").tied == ()
    found = load_sparse(tmp_path / "x")
    assert all(torch.equal(found[name], y) for name, y in given.items())


def test_what_shares_memory_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    file = save_sparse({"a": weight, "b": weight, "part": weight[:50]}, tmp_path / "x")
    assert file.tied == (("b", "a"),)
    found = load_sparse(tmp_path / "x")
    assert found["a"] is found["b"]
    assert torch.equal(found["part"], weight[:50])
    assert read_sparse(str(tmp_path / "x")).keys() == found.keys()


def test_other_readers_see_the_entries(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    given = {
        "sparse": torch.eye(300),
        "dense": torch.randint(256, (70, 80), dtype=torch.uint8),
        "small": torch.ones(3),
    }
    save_sparse(given, tmp_path / "x")
    found = safetensors.load_file(tmp_path / "x")
    assert found["sparse"].dtype is torch.uint8
    assert torch.equal(found["dense"], given["dense"])
    assert torch.equal(found["torch_adapmtl.small.F32.0"], given["small"])


def test_the_header_says_what_is_stored(tmp_path: Path) -> None:
    file = save_sparse({"eye": torch.eye(300), "few": torch.ones(3)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    header = json.loads(content[8:start])
    metadata = header["__metadata__"]
    assert metadata["torch_adapmtl"] == "1"
    begin, end = header["torch_adapmtl.index"]["data_offsets"]
    index = json.loads(zlib.decompress(content[start + begin : start + end]))
    assert index["tensors"]["eye"]["shape"] == [300, 300]
    assert zlib.crc32(content[8:].replace(metadata["crc32"].encode(), b"0" * 8, 1)) == int(
        metadata["crc32"], 16
    )
    assert SparseFile.read(tmp_path / "x") == file
    assert file.size == len(content)
    eye, few = file.tensors
    assert (eye.left_out, eye.dense_size, few.blocks) == (300 * 299, 360_000, None)
    assert file.dense_size == 360_012
    assert json.loads(json.dumps(file.to_dict()))["tensors"][0]["left_out"] == 300 * 299


def test_the_reader_on_the_page_is_short() -> None:
    lines = [line for line in code().splitlines() if line.strip()]
    statements = [node for node in ast.walk(ast.parse(code())) if isinstance(node, ast.stmt)]
    assert len(statements) <= 60  # lines depend on the width of the page
    imported = {word for line in lines if "import" in line for word in line.split()[1:]}
    assert imported <= {"json,", "math,", "zlib", "numpy", "as", "np", "import"}


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(torch.eye(300), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        save(torch.ones(300), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "x").symlink_to(tmp_path / "real")
    save(torch.eye(9), tmp_path)
    assert (tmp_path / "x").is_symlink()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    assert torch.equal(load_sparse(tmp_path / "real")["x"], torch.eye(9))


@pytest.mark.parametrize("path", ["folder", "folder/", "pipe", ""])
def test_what_is_no_file_is_not_replaced(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"folder|regular"):
        save_sparse({"x": torch.ones(3)}, path)
    assert {x.name for x in tmp_path.iterdir()} == {"folder", "pipe"}
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", ["x" * 240, "名" * 80])
def test_long_names_and_paths_as_bytes(name: str, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / name)
    assert save_sparse({"x": torch.ones(3)}, path).path == str(tmp_path / name)
    assert load_sparse(path).keys() == {"x"}


@pytest.mark.parametrize(
    "name", ["", "a\nb", '"', "名", "../x", '"crc32":"00000000"', "\x1b]0;x\x07"]
)
def test_names_of_any_characters(name: str, tmp_path: Path) -> None:
    file = save_sparse({name: torch.eye(90)}, tmp_path / "x")
    assert load_sparse(tmp_path / "x").keys() == {name}
    assert file.table().replace("\n", "").isprintable()
    assert read_sparse(str(tmp_path / "x")).keys() == {name}


def test_many_small_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of several types that are full at different times."""
    monkeypatch.setattr(save_module, "FULL", 500)
    given = {}
    for i in range(60):
        dtype = (torch.float32, torch.int64, torch.bool)[i % 3]
        given[f"{i}"] = any_bits(dtype, i % 7 * 13, 0.5).view(-1, 13)
    save_sparse(given, tmp_path / "x")
    found, plain = load_sparse(tmp_path / "x"), read_sparse(str(tmp_path / "x"))
    assert list(found) == list(given)
    for name, x in given.items():
        assert_equal(found[name], x)
        assert_same_bits(plain[name], x)


def test_other_default_devices(tmp_path: Path) -> None:
    x = torch.zeros(9000)
    x[::700] = 1
    with torch.device("meta"):
        save_sparse(
            {"x": x, "y": torch.ones(90, 90, device="cpu")}, tmp_path / "x", dtype=torch.int8
        )
        found = load_sparse(tmp_path / "x")
    assert torch.equal(found["x"], x)


def test_a_file_that_is_written_while_another_thread_trains(tmp_path: Path) -> None:
    """The checksum is that of what was written, whatever the values are meanwhile."""
    x = torch.randint(256, (3_000_000,), dtype=torch.uint8)  # stored as it is
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            x.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            save_sparse({"x": x}, tmp_path / "x")
            assert load_sparse(tmp_path / "x")["x"].shape == x.shape
    finally:
        stop.set()
        thread.join()


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    x = torch.randn(3000) * (torch.rand(3000) < 0.5)
    first = save(x, tmp_path).read_bytes()
    assert save(x.clone(), tmp_path).read_bytes() == first
