"""What an artefact's manifest says, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.runtime import artifact


@dataclass(frozen=True)
class Manifest:
    """A manifest whose files were checked.

    Attributes:
        target, mode: as compiled.
        plans: site path -> its plan as JSON.
        active: the active choice as JSON.
        adapters: name -> its file.
        host: the host's skeleton.
        program: what the target needs besides.
        components: graph name -> what was told of its host.
    """

    target: str
    mode: str
    plans: Mapping[str, Any]
    active: Mapping[str, Any]
    adapters: Mapping[str, Path]
    host: Mapping[str, Any]
    program: Mapping[str, Any]
    components: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """The manifest of an artefact, with every file it lists held against it (``artifact.read``)."""
        told = artifact.read(folder)
        return cls(
            target=told["target"],
            mode=told["mode"],
            plans=told["plans"],
            active=told["active"],
            adapters={n: artifact.inside(told, folder, entry["file"]) for n, entry in told["adapters"].items()},
            host=told["host"],
            program=told["program"],
            components=told["components"],
        )
