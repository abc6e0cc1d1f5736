"""The file of images, where the system writes less than it is asked to."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest

from lorac.runtime.slot_images import _write


def test_writes_all_bytes_after_partial_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, path, sizes = os.pwritev, tmp_path / "images", iter([7, 7, 7, 7])
    monkeypatch.setattr(
        os, "pwritev", lambda file, parts, offset: write(file, [b"".join(parts)[: next(sizes)]], offset)
    )
    parts = collections.deque[memoryview | bytes]([memoryview(b"one of seventeens"), b"", bytes(2), b"another", b"!"])
    with path.open("wb") as file:
        _write(file.fileno(), parts, 3)
    assert path.read_bytes() == bytes(3) + b"one of seventeens" + bytes(2) + b"another!"
