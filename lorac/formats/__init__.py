"""Adapters on disk.

Every concrete ``Format`` in a module of this package is registered; other packages register theirs through
entry points of the group ``lorac.formats``. ``reading`` has the functions and classes that all formats share.
"""

from lorac.formats._format import Evidence, Format
from lorac.formats._outlines import AdapterOutline
from lorac.formats._registry import (
    formats,
    is_adapter,
    load_adapter,
    load_checkpoint,
    outline_adapter,
    read_values,
    save_adapter,
)

__all__ = [
    "AdapterOutline",
    "Evidence",
    "Format",
    "formats",
    "is_adapter",
    "load_adapter",
    "load_checkpoint",
    "outline_adapter",
    "read_values",
    "save_adapter",
]
