"""What an artefact's manifest says, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.session import artifact
from lorac.storage.open_file import OpenFile


@dataclass(frozen=True)
class Manifest:
    """A manifest whose files were checked.

    Attributes:
        folder: the artefact.
        told: the whole manifest.
        files: the program's files by name, held.
        target, mode: as compiled.
        plans: site path -> its plan as JSON.
        reductions: what the adapters' formulas were reduced to, by structure, as JSON.
        active: the active choice as JSON.
        host: the host's skeleton.
        program: what the target needs besides.
        components: graph name -> what was told of its host.
    """

    folder: Path
    told: Mapping[str, Any]
    files: Mapping[str, OpenFile]
    target: str
    mode: str
    plans: Mapping[str, Any]
    reductions: Mapping[str, Any]
    active: Mapping[str, Any]
    host: Mapping[str, Any]
    program: Mapping[str, Any]
    components: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """The manifest of an artefact, with the program's files held against it (``artifact.opened``)."""
        told, files = artifact.open_artifact(folder)
        return cls(
            folder=folder,
            told=told,
            files=files,
            target=told["target"],
            mode=told["mode"],
            plans=told["plans"],
            reductions=told["reductions"],
            active=told["active"],
            host=told["host"],
            program=told["program"],
            components=told["components"],
        )

    def adapters(self) -> Iterator[tuple[str, OpenFile, OpenFile | None]]:
        """Each adapter's name, its record, and its normal forms where it has them, opened and checked when asked for.

        Of all of them together there may be more than a process may hold open.
        """
        for name, entry in self.told["adapters"].items():
            record = artifact.open_adapter(self.folder, self.told, name)
            formed = artifact.FORMS in entry
            yield (
                name,
                record,
                artifact.open_adapter(self.folder, self.told, name, artifact.FORMS) if formed else None,
            )
