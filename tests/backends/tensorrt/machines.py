"""Machines that this one is not: with GPUs, and with both of NVIDIA's libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lorac.backends.tensorrt import library
from tests.backends.tensorrt.tiny import LIBRARY


def install_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Make torch report GPUs of these compute capabilities, the first as the current one; nothing runs on them."""
    current = [0]

    def index(device: object = None) -> int:
        wanted = None if device is None else torch.device(device).index  # type: ignore[call-overload]
        return current[0] if wanted is None else int(wanted)

    def capability(device: object = None) -> tuple[int, int]:
        major, minor = capabilities[index(device)].split(".")
        return int(major), int(minor)

    @contextlib.contextmanager
    def using(device: object) -> Iterator[None]:
        before, current[0] = current[0], index(device)
        yield
        current[0] = before

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: len(capabilities),
        "current_device": index,
        "get_device_capability": capability,
        "get_device_name": lambda device=None: f"GPU {index(device)}",
        "device": using,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def install_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install NVIDIA's ``tensorrt``, which is the library that is here under another name and version."""
    other = ModuleType(library.NVIDIA)
    vars(other).update({name: value for name, value in vars(LIBRARY.module).items() if not name.startswith("__")})
    other.__version__ = "99.0"
    installed = {library.NVIDIA: library.TensorRTLibrary(other), library.RTX: LIBRARY}
    monkeypatch.setattr(library, "_import_library", installed.__getitem__)
