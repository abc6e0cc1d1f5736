"""What a compiled folder or an adapter's file holds: the report of ``lorac inspect``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rich.table import Table

from lorac.cli._output import make_table
from lorac.report.terms import format_size
from lorac.variants.adapter import Adapter

Inspection = Mapping[str, Any]
_EMPTY_VALUES: tuple[Any, ...] = ((), [], {}, None, "")
"""Values of hyper-parameters that say nothing."""


def describe_folder(folder: Path) -> Inspection:
    """What a compiled folder holds, every file checked against its manifest; nothing of it is run.

    Raises:
        ArtifactError: it is damaged.
    """
    from lorac.session.targets import find_backend
    from lorac.storage.artifact import open_artifact

    manifest = open_artifact(folder)
    told = manifest.fields
    sizes = {name: entry["bytes"] for name, entry in told["files"].items()}
    adapters = [
        {
            "name": name,
            "method": entry["variant"],
            "hyperparameters": _nonempty_settings(entry["hyperparameters"]),
            "bytes": sizes[entry["file"]],
        }
        for name, entry in told["adapters"].items()
    ]
    graphs = find_backend(manifest.target).read_interfaces(manifest.program)
    beside = {PurePosixPath(entry["file"]).parent for entry in told["adapters"].values()}
    own = sum(nbytes for name, nbytes in sizes.items() if PurePosixPath(name).parent not in beside)
    return {
        "path": str(folder),
        "target": manifest.target,
        "mode": manifest.mode,
        "active": {name: how["strength"] for name, how in manifest.active.items()},
        "versions": told["versions"],
        "graphs": {name: _describe_graph(signature) for name, signature in graphs.items()},
        "adapters": adapters,
        "sites": list(manifest.plans),
        "files": sizes,
        "memory": {"program": own, "adapters": sum(adapter["bytes"] for adapter in adapters)},
    }


def _describe_graph(signature: Any) -> dict[str, Any]:
    """How a graph is called."""
    fixed = [[name, axis] for name, axis in signature.sizes.fixed]
    types = {name: signature.types.get(name, "") for name in (*signature.inputs, *signature.outputs)}
    return {
        "inputs": {name: types[name] for name in signature.inputs},
        "outputs": {name: types[name] for name in signature.outputs},
        "fixed": fixed,
        "sizes": list(signature.sizes.notable),
        "notes": list(signature.notes),
    }


def describe_adapter_file(adapter: Adapter, path: Path) -> Inspection:
    """What an adapter's file holds."""
    settings = {field.name: getattr(adapter.variant, field.name) for field in dataclasses.fields(adapter.variant)}
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
    return {
        "path": str(path),
        "name": adapter.name,
        "method": adapter.variant.name,
        "class": type(adapter.variant).__name__,
        "format": adapter.provenance.get("format"),
        "hyperparameters": _nonempty_settings(settings),
        "values": adapter.numel(),
        "sites": {
            site: {n: _format_tensor(t) for n, t in tensors.items()} for site, tensors in adapter.tensors.items()
        },
        "replaced": {name: _format_tensor(tensor) for name, tensor in adapter.replaced.items()},
        "files": {file.name: file.stat().st_size for file in files},
    }


def _format_tensor(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _nonempty_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value not in _EMPTY_VALUES}


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def format_contents(held: Inspection) -> Iterator[Table | str]:
    """The same for people."""
    yield from _format_folder(held) if "graphs" in held else _format_adapter(held)
    files = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in held["files"].items())
    yield f"{format_size(sum(held['files'].values()))} on disk: {files}"


def _format_folder(held: Inspection) -> Iterator[Table | str]:
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    active = ", ".join(f"{name}*{strength:g}" for name, strength in held["active"].items()) or "none"
    yield f"{held['path']}: {held['target']}, {held['mode']}, active: {active} (written by {versions})"
    for name, graph in held["graphs"].items():
        rows = [(kind[:-1], own, told) for kind in ("inputs", "outputs") for own, told in graph[kind].items()]
        yield make_table((name, "name", "dtype and axes"), rows)
        yield from (f"size fixed by the model's trace: axis {axis} of '{own}'" for own, axis in graph["fixed"])
        yield from graph["notes"]
    adapters = held["adapters"]
    each = [(a["name"], a["method"], _format_settings(a["hyperparameters"]), format_size(a["bytes"])) for a in adapters]
    yield make_table(("adapter", "method", "hyper-parameters", "size"), each) if each else "no adapters"
    memory = {what: format_size(nbytes) for what, nbytes in held["memory"].items()}
    yield f"{len(held['sites'])} sites; memory: program {memory['program']}, mapped, and adapters {memory['adapters']}"


def _format_adapter(held: Inspection) -> Iterator[Table | str]:
    yield f"{held['name']}: {held['class']}({_format_settings(held['hyperparameters'])}), {held['format']}"
    yield f"{len(held['sites'])} sites, {len(held['replaced'])} replaced parameters, {held['values']:,} values"
    rows = [(site, "  ".join(f"{n} {t}" for n, t in tensors.items())) for site, tensors in held["sites"].items()]
    rows += [(name, f"replaced by {tensor}") for name, tensor in held["replaced"].items()]
    yield make_table(("site", "tensors"), rows)


def _format_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
