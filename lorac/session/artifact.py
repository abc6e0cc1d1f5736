"""Artefacts: a compiled model as a folder that needs neither the original model nor its weights elsewhere.

    manifest.json                    what is in the folder and how it fits together
    adapters/<name>.safetensors      the adapters, in lorac's own format
    adapters/<name>.forms.safetensors  what a method comes to that is not lorac's own, so that no class is needed
    adapters/<name>.onnx_adapter     the same as ONNX Runtime reads them, where the program runs without lorac; of
                                     several components each has one
    tokenizer/…                      the tokenizer as it writes itself, where there is one
    …                                the program and its weights, as the target stores them

Adapters whose names are no names of files have their numbers instead; the manifest says which.

The manifest holds the versions, target and mode, the plan of every site, the active choice, what the adapters' formulas
were reduced to, the host's skeleton, what the target needs besides, size and hash of every other file, and last
a hash over all this. There is no time stamp, path or random name in it and no pickle anywhere: equal input gives equal
bytes, and loading runs no code that the artefact names.

A folder is written beside its target and takes its place in one step when it is complete; on failure nothing is left.
It replaces nothing but an older artefact, and nothing in it that the older manifest does not list.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from lorac.errors import ArtifactError, LoracError, Unavailable, warn
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.plans import PreparedAdapter
from lorac.limits import charge_reading
from lorac.runtime.generation.tokenizers import TOKENIZER_FOLDER
from lorac.session.compiled import Compiled
from lorac.storage.atomic_folders import MANIFEST, list_foreign, read_consistently, replace_atomically
from lorac.storage.open_file import OpenFile
from lorac.storage.os_errors import translate_os_errors
from lorac.storage.plans import choice_to_json, plan_to_json
from lorac.storage.strict_json import dump_json, parse_object, read_json_text
from lorac.version import VERSION

FORMAT = 5
ADAPTERS = "adapters"
RECORD, FORMS = "file", "forms"
ADAPTER_FILES = (RECORD, FORMS)
"""What the manifest calls an adapter's files: its record, and what it comes to."""
_SEAL = "seal"
_LISTED_FILES = 5
"""Foreign files that a message names."""
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "lorac_artifact": int,
    "versions": dict,
    "target": str,
    "mode": str,
    "plans": dict,
    "reductions": dict,
    "active": dict,
    "adapters": dict,
    "host": dict,
    "program": dict,
    "components": dict,
    "files": dict,
    _SEAL: str,
}
"""What a manifest holds, and as what."""
_PORTABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
"""Names of adapters that every system takes as the name of a file."""


# ── What is written ──────────────────────────────────────────────────────────────────────────────────────────────────
def save(
    compiled: Compiled,
    folder: str | os.PathLike[str],
    *,
    host: Mapping[str, Any],
    store: Callable[[Path], Mapping[str, Any]],
    save_adapter: Callable[[Any, Callable[[], PreparedAdapter], Path], Mapping[str, Any]],
    reductions: Mapping[str, Any],
    tokenizer: Callable[[Path], object] | None = None,
) -> None:
    """Write a compiled model.

    Args:
        compiled: the model.
        folder: as ``write`` takes it.
        host: the host's skeleton.
        store: (folder) -> what the target needs besides; writes the program.
        save_adapter: (adapter, () -> its normal forms, path without a suffix) -> what the manifest says of it, the
            names of its files in their folder; writes them.
        reductions: what the adapters' formulas were reduced to, by structure.
        tokenizer: writes the tokenizer into a folder; None where there is none.
    """

    def fill(staged: Path) -> dict[str, Any]:
        if tokenizer is not None:
            (staged / TOKENIZER_FOLDER).mkdir()
            tokenizer(staged / TOKENIZER_FOLDER)
        return {
            "versions": {"lorac": VERSION, **_installed_versions("torch", compiled.engine.target)},
            "target": compiled.engine.target,
            "mode": compiled.mode,
            "active": choice_to_json(compiled.choice),
            "adapters": _save_adapters(compiled, staged / ADAPTERS, save_adapter),
            "plans": {path: plan_to_json(plan) for path, plan in compiled.plans.items()},
            "reductions": reductions,
            "program": store(staged),
            "components": {name: traits.to_json() for name, traits in compiled.services.traits.items()},
            "host": host,
        }

    with translate_os_errors(folder, ArtifactError, "written"):
        write_artifact(folder, fill)


def _save_adapters(
    compiled: Compiled,
    folder: Path,
    save_adapter: Callable[[Any, Callable[[], PreparedAdapter], Path], Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    saved = {}
    for name, stem in _file_stems(sorted(compiled.adapters)).items():
        entry = save_adapter(compiled.adapters[name], functools.partial(compiled.pool.__getitem__, name), folder / stem)
        files = {what: f"{folder.name}/{told}" if what in ADAPTER_FILES else told for what, told in entry.items()}
        saved[name] = {**files, "portable": _save_portable(compiled, name, folder / stem)}
    return saved


def _save_portable(compiled: Compiled, name: str, stem: Path) -> dict[str, str]:
    """Write an adapter for those who run the program without lorac; graph -> the file's name, where there is one."""
    graphs = compiled.engine.interfaces if compiled.engine.portable else ()
    files = {graph: f"{stem.name}{'' if graph == MAIN_GRAPH else f'.{graph}'}.onnx_adapter" for graph in graphs}
    try:
        for graph, file in files.items():
            compiled.save_choice(stem.with_name(file), name, graph)
    except Unavailable as error:
        warn(f"adapter '{name}' is saved for lorac alone: {error.what}")
        return {}
    return {graph: f"{stem.parent.name}/{file}" for graph, file in files.items()}


def _file_stems(names: Sequence[str]) -> dict[str, str]:
    """What each adapter's files are called: as it is where every system can, else by its number."""
    stems: dict[str, str] = {}
    for index, name in enumerate(names):
        own = _PORTABLE_NAME.fullmatch(name) and name.lower() not in {stem.lower() for stem in stems.values()}
        stems[name] = name if own else f"_{index}"
    return stems


def _installed_versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_artifact(folder: str | os.PathLike[str], fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write an artefact; what was at its place before stays there unless everything succeeds.

    Args:
        folder: where it goes: nowhere yet, an empty folder, or an older artefact, which it replaces.
        fill: (empty folder) -> the manifest's fields but version and files; writes all other files.

    Raises:
        ArtifactError: the folder holds something else, or besides an artefact what its manifest does not list.
    """
    target = Path(folder)
    read_consistently(target, lambda: _check_replaceable(target))
    with replace_atomically(target, _owned_files) as staged:
        staged.mkdir()
        fields = fill(staged)
        manifest = seal_manifest({"lorac_artifact": FORMAT, **fields, "files": _file_entries(staged)})
        (staged / MANIFEST).write_text(dump_json(manifest, indent=1) + "\n", encoding="utf-8")


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of all its other fields."""
    rest = {field: value for field, value in manifest.items() if field != _SEAL}
    return {**rest, _SEAL: hashlib.blake2b(dump_json(rest).encode(), digest_size=16).hexdigest()}


def _check_replaceable(target: Path) -> None:
    """Nothing is replaced but an older artefact that holds what lorac wrote, and nothing else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    owned = _owned_files(target)
    if not owned:
        raise ArtifactError(
            f"'{target}' exists and is no artefact", next_step="give a new folder, an empty one, or an older artefact"
        )
    strange = list_foreign(target, owned)
    if strange:
        named = ", ".join(map(repr, strange[:_LISTED_FILES]))
        more = f" and {len(strange) - _LISTED_FILES} more" if len(strange) > _LISTED_FILES else ""
        raise ArtifactError(
            f"the artefact '{target}' also holds {named}{more}, which lorac did not write",
            next_step="move that elsewhere, or give another folder",
        )


def _owned_files(folder: Path) -> frozenset[str]:
    """Names of the files of an artefact, of whatever version, as its manifest lists them; none where it is none."""
    try:
        manifest = parse_object(read_json_text(folder / MANIFEST), ArtifactError)
    except (LoracError, OSError):
        return frozenset()
    files = manifest.get("files")
    if not isinstance(manifest.get("lorac_artifact"), int) or not isinstance(files, dict):
        return frozenset()
    return frozenset({*files, MANIFEST})


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_entries(folder: Path) -> dict[str, Any]:
    files = ((path.relative_to(folder).as_posix(), OpenFile(path)) for path in _all_files(folder))
    return {name: {"bytes": file.size, "hash": file.digest()} for name, file in files}


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def open_artifact(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, OpenFile]]:
    """The manifest of an artefact, and its program's files by name: each opened once, and held against it.

    Adapters, of which there may be more than a process may hold open, are opened one by one (``opened_adapter``); what
    they are for others is only checked.

    Raises:
        ArtifactError: no artefact, a damaged or foreign manifest, another version, a path that leads out of the folder,
            a missing file, one of another size or hash, or one that the manifest does not list.
    """
    folder = Path(folder)
    with translate_os_errors(folder, ArtifactError, "read"):
        return read_consistently(folder, lambda: _open_steady(folder))


def _open_steady(folder: Path) -> tuple[dict[str, Any], dict[str, OpenFile]]:
    manifest = _read_manifest(folder)
    entries = [entry for entry in manifest["adapters"].values() if isinstance(entry, dict)]
    later = [entry.get(what) for entry in entries for what in ADAPTER_FILES]
    portable = [file for entry in entries for file in dict(entry.get("portable", ())).values()]
    files = {}
    for name, entry in manifest["files"].items():
        if name in later:
            continue
        file = _open_checked(folder, name, entry)
        if name not in portable:  # nobody reads those here
            files[name] = file
    listed = {*manifest["files"], MANIFEST}
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in listed:
            raise ArtifactError(f"'{path}' is not in the artefact's manifest", next_step="remove it, or save again")
    return manifest, files


def open_adapter(folder: Path, manifest: Mapping[str, Any], name: str, what: str = RECORD) -> OpenFile:
    """A file of an adapter, opened once and held against the manifest.

    Args:
        folder, manifest: of the artefact.
        name: the adapter's.
        what: which of its files, one of ``FILES``.

    Raises:
        ArtifactError: as ``opened``; also where the manifest does not list it, or where another artefact took the
            folder's place since the manifest was read: then its hash is another.
    """
    entry = manifest["adapters"][name]
    file = entry.get(what) if isinstance(entry, dict) else None
    if not isinstance(file, str) or file not in manifest["files"]:
        raise _damaged_manifest(folder, f"it speaks of the file {file!r}, which it does not list")
    return _open_checked(folder, file, manifest["files"][file])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(
            f"'{folder}' is no artefact: it has no {MANIFEST}", next_step="compiled.save(folder) writes one"
        )
    with charge_reading(path):
        manifest = parse_object(read_json_text(path), lambda reason: _damaged_manifest(folder, f"it {reason}"))
    if not isinstance(manifest.get("lorac_artifact"), int):
        raise ArtifactError(
            f"'{folder}' is no compiled model: its {MANIFEST} is none of lorac's",
            next_step="compiled.save(folder) writes one, to a folder of its own",
        )
    if manifest["lorac_artifact"] != FORMAT:
        raise ArtifactError(
            f"'{folder}' is version {manifest['lorac_artifact']} of the format, this lorac reads {FORMAT}",
            next_step=f"it was saved by {manifest.get('versions', 'an unknown version')}; save it again with this one",
        )
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            raise _damaged_manifest(folder, f"'{field}' is missing, or of another type")
    if seal_manifest(manifest) != manifest:
        raise _damaged_manifest(folder, f"it was changed since it was written, as its {_SEAL} tells")
    return manifest


def _open_checked(folder: Path, name: str, entry: Any) -> OpenFile:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in parts[0] or {"..", "."} & set(name.split("/")):
        raise _unsafe_path(folder, name)
    path = folder.joinpath(*parts)
    if any(folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))):
        raise _unsafe_path(folder, name)
    if not path.is_file():
        raise ArtifactError(f"the artefact '{folder}' lacks the file '{name}'", next_step="copy the whole folder again")
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "hash"}:
        raise _damaged_manifest(folder, f"the entry of '{name}' is not bytes and hash")
    file = OpenFile(path)
    size = file.size
    if size != entry["bytes"]:
        raise ArtifactError(
            f"'{path}' has {size} bytes, the manifest says {entry['bytes']}", next_step="copy the whole folder again"
        )
    found = file.digest()
    if found != entry["hash"]:
        raise ArtifactError(
            f"'{path}' has the hash {found}, the manifest says {entry['hash']}",
            next_step="it was changed or damaged: copy the whole folder again",
        )
    return file


def _unsafe_path(folder: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"the manifest of '{folder}' names the file '{name}', which leads out of the folder",
        next_step="do not use this artefact: lorac does not write such paths",
    )


def _damaged_manifest(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the manifest of '{folder}' is damaged: {reason}", next_step="copy the whole folder again, or save it anew"
    )
