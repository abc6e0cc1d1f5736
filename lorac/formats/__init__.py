"""Adapters on disk.

Every module here that does not begin with an underscore is a format, found by its existence; other packages offer
formats by entry points of the group ``lorac.formats``.
"""

from lorac.formats._format import Evidence, Format
from lorac.formats._registry import (
    formats,
    is_adapter,
    load_adapter,
    load_checkpoint,
    outline_adapter,
    save_adapter,
)

__all__ = [
    "Evidence",
    "Format",
    "formats",
    "is_adapter",
    "load_adapter",
    "load_checkpoint",
    "outline_adapter",
    "save_adapter",
]
