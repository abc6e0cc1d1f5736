"""Writers of numbered content, and processes that die while they write it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac import Adapter, LoRA, load_adapter, save_adapter
from lorac.formats import formats
from lorac.formats.peft.config import peft_types
from lorac.storage import artifact
from lorac.storage import atomic_folders as folders

KINDS = ("artifact", "peft", "native")
FOREIGN = {"README.md": "mine", "more/notes.txt": "mine too"}
"""What somebody else keeps in a folder with a PEFT adapter."""
_CHANGES = ("rename", "replace", "link", "unlink", "rmdir", "mkdir")
formats(), peft_types()  # imported here, once, and not again by every process
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.storage.writers"])


def write(kind: str, target: Path, number: int) -> None:
    """Write number's version to the target."""
    if kind == "artifact":
        artifact.write_artifact(target, lambda staged: _fill(staged, number))
        return
    model = nn.Sequential(OrderedDict(up=nn.Linear(10, 14)))
    tensors = {"lora_A": torch.full((2, 10), float(number)), "lora_B": torch.full((14, 2), float(number))}
    adapter = Adapter("mine", LoRA(r=2, alpha=number, targets=("up",)), {"up": tensors})
    save_adapter(adapter, target, format=kind, model=model)


def read(kind: str, target: Path) -> int | None:
    """The number of the version that is there, or None where nothing is; every part must bear it."""
    folders.recover_folder(target)
    if not target.exists():
        return None
    if kind == "artifact":
        return int(artifact.open_artifact(target).fields["mode"])
    adapter = load_adapter(target)
    assert isinstance(adapter.variant, LoRA)
    numbers = {float(value) for tensor in adapter.tensors["up"].values() for value in tensor.unique()}
    assert numbers == {adapter.variant.alpha}, "a mixture"
    return int(adapter.variant.alpha)


def _fill(staged: Path, number: int) -> dict[str, Any]:
    (staged / "adapters").mkdir()
    for name in ("program.json", "weights", f"adapters/{number % 3}"):
        (staged / name).write_text(str(number))
    fields = ("versions", "plans", "reductions", "active", "adapters", "host", "program", "components")
    return {"target": "eager", "mode": str(number), **{field: {} for field in fields}}


def start(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process, made from one that has everything imported and no threads."""
    process = _CONTEXT.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def write_until(kind: str, target: Path, number: int, exchange: bool, moment: int) -> None:
    """Write a version, and die before the ``moment``-th step that changes what is on disk."""
    done = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == moment:
                os._exit(9)
            return change(*arguments, **options)

        return step

    for name in _CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    folders._exchange_in_one_step = dying(folders._exchange_in_one_step) if exchange else (lambda one, other: False)
    write(kind, target, number)


def write_on(kind: str, target: Path, first: int, step: int, exchange: bool = True) -> None:
    """Write versions for ever."""
    if not exchange:
        folders._exchange_in_one_step = lambda one, other: False
    number = first
    while True:
        write(kind, target, number)
        number += step


def reset(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
