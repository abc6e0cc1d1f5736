"""The reports of ``lorac inspect`` and ``check``: the contents of a folder or file, and the fit of an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.table import Table

from lorac.argument_types import JsonMapping
from lorac.cli._output import format_number, make_table

if TYPE_CHECKING:
    from torch import Tensor

    from lorac.analysis.measures import AdapterMeasures
    from lorac.session.adapter_check import AdapterCheck
    from lorac.variants.adapter import Adapter

Inspection: TypeAlias = JsonMapping
"""The report as data for JSON."""
_MEASURES = {
    "form": "change",
    "rank": "rank",
    "effective_rank": "effective rank",
    "norm": "norm",
    "share": "share of the weight's norm",
}
"""Fields of ``SiteMeasures`` -> headings."""
_EMPTY_VALUES: tuple[object, ...] = ((), [], {}, None, "")


def describe_folder(folder: Path) -> Inspection:
    """Return the contents of a compiled folder, after checking every file against the manifest.

    Raises:
        ArtifactError: the folder is damaged.
    """
    from lorac.session.targets import find_backend
    from lorac.storage.artifact import open_artifact

    manifest = open_artifact(folder)
    fields = manifest.fields
    sizes = {name: entry["bytes"] for name, entry in fields["files"].items()}
    adapters = [
        {
            "name": name,
            "method": entry["variant"],
            "hyperparameters": _nonempty_settings(entry["hyperparameters"]),
            "bytes": sizes[entry["file"]],
        }
        for name, entry in fields["adapters"].items()
    ]
    graphs = find_backend(fields["target"]).read_interfaces(fields["program"])
    adapter_folders = {PurePosixPath(entry["file"]).parent for entry in fields["adapters"].values()}
    program = sum(nbytes for name, nbytes in sizes.items() if PurePosixPath(name).parent not in adapter_folders)
    return {
        "path": str(folder),
        "target": fields["target"],
        "mode": fields["mode"],
        "active": {name: how["strength"] for name, how in fields["active"].items()},
        "versions": fields["versions"],
        "graphs": {
            name: {
                "inputs": {key: interface.types.get(key, "") for key in interface.inputs},
                "outputs": {key: interface.types.get(key, "") for key in interface.outputs},
                "fixed": [[key, axis] for key, axis in interface.sizes.fixed],
                "sizes": list(interface.sizes.notable),
                "notes": list(interface.notes),
            }
            for name, interface in graphs.items()
        },
        "adapters": adapters,
        "sites": list(fields["plans"]),
        "files": sizes,
        "memory": {"program": program, "adapters": sum(adapter["bytes"] for adapter in adapters)},
    }


def describe_adapter_file(adapter: Adapter, path: Path, measures: AdapterMeasures) -> Inspection:
    """Return the contents of an adapter's file, with the adapter's change of each site."""
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
    return {
        "path": str(path),
        "name": adapter.name,
        "method": adapter.variant.name,
        "class": type(adapter.variant).__name__,
        "format": adapter.provenance.get("format"),
        "hyperparameters": _nonempty_settings(adapter.variant.settings),
        "values": adapter.numel(),
        "sites": {
            site: {n: _format_tensor(t) for n, t in tensors.items()} for site, tensors in adapter.tensors.items()
        },
        "replaced": {name: _format_tensor(tensor) for name, tensor in adapter.replaced.items()},
        "changes": measures.sites,
        "mismatches": measures.mismatches,
        "files": {file.name: file.stat().st_size for file in files},
    }


def _format_tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _nonempty_settings(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value not in _EMPTY_VALUES}


def format_contents(contents: Inspection) -> Iterator[Table | str]:
    """Yield a report's tables and lines for the terminal."""
    from lorac.report.terms import format_size

    yield from _format_folder(contents) if "graphs" in contents else _format_adapter(contents)
    files = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in contents["files"].items())
    yield f"{format_size(sum(contents['files'].values()))} on disk: {files}"


def _format_folder(contents: Inspection) -> Iterator[Table | str]:
    from lorac.report.terms import format_size

    versions = ", ".join(f"{name} {version}" for name, version in contents["versions"].items())
    active = ", ".join(f"{name}*{strength:g}" for name, strength in contents["active"].items()) or "none"
    yield f"{contents['path']}: {contents['target']}, {contents['mode']}, active: {active} (written by {versions})"
    for name, graph in contents["graphs"].items():
        rows = [(kind[:-1], *item) for kind in ("inputs", "outputs") for item in graph[kind].items()]
        yield make_table((name, "name", "dtype and axes"), rows)
        yield from (f"size fixed by the model's trace: axis {axis} of '{input_}'" for input_, axis in graph["fixed"])
        yield from graph["notes"]
    adapters = contents["adapters"]
    each = [(a["name"], a["method"], _format_settings(a["hyperparameters"]), format_size(a["bytes"])) for a in adapters]
    yield make_table(("adapter", "method", "hyper-parameters", "size"), each) if each else "no adapters"
    program, adapters_size = (format_size(contents["memory"][part]) for part in ("program", "adapters"))
    yield f"{len(contents['sites'])} sites; memory: program {program}, mapped, and adapters {adapters_size}"


def _format_adapter(contents: Inspection) -> Iterator[Table | str]:
    settings, sites, replaced = _format_settings(contents["hyperparameters"]), contents["sites"], contents["replaced"]
    yield f"{contents['name']}: {contents['class']}({settings}), {contents['format']}"
    yield f"{len(sites)} sites, {len(replaced)} replaced parameters, {contents['values']:,} values"
    alike: dict[tuple[str, str], list[str]] = {}
    for site, tensors in sites.items():
        key = re.sub(r"\d+", "*", site), "  ".join(f"{n} {t}" for n, t in tensors.items())
        alike.setdefault(key, []).append(site)
    rows = []
    for (pattern, tensors), names in alike.items():
        measures = (_format_range([getattr(contents["changes"][name], field) for name in names]) for field in _MEASURES)
        rows.append((f"{pattern} ({len(names)} sites)" if len(names) > 1 else names[0], tensors, *measures))
    rows += [(name, f"replaced by {tensor}", *[""] * len(_MEASURES)) for name, tensor in replaced.items()]
    yield make_table(("site", "tensors", *_MEASURES.values()), rows)
    if contents["mismatches"]:
        yield "does not fit the model:"
        yield from contents["mismatches"]


def _format_range(values: Sequence[Any]) -> str:
    """Format the values of several sites: the least and the greatest number, or the different words in order."""
    known = dict.fromkeys(value for value in values if value is not None)
    if any(isinstance(value, str) for value in known):
        return ", ".join(known)
    return " - ".join(dict.fromkeys(format_number(end(known)) for end in (min, max))) if known else ""


def _format_settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def format_check(found: AdapterCheck) -> Iterator[str]:
    """Yield the lines about a checked adapter; faults that differ only in numbers share a line with their count."""
    yield f"{found.adapter}: {'fits' if found.fits else 'does not fit'}"
    yield from (f"  {subject}: {finding}" for subject, finding in found.facts.items())
    alike: dict[str, list[str]] = {}
    for fault in (*found.faults, *found.objections):
        alike.setdefault(re.sub(r"\d+", "*", fault), []).append(fault)
    for first, *others in alike.values():
        yield f"  {first}" + (f" (and {len(others)} more like it)" if others else "")
    yield from (f"  mend: {step}" for step in found.repairs)
