"""Files that are damaged, foreign or made to harm: one clear error, and the model is unchanged."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sealing import INDEX, parts, places, sealed, text_of, with_index
from torch import nn

from torch_adapmtl import SparseFile, SparseFileError, load_sparse, save_sparse
from torch_adapmtl.storage._safetensors import MOST_HEADER

Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def make() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 70), nn.BatchNorm1d(70), nn.Linear(70, 60))
    model.register_buffer("flag", torch.tensor([True, False]))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[torch.rand_like(layer.weight) < 0.8] = 0  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x"
    file = save_sparse(make(), path)
    assert sum(x.blocks is not None for x in file.tensors) == 2
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def refused(content: bytes, folder: Path) -> str:
    """The message of the error, which leaves the model as it was."""
    (folder / "x").write_bytes(content)
    model = make()
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(7)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(SparseFileError) as caught:
        load_sparse(folder / "x", model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert str(folder / "x") in str(caught.value)
    return str(caught.value)


def changed(content: bytes, change: Change, data: bytes | None = None) -> bytes:
    """The file after a change of its header and its index, with the right checksum.

    `data` is to take the place of all entries but the index.
    """
    header, index, old = parts(content)
    change(header, index)
    header, old = with_index(header, index, old if data is None else data)
    return sealed(text_of(header), old)


def test_a_sealed_file_is_what_was_written(valid: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(changed(valid, lambda header, index: None))
    for name, x in load_sparse(folder / "x").items():
        assert torch.equal(x, make().state_dict()[name])


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit(valid: bytes, folder: Path, data: st.DataObject) -> None:
    content = bytearray(valid)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    refused(bytes(content), folder)


@settings(max_examples=100)
@given(st.data())
def test_a_file_that_is_cut_off_or_too_long(
    valid: bytes, folder: Path, data: st.DataObject
) -> None:
    refused(valid[: data.draw(st.integers(0, len(valid) - 1))], folder)
    refused(valid + data.draw(st.binary(min_size=1, max_size=9)), folder)


@settings(max_examples=300)
@given(st.data())
def test_other_data_under_the_right_checksum(
    valid: bytes, folder: Path, data: st.DataObject
) -> None:
    """They may be values, but what is loaded has the right shapes, and no other error comes."""
    _, _, content = parts(valid)
    noise = data.draw(st.binary(min_size=1, max_size=40))
    place = data.draw(st.integers(0, len(content) - len(noise)))
    other = content[:place] + noise + content[place + len(noise) :]
    (folder / "x").write_bytes(changed(valid, lambda header, index: None, other))
    model = make()
    try:
        load_sparse(folder / "x", model)
    except SparseFileError:
        assert all(
            torch.equal(x, make().state_dict()[name]) for name, x in model.state_dict().items()
        )


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["F32", "I8", "BF16", "BOOL", "0.weight", "../x"]),
    st.lists(st.integers(-1, 40), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=300)
@given(st.data())
def test_any_other_header_under_the_right_checksum(
    valid: bytes, folder: Path, data: st.DataObject
) -> None:
    def change(header: dict[str, Any], index: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            holder, key = data.draw(st.sampled_from(places(header) + places(index)))
            if key == "__metadata__" or holder is header["__metadata__"]:
                continue
            if isinstance(holder, dict) and data.draw(st.booleans()):
                holder.pop(key, None)
            else:
                holder[key] = data.draw(VALUES)

    (folder / "x").write_bytes(changed(valid, change))
    model = make()
    try:
        load_sparse(folder / "x", model)
    except ValueError:  # also of names and shapes that are not those of the model
        assert all(
            torch.equal(x, make().state_dict()[name]) for name, x in model.state_dict().items()
        )
    try:
        SparseFile.read(folder / "x")
    except SparseFileError:
        with pytest.raises(SparseFileError):
            load_sparse(folder / "x")


def record(name: str, value: Any) -> Change:
    def change(header: dict[str, Any], index: dict[str, Any]) -> None:
        index["tensors"]["0.weight"][name] = value

    return change


def entry(name: str, value: Any) -> Change:
    def change(header: dict[str, Any], index: dict[str, Any]) -> None:
        header["torch_adapmtl.small.I64.0"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i: h["__metadata__"].update(torch_adapmtl="2"), "version '2' of.*upgrade"),
        (lambda h, i: i.pop("tied"), "index is damaged"),
        (lambda h, i: i["tensors"].pop("1.bias"), "index is damaged"),
        (lambda h, i: i["tensors"]["1.bias"].update({"in": "0.weight"}), "index is damaged"),
        (lambda h, i: i["tensors"]["1.bias"].update(shape=[71]), "index is damaged"),
        (lambda h, i: h["torch_adapmtl.small.I64.0"].update(shape=[]), "index is damaged"),
        (lambda h, i: h.update(other={}), "header is damaged"),
        (lambda h, i: i.update(tied={"a": "b"}), "index is damaged"),
        (lambda h, i: i.update(tied={"0.bias": "0.weight"}), "index is damaged"),
        (lambda h, i: i["tensors"].update(other=i["tensors"]["0.weight"]), "index is damaged"),
        (record("shape", [2**62, 2**62]), "index is damaged"),
        (record("shape", [-70, -64]), "index is damaged"),
        (record("shape", [True, 4480]), "index is damaged"),
        (record("dtype", "F64"), "index is damaged"),
        (record("dtype", "Q4"), "index is damaged"),
        (record("values", "I8"), "index is damaged"),
        (record("error", "none"), "index is damaged"),
        (record("blocks", []), "index is damaged"),
        (record("blocks", [[2**40, 1, 1]]), "index is damaged"),
        (record("blocks", [[10, 1, 1], [10, 1, 1]]), "index is damaged"),
        (entry("shape", [2**80]), "header is damaged"),
        (entry("dtype", "F33"), "header is damaged"),
        (entry("data_offsets", [1, 9]), "header is damaged"),
        (entry("data_offsets", [8, 0]), "header is damaged"),
        (entry("data_offsets", [0.0, 8.0]), "header is damaged"),
    ],
)
def test_wrong_headers(valid: bytes, folder: Path, change: Change, message: str) -> None:
    content = changed(valid, change)
    with pytest.raises(SparseFileError, match=message):
        SparseFile.read(_written(content, folder))
    refused(content, folder)


def _written(content: bytes, folder: Path) -> Path:
    (folder / "x").write_bytes(content)
    return folder / "x"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a file of torch.save",
        b"\x80\x04 a pickle",
        (2**63).to_bytes(8, "little") + b"{}",
        (MOST_HEADER + 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b'"{}"',
        (4).to_bytes(8, "little") + b"null",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    ],
)
def test_files_of_other_kinds(content: bytes, folder: Path) -> None:
    refused(content, folder)


def test_files_of_safetensors(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    content = safetensors.save(make().state_dict())
    assert "load it with the safetensors package" in refused(content, folder)


def test_names_that_occur_twice(valid: bytes, folder: Path) -> None:
    header, data = with_index(*parts(valid))
    text = text_of(header)
    assert "occurs twice" in refused(sealed(text.replace('"0.weight"', f'"{INDEX}"'), data), folder)


def bomb(megabytes: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(2**20)
    return b"".join(coder.compress(zeros) for _ in range(megabytes)) + coder.flush()


@pytest.mark.parametrize("is_sparse", [False, True])
def test_bombs(valid: bytes, folder: Path, is_sparse: bool) -> None:
    """What would become 400 MB is not unpacked."""
    packed = bomb(400)
    kept = 100 if is_sparse else 600
    lengths = [len(packed), 0] if is_sparse else [0, len(packed)]
    content = packed + bytes(3 * kept)

    def change(header: dict[str, Any], index: dict[str, Any]) -> None:
        for name in [*header]:
            if name != "__metadata__":
                del header[name]
        header["x"] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
        index["tensors"] = {"x": {"dtype": "F32", "shape": [600], "blocks": [[kept, *lengths]]}}
        index["pools"] = {}

    path = _written(changed(valid, change, content), folder)
    tracemalloc.start()
    with pytest.raises(SparseFileError, match="'x' is damaged"):
        load_sparse(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_distances_that_lead_out_of_the_tensor(valid: bytes, folder: Path) -> None:
    def packed(values: list[int]) -> bytes:
        coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        return coder.compress(bytes(values)) + coder.flush()

    planes = packed([127, 127])
    for distances in ([0, 254], [255, 0], [0, 0, 0], [0, 255], [5], [200, 200]):
        lengths = [len(packed(distances)), len(planes)]
        content = packed(distances) + planes + bytes(6)

        def change(
            header: dict[str, Any],
            index: dict[str, Any],
            size: int = len(content),
            lengths: list[int] = lengths,
        ) -> None:
            for name in [*header]:
                if name != "__metadata__":
                    del header[name]
            header["x"] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
            index["tensors"] = {"x": {"dtype": "F32", "shape": [255], "blocks": [[2, *lengths]]}}
            index["pools"] = {}

        with pytest.raises(SparseFileError, match="'x' is damaged"):
            load_sparse(_written(changed(valid, change, content), folder))


def test_truth_values_are_0_or_1(folder: Path) -> None:
    save_sparse({"few": torch.tensor([True]), "many": torch.rand(9000) < 0.05}, folder / "x")
    content = (folder / "x").read_bytes()
    header, _, data = parts(content)
    begin, _ = header["torch_adapmtl.small.BOOL.0"]["data_offsets"]
    data = data[:begin] + b"\x02" + data[begin + 1 :]
    with pytest.raises(SparseFileError, match="neither 0 nor 1"):
        load_sparse(_written(changed(content, lambda header, index: None, data), folder))


def test_a_folder_or_nothing(folder: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        load_sparse(folder / "nothing")
    with pytest.raises(OSError, match=folder.name):
        load_sparse(folder)
