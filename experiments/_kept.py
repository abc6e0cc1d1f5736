"""A cache of trained models in .cache/experiments, each of which is valid while its code stays as it is."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

KEPT = Path(__file__).resolve().parent.parent / ".cache/experiments"


def train_once(file: str, key: str, model: Any, train: Callable[[Any], object]) -> Any:
    """Train a model in place, or load its weights as an earlier process left them; return it in evaluation mode.

    Args:
        file: the module that calls, ``__file__``; after a change of its code the model is trained anew.
        key: what else the weights depend on, as a file's name may have it.
        model: fresh.
        train: trains it.
    """
    name = Path(file).stem
    path = KEPT / "hosts" / f"{name.strip('_')}-{key}-{digest(name)[:16]}.safetensors"
    if path.exists():
        load_model(model, path)
        return model.eval()
    train(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_model(model, str(part))
    part.replace(path)
    return model.eval()


def digest(name: str) -> str:
    """Return a hash of an experiment's code and of the shared files it imports, without comments and docstrings."""
    texts = [code(path) for path in sorted(sources(name))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def code(path: Path) -> str:
    """Return the code of a file as text in which no comment nor docstring is left."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def sources(name: str) -> set[Path]:
    """Return the file of an experiment, and those of experiments/ that it imports, by others too."""
    found: set[Path] = set()
    waiting = [name]
    while waiting:
        path = Path(__file__).with_name(f"{waiting.pop()}.py")
        if path not in found:
            found.add(path)
            waiting += re.findall(r"^from experiments\.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found
