"""Results and trained models, each of which is valid while the code that computes it stays as it is.

That code is `find` of an experiment, and every function, class and constant of experiments/ and examples/ that it uses,
directly or through others. Docstrings and comments do not count, nor do the lines that are expected and the module that
judges and prints, so that a page may be written anew without running anything.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
KEPT, RESULTS = ROOT / ".cache/experiments", ROOT / "experiments/results"
"""Folders of models and single runs, and of results, which belong to the repository."""
IDLE = {"experiments._finding", "experiments._kept"}
"""Modules that compute no figure."""
JUDGED = {"EXPECTED"}
"""Constants that say what is expected of figures."""
Definition = tuple[str, str]
"""A module, and a name in it; "" is all of it."""


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


@functools.cache
def digest(name: str, *parts: str) -> str:
    """Return a hash of the code that an experiment, or another module of experiments/, computes by.

    Args:
        name: of the module.
        parts: further arguments of the `Experiment` that count, such as its fault.
    """
    found = computing_code(f"experiments.{name}", {"find", *parts})
    return hashlib.sha256("\0".join(found[one] for one in sorted(found)).encode()).hexdigest()


def computing_code(module: str, parts: Collection[str] = ("find",)) -> dict[Definition, str]:
    """Return the code of all that parts of an experiment use; of a module without experiment that of all its parts."""
    experiment = _definitions(module).get("EXPERIMENT")
    roots: Sequence[ast.AST] = _tree(module).body
    if experiment is not None:
        roots = [node.value for node in ast.walk(experiment) if isinstance(node, ast.keyword) and node.arg in parts]
    found = {(module, ""): "\0".join(map(ast.dump, roots))}
    waiting = [(module, name) for root in roots for name in _names(root)]
    while waiting:
        one = waiting.pop()
        if one in found or one[0] in IDLE or one[1] in JUDGED:
            continue
        where, name = one
        if where == module and name == "EXPERIMENT":
            continue
        imported = _imports(where).get(name)
        node: ast.AST | None = _definitions(where).get(name) if name else _tree(where)
        if imported is not None:
            waiting.append(imported)
        elif node is not None:
            found[one] = ast.dump(node)
            waiting += [(where, used) for used in _names(node)]
    return found


def _names(node: ast.AST) -> Iterable[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


@functools.cache
def _tree(module: str) -> ast.Module:
    """Return a module's code without docstrings, those of constants among them."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [one for one in node.body if not _is_text(one)]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@functools.cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    return {name: node for node in _tree(module).body for name in _defined(node)}


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (inner.id for one in targets for inner in ast.walk(one) if isinstance(inner, ast.Name))


@functools.cache
def _imports(module: str) -> dict[str, Definition]:
    """Return the names that a module imports from experiments/ and examples/, and where they are defined."""
    found = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"experiments", "examples"}:
            for one in node.names:
                inner = f"{node.module}.{one.name}"
                is_module = (ROOT / f"{inner.replace('.', '/')}.py").exists()
                found[one.asname or one.name] = (inner, "") if is_module else (str(node.module), one.name)
    return found
