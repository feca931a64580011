"""Data sets for multi-task learning that need no download, and joint augmentations.

`Rooms` renders procedural 3-D rooms with exact dense targets; it needs torch alone.
`MultiDigits` composes real scans of digits that scikit-learn ships.
"""

from __future__ import annotations

from torch_adapmtl.datasets._scenes import RoomScenes
from torch_adapmtl.datasets.digits import MultiDigits
from torch_adapmtl.datasets.rooms import Rooms
from torch_adapmtl.datasets.transforms import IGNORE, KINDS, RandomFlip, RandomScaleCrop

__all__ = [
    "IGNORE",
    "KINDS",
    "MultiDigits",
    "RandomFlip",
    "RandomScaleCrop",
    "RoomScenes",
    "Rooms",
]
