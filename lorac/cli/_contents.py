"""What a compiled folder or an adapter's file holds: the report of ``lorac inspect``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rich.table import Table

from lorac.cli._shown import table
from lorac.ir.view.terms import told_size
from lorac.variants.adapter import Adapter

Held = Mapping[str, Any]
_UNSET: tuple[Any, ...] = ((), [], {}, None, "")
"""Values of hyper-parameters that say nothing."""


def of_folder(folder: Path) -> Held:
    """What a compiled folder holds, every file checked against its manifest; nothing of it is run.

    Raises:
        ArtifactError: it is damaged.
    """
    from lorac.compiler.targets import backend_of
    from lorac.runtime.manifest import Manifest

    manifest = Manifest.of(folder)
    told = manifest.told
    sizes = {name: entry["bytes"] for name, entry in told["files"].items()}
    adapters = [
        {
            "name": name,
            "method": entry["variant"],
            "hyperparameters": _said(entry["hyperparameters"]),
            "bytes": sizes[entry["file"]],
        }
        for name, entry in told["adapters"].items()
    ]
    graphs = backend_of(manifest.target).signatures(manifest.program)
    beside = {PurePosixPath(entry["file"]).parent for entry in told["adapters"].values()}
    own = sum(nbytes for name, nbytes in sizes.items() if PurePosixPath(name).parent not in beside)
    return {
        "path": str(folder),
        "target": manifest.target,
        "mode": manifest.mode,
        "active": {name: how["strength"] for name, how in manifest.active.items()},
        "versions": told["versions"],
        "graphs": {name: _graph(signature) for name, signature in graphs.items()},
        "adapters": adapters,
        "sites": list(manifest.plans),
        "files": sizes,
        "memory": {"program": own, "adapters": sum(adapter["bytes"] for adapter in adapters)},
    }


def _graph(signature: Any) -> dict[str, Any]:
    """How a graph is called."""
    fixed = [[name, axis] for name, axis in signature.sizes.fixed]
    types = {name: signature.types.get(name, "") for name in (*signature.inputs, *signature.outputs)}
    return {
        "inputs": {name: types[name] for name in signature.inputs},
        "outputs": {name: types[name] for name in signature.outputs},
        "fixed": fixed,
        "sizes": list(signature.sizes.telling),
        "notes": list(signature.notes),
    }


def of_adapter(adapter: Adapter, path: Path) -> Held:
    """What an adapter's file holds."""
    settings = {field.name: getattr(adapter.variant, field.name) for field in dataclasses.fields(adapter.variant)}
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
    return {
        "path": str(path),
        "name": adapter.name,
        "method": adapter.variant.name,
        "class": type(adapter.variant).__name__,
        "format": adapter.provenance.get("format"),
        "hyperparameters": _said(settings),
        "values": adapter.numel(),
        "sites": {site: {n: _typed(t) for n, t in tensors.items()} for site, tensors in adapter.tensors.items()},
        "replaced": {name: _typed(tensor) for name, tensor in adapter.replaced.items()},
        "files": {file.name: file.stat().st_size for file in files},
    }


def _typed(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value not in _UNSET}


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def shown(held: Held) -> Iterator[Table | str]:
    """The same for people."""
    yield from _folder_shown(held) if "graphs" in held else _adapter_shown(held)
    files = ", ".join(f"{name} {told_size(nbytes)}" for name, nbytes in held["files"].items())
    yield f"{told_size(sum(held['files'].values()))} on disk: {files}"


def _folder_shown(held: Held) -> Iterator[Table | str]:
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    active = ", ".join(f"{name}*{strength:g}" for name, strength in held["active"].items()) or "none"
    yield f"{held['path']}: {held['target']}, {held['mode']}, active: {active} (written by {versions})"
    for name, graph in held["graphs"].items():
        rows = [(kind[:-1], own, told) for kind in ("inputs", "outputs") for own, told in graph[kind].items()]
        yield table((name, "name", "dtype and axes"), rows)
        yield from (f"size fixed by the model's trace: axis {axis} of '{own}'" for own, axis in graph["fixed"])
        yield from graph["notes"]
    adapters = held["adapters"]
    each = [(a["name"], a["method"], _settings(a["hyperparameters"]), told_size(a["bytes"])) for a in adapters]
    yield table(("adapter", "method", "hyper-parameters", "size"), each) if each else "no adapters"
    memory = {what: told_size(nbytes) for what, nbytes in held["memory"].items()}
    yield f"{len(held['sites'])} sites; memory: program {memory['program']}, mapped, and adapters {memory['adapters']}"


def _adapter_shown(held: Held) -> Iterator[Table | str]:
    yield f"{held['name']}: {held['class']}({_settings(held['hyperparameters'])}), {held['format']}"
    yield f"{len(held['sites'])} sites, {len(held['replaced'])} replaced parameters, {held['values']:,} values"
    rows = [(site, "  ".join(f"{n} {t}" for n, t in tensors.items())) for site, tensors in held["sites"].items()]
    rows += [(name, f"replaced by {tensor}") for name, tensor in held["replaced"].items()]
    yield table(("site", "tensors"), rows)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
