"""Files that are taken apart, changed and put together again, with the right checksum."""

from __future__ import annotations

import json
import zlib
from typing import Any

INDEX = "torch_adapmtl.index"
NO_SUM = '"crc32":"00000000"'


def parts(content: bytes) -> tuple[dict[str, Any], Any, bytes]:
    """The header and the index of a file, and the other entries; the index is the last."""
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    begin, end = header.pop(INDEX)["data_offsets"]
    assert end == len(data)
    header["__metadata__"]["crc32"] = "00000000"
    return header, json.loads(zlib.decompress(data[begin:])), data[:begin]


def text_of(header: dict[str, Any]) -> str:
    return json.dumps(header, separators=(",", ":"))


def with_index(header: dict[str, Any], index: Any, data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data with an index."""
    packed = zlib.compress(json.dumps(index).encode(), 1)
    place = [len(data), len(data) + len(packed)]
    entry = {"dtype": "U8", "shape": [len(packed)], "data_offsets": place}
    return {**header, INDEX: entry}, data + packed


def sealed(text: str, data: bytes) -> bytes:
    """A file of a header, whose first checksum of zeros becomes the right one."""
    plain = text.encode()
    checksum = zlib.crc32(data, zlib.crc32(plain))
    plain = plain.replace(NO_SUM.encode(), f'"crc32":"{checksum:08x}"'.encode(), 1)
    return len(plain).to_bytes(8, "little") + plain + data


def places(x: Any) -> list[tuple[Any, Any]]:
    """All values in dicts and lists, as their holders and keys."""
    keys = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()
    return [(x, key) for key in keys] + [place for key in keys for place in places(x[key])]
