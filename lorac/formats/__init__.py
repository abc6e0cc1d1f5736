"""Adapters on disk.

A module here that has a ``FORMAT`` is a format, found by its existence; other packages offer formats by entry points
of the group ``lorac.formats``. ``reading`` has the tools that they share.
"""

from lorac.formats._format import Evidence, Format
from lorac.formats._outlines import AdapterOutline
from lorac.formats._registry import (
    fill_adapter,
    formats,
    is_adapter,
    load_adapter,
    load_checkpoint,
    outline_adapter,
    save_adapter,
)

__all__ = [
    "AdapterOutline",
    "Evidence",
    "Format",
    "fill_adapter",
    "formats",
    "is_adapter",
    "load_adapter",
    "load_checkpoint",
    "outline_adapter",
    "save_adapter",
]
