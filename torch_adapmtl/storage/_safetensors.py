"""The file format: safetensors, written and read with the standard library alone."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .error import SparseFileError

CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}

MOST_HEADER = 100_000_000  # bytes, as in other readers
MOST_ELEMENTS = 2**60  # of a tensor
NO_SUM = "0" * 8  # stands for the checksum while it is computed
CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """An entry of a safetensors file.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        begin: Its first byte after the header.
        end: The end of its bytes after the header.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


class Writer:
    """Writes a file as a whole: until it is finished, or if that fails, what was there stays.

    What is added goes into a temporary file, from which it is copied behind the header.

    Args:
        path: The file.
        metadata: Texts, by name. A checksum of the file is added.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
        given = os.fsdecode(path)
        self._target = Path(os.path.realpath(given))  # the file that a link leads to
        if not os.path.basename(given) or self._target.is_dir():
            raise IsADirectoryError(f"{given!r} is a folder, not a file to write")
        if self._target.exists() and not self._target.is_file():
            raise OSError(f"{given!r} is no regular file: it would be replaced")
        self._metadata = dict(metadata)
        self._entries: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        self._begin = 0  # of what has no entry yet
        self._added = tempfile.TemporaryFile(dir=self._target.parent)  # noqa: SIM115  see __exit__

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._added.close()

    @property
    def pending(self) -> int:
        """Number of bytes that were written and have no entry yet."""
        return self._added.tell() - self._begin

    def write(self, data: Any) -> None:
        """Write bytes for the next entry."""
        self._added.write(data)

    def forget(self) -> None:
        """Take back what has no entry yet."""
        self._added.seek(self._begin)
        self._added.truncate()

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """Make an entry of what was written since the last one; return its size."""
        size = self.pending
        self._entries[name] = (dtype, list(shape), self._begin, size)
        self._begin += size
        return size

    def finish(self) -> int:
        """Write the file; return its size."""
        # As the format asks for: wide types first, so that each lies at a multiple of its width.
        order = sorted(self._entries, key=lambda name: -self._entries[name][0].itemsize)
        places, end = {}, 0
        for name in order:
            begin, end = end, end + self._entries[name][3]
            places[name] = [begin, end]
        header = {
            "__metadata__": {**self._metadata, "crc32": NO_SUM},
            **{
                name: {"dtype": CODES[dtype], "shape": shape, "data_offsets": places[name]}
                for name, (dtype, shape, *_) in self._entries.items()
            },
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._new_file() as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            checksum = zlib.crc32(text)
            for name in order:
                *_, begin, size = self._entries[name]
                for place in range(begin, begin + size, CHUNK):
                    self._added.seek(place)
                    data = self._added.read(min(CHUNK, begin + size - place))
                    checksum = zlib.crc32(data, checksum)
                    file.write(data)
            whole = file.tell()
            file.seek(8 + text.index(_field(NO_SUM)))
            file.write(_field(f"{checksum:08x}"))
        return whole

    @contextmanager
    def _new_file(self) -> Iterator[BinaryIO]:
        """A new file that takes the place of the old one once it is whole."""
        new = self._target.with_name(f".{secrets.token_hex(8)}.new")
        try:
            with new.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if self._target.exists():
                shutil.copymode(self._target, new)
            new.replace(self._target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _field(checksum: str) -> bytes:
    return f'"crc32":"{checksum}"'.encode()


class Reader:
    """A safetensors file whose header and checksum are right.

    Attributes:
        metadata: The texts of the header.
        entries: The entries, by name.
        size: Bytes of the file.

    Raises:
        SparseFileError: If it is none.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file = name, file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(self.size - 8, MOST_HEADER):
            raise self.error("it is no safetensors file, or was cut off")
        text = file.read(length)
        self._start = 8 + length
        try:
            header = parse(text)
            self.metadata = header.pop("__metadata__", {})
            if not all(isinstance(x, str) for x in (*self.metadata, *self.metadata.values())):
                raise ValueError("its metadata are no texts")
            self.entries = {name: _entry(value) for name, value in header.items()}
            self._check_places()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.error(f"its header is damaged: {error!s:.300}") from error
        self._check_sum(text)

    def error(self, what: str) -> SparseFileError:
        """An error about the file."""
        return SparseFileError(f"{self.name} cannot be loaded: {what}")

    def _check_places(self) -> None:
        """The entries must fill the file without gaps."""
        end = 0
        for entry in sorted(self.entries.values(), key=lambda e: (e.begin, e.end)):
            if (entry.begin, entry.size) != (end, elements(entry.shape) * entry.dtype.itemsize):
                raise ValueError("the entries do not lie where they should")
            end = entry.end
        if self._start + end != self.size:
            raise ValueError(f"{self._start + end:,} bytes are needed, it has {self.size:,}")

    def _check_sum(self, text: bytes) -> None:
        stated = self.metadata.get("crc32")
        if stated is None:
            raise self.error("save_sparse() did not write it; load it with the safetensors package")
        if not re.fullmatch("[0-9a-f]{8}", stated):
            raise self.error("its checksum is damaged")
        checksum = zlib.crc32(text.replace(_field(stated), _field(NO_SUM), 1))
        for chunk in self.chunks(0, self.size - self._start):
            checksum = zlib.crc32(chunk, checksum)
        if stated != f"{checksum:08x}":
            raise self.error("its checksum is wrong: it was changed after it was written")

    def read(self, place: int, count: int) -> bytes:
        """So many bytes from a place after the header."""
        self._file.seek(self._start + place)
        result = self._file.read(count)
        if len(result) != count:
            raise self.error("it was cut off while it was read")
        return result

    def chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes between two places after the header, a few at a time."""
        for place in range(begin, end, CHUNK):
            yield self.read(place, min(CHUNK, end - place))


def _entry(value: Any) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"the type {value['dtype']!r:.99} is not known")
    begin, end = naturals(value["data_offsets"])
    if set(value) != {"dtype", "shape", "data_offsets"} or begin > end:
        raise ValueError(f"an entry is {value!r:.99}")
    return Entry(DTYPES[value["dtype"]], tuple(naturals(value["shape"])), begin, end)


def naturals(numbers: Any) -> list[int]:
    """A list of integers that are not negative, and that torch can hold.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{numbers!r:.99} is to be a list of integers, none of them negative")
    return numbers


def elements(shape: Sequence[int]) -> int:
    """The number of elements of a tensor.

    Raises:
        ValueError: If no tensor is so large.
    """
    count = 1
    for n in shape:
        count *= max(n, 1)
        if count > MOST_ELEMENTS:
            raise ValueError(f"no tensor has the shape {shape!r:.99}")
    return 0 if 0 in shape else count


def parse(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: If it is none, or a name occurs twice in it.
    """
    return json.loads(text, object_pairs_hook=_no_name_twice)


def _no_name_twice(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice")
        result[name] = value
    return result
