"""Artifacts: a compiled model as a folder that needs neither the original model nor its weights elsewhere.

    manifest.json                    the contents of the folder and how they fit together
    adapters/<name>.safetensors      the adapters, in lorac's own format
    adapters/<name>.forms.safetensors  normal forms of an adapter whose method is not lorac's own
    adapters/<name>.onnx_adapter     the adapter as ONNX Runtime reads it, if the program runs without lorac; one for
                                     each of several components; of a portable program .slots.safetensors
    tokenizer/…                      the tokenizer as it writes itself, if there is one
    …                                the program and its weights, as the target stores them

An adapter whose name is not portable as a file name has a number as its file's name; the manifest says which.

The manifest has the versions, target and mode, the plan of every site, the active choice, the reductions of the
adapters' formulas, the model's skeleton, the target's own entries, size and hash of every other file, and last a hash
over all this. It has no time stamp, path or random name, and the folder has no pickle: equal input gives equal
bytes, and loading runs no code that the artifact names. Only a package of target aoti is code, which needs trust.

A folder is written next to its target, and replaces the target atomically when it is complete; a failed write leaves
nothing. It replaces only an older artifact, and only files that the older manifest lists.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorac.errors import ArtifactError, LoracError, list_some
from lorac.limits import charge_reading
from lorac.storage.atomic_folders import MANIFEST, list_foreign, read_consistently, replace_atomically
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import find_inner_path, translate_os_errors
from lorac.storage.strict_json import JsonObject, dump_json, parse_object, read_json_text

FORMAT = 6
ADAPTERS = "adapters"
RECORD, FORMS = "file", "forms"
ADAPTER_FILES = (RECORD, FORMS)
"""The manifest's fields for an adapter's files: its record and its normal forms."""
_SEAL = "seal"
_LISTED_FILES = 5
"""Number of foreign files that a message names."""
_FIELDS: dict[str, type] = {
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
"""The fields of a manifest and their types. Plans are by site path, reductions by structure, components by graph."""


def write_artifact(folder: str | os.PathLike[str], fill: Callable[[Path], JsonObject]) -> None:
    """Write an artifact; if anything fails, the folder stays as it was.

    Args:
        folder: a folder that does not exist yet, an empty folder, or an older artifact, which is replaced.
        fill: writes all files but the manifest into an empty folder, and returns the manifest's fields except version
            and files.

    Raises:
        ArtifactError: the folder contains something else, or an artifact and other files.
        OSError: it cannot be written.
    """
    target = Path(folder)
    read_consistently(target, lambda: _check_replaceable(target))
    with replace_atomically(target, _owned_files) as staged:
        staged.mkdir()
        fields = fill(staged)
        write_manifest(staged / MANIFEST, {"lorac_artifact": FORMAT, **fields, "files": describe_files(staged)})


def write_manifest(file: Path, fields: JsonObject) -> None:
    """Write a manifest with its seal."""
    file.write_text(dump_json(seal_manifest(fields), indent=1) + "\n", encoding="utf-8")


def seal_manifest(manifest: JsonObject) -> dict[str, object]:
    """Return a manifest with its seal, a hash of all other fields."""
    rest = {field: value for field, value in manifest.items() if field != _SEAL}
    return {**rest, _SEAL: hashlib.blake2b(dump_json(rest).encode(), digest_size=16).hexdigest()}


def _check_replaceable(target: Path) -> None:
    """Refuse to replace anything but an artifact without foreign files."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    owned = _owned_files(target)
    if not owned:
        raise ArtifactError(
            f"'{target}' exists and is not an artifact",
            next_step="give a new folder, an empty one, or an older artifact",
        )
    foreign = list_foreign(target, owned)
    if foreign:
        named = list_some(foreign, _LISTED_FILES)
        raise ArtifactError(
            f"the artifact '{target}' also holds {named}, which lorac did not write",
            next_step="move that elsewhere, or give another folder",
        )


def _owned_files(folder: Path) -> frozenset[str]:
    """Return the files that an artifact's manifest of any version lists; empty if there is no artifact."""
    try:
        manifest = parse_object(read_json_text(folder / MANIFEST), ArtifactError)
    except (LoracError, OSError):
        return frozenset()
    files = manifest.get("files")
    if not isinstance(manifest.get("lorac_artifact"), int) or not isinstance(files, dict):
        return frozenset()
    return frozenset({*files, MANIFEST})


def describe_files(folder: Path) -> JsonObject:
    """Return size and hash of every file below a folder, by its name relative to the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = ((path.relative_to(folder).as_posix(), OpenFile(path)) for path in paths)
    return {name: {"bytes": file.size, "hash": file.digest()} for name, file in files}


@dataclass(frozen=True)
class Manifest:
    """An artifact's manifest, whose seal and files were checked.

    Attributes:
        fields: the manifest's fields (``_FIELDS``).
        files: the program's files by name, open.
    """

    folder: Path
    fields: JsonObject
    files: Mapping[str, OpenFile]

    def adapters(self) -> Iterator[tuple[str, OpenFile, OpenFile | None]]:
        """Yield each adapter's name, its record, and its normal forms if the artifact has them.

        Each file is opened and checked when it is reached: there may be more files than a process can have open.
        """
        for name, entry in self.fields["adapters"].items():
            yield name, self.open_adapter(name), self.open_adapter(name, FORMS) if FORMS in entry else None

    def open_adapter(self, name: str, field: str = RECORD) -> OpenFile:
        """Open a file of an adapter and check it against the manifest.

        Raises:
            ArtifactError: as ``open_artifact``; or the manifest does not list the file, or another artifact replaced
                the folder since the manifest was read, so that the file has another hash.
        """
        entry, files = self.fields["adapters"][name], self.fields["files"]
        file = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(file, str) or file not in files:
            raise _damaged_manifest(self.folder, f"it names the file {file!r}, which is not in its list of files")
        return open_checked(self.folder, file, files[file])


def open_artifact(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an artifact; open its program's files, and check them against the manifest.

    Adapters are opened one by one later. ``.onnx_adapter`` files are only checked.

    Raises:
        ArtifactError: not an artifact, a damaged or foreign manifest, another version, a path that leads out of the
            folder, a missing file, a file of another size or hash, or a file that the manifest does not list.
    """
    path = Path(folder)
    with translate_os_errors(path, ArtifactError, "read"):
        return read_consistently(path, lambda: _open_all(path))


def _open_all(folder: Path) -> Manifest:
    fields = _read_fields(folder)
    entries = [entry for entry in fields["adapters"].values() if isinstance(entry, dict)]
    adapters = [entry.get(field) for entry in entries for field in ADAPTER_FILES]
    portable = [file for entry in entries for file in dict(entry.get("portable", ())).values()]
    checked = {
        name: open_checked(folder, name, entry) for name, entry in fields["files"].items() if name not in adapters
    }
    listed = {*fields["files"], MANIFEST}
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in listed:
            raise ArtifactError(f"'{path}' is not in the artifact's manifest", next_step="remove it, or save again")
    return Manifest(folder, fields, {name: file for name, file in checked.items() if name not in portable})


def _read_fields(folder: Path) -> JsonObject:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(
            f"'{folder}' is not an artifact: it has no {MANIFEST}", next_step="compiled.save(folder) writes one"
        )
    fields = read_manifest(path)
    if not isinstance(fields.get("lorac_artifact"), int):
        raise ArtifactError(
            f"'{folder}' is not a compiled model: its {MANIFEST} is not lorac's",
            next_step="give a folder that compiled.save(folder) wrote",
        )
    if fields["lorac_artifact"] != FORMAT:
        raise ArtifactError(
            f"'{folder}' is version {fields['lorac_artifact']} of the format, and this lorac reads {FORMAT}",
            next_step=f"it was saved by {fields.get('versions', 'an unknown version')}; save it again with this one",
        )
    check_manifest(folder, fields, _FIELDS)
    return fields


def read_manifest(file: Path) -> JsonObject:
    """Parse a manifest; raises ``ArtifactError`` where it is not JSON."""

    def read() -> JsonObject:
        return parse_object(read_json_text(file), lambda reason: _damaged_manifest(file.parent, f"it {reason}"))

    return charge_reading(file, read)


def check_manifest(folder: Path, fields: JsonObject, kinds: Mapping[str, type]) -> None:
    """Check the types of a manifest's fields, and its seal.

    Raises:
        ArtifactError: a field is missing or of another type, or a field was changed.
    """
    for field, kind in kinds.items():
        if not isinstance(fields.get(field), kind):
            raise _damaged_manifest(folder, f"'{field}' is missing, or of another type")
    if seal_manifest(fields) != fields:
        raise _damaged_manifest(folder, f"its {_SEAL} shows that it was changed after it was written")


def open_checked(folder: Path, name: str, entry: JsonObject) -> OpenFile:
    """Open a file of a folder and check it against its entry in the manifest (``describe_files``).

    Raises:
        ArtifactError: the name leads out of the folder, the file is missing, or has another size or hash.
    """
    path = find_inner_path(folder, name)
    if path is None:
        raise ArtifactError(
            f"the manifest of '{folder}' names the file '{name}', which leads out of the folder",
            next_step="do not use this folder: lorac does not write such paths",
        )
    if not path.is_file():
        raise ArtifactError(f"'{folder}' lacks the file '{name}'", next_step="copy the whole folder again")
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "hash"}:
        raise _damaged_manifest(folder, f"the entry of '{name}' has other keys than 'bytes' and 'hash'")
    file = OpenFile(path)
    size = file.size
    if size != entry["bytes"]:
        raise ArtifactError(
            f"'{path}' has {size} bytes, the manifest says {entry['bytes']}", next_step="copy the whole folder again"
        )
    digest = file.digest()
    if digest != entry["hash"]:
        raise ArtifactError(
            f"'{path}' has the hash {digest}, the manifest says {entry['hash']}",
            next_step="copy the whole folder again: the file was changed or damaged",
        )
    return file


def _damaged_manifest(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the manifest of '{folder}' is damaged: {reason}")
