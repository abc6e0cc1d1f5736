"""The journal of the zoo: one JSON object a line, of one model on one state of the code; a run is resumed from it.

``docs/models.jsonl`` has the newest record of every model, from any run; docs/models.md is made from it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / ".cache" / "zoo.jsonl"
KEPT = ROOT / "docs" / "models.jsonl"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "torchvision",
    "timm",
    "diffusers",
    "onnxruntime",
    "onnxscript",
    "openvino",
)
_NOT_KEPT = ("parameters", "defaults", "seconds", "peak")
"""Fields of a record that the page does not say."""
Record = dict[str, Any]


def code() -> str:
    """Hash lorac's sources."""
    digest = hashlib.sha256()
    for source in sorted((ROOT / "lorac").rglob("*.py")):
        digest.update(source.relative_to(ROOT).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of the libraries that models come from and run on, as far as they are installed."""
    found = {name: list(importlib.metadata.distributions(name=name)) for name in LIBRARIES}
    return {name: installed[0].version for name, installed in found.items() if installed}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record, whole or not at all as far as readers that skip a torn last line are concerned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(*paths: Path) -> dict[str, Record]:
    """Return what the newest records say of every model; a line that a killed run tore is passed over.

    A record of what a model generates alone leaves the ways of an earlier one, and the other way round; one of some
    engines leaves those of the others too.
    """
    found: dict[str, Record] = {}
    for line in (line for path in paths if path.exists() for line in path.read_text().splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        old = found.get(record["model"], {})
        kept = old if "ways" not in record else {name: old[name] for name in ("generation", "engines") if name in old}
        engines = {**old.get("engines", {}), **record.get("engines", {})}
        found[record["model"]] = {**kept, **record, **({"engines": engines} if engines else {})}
    return found


def keep(path: Path, records: Iterable[Record]) -> None:
    """Write the records that the page is made from, by the models' names."""
    kept = [{field: value for field, value in record.items() if field not in _NOT_KEPT} for record in records]
    kept.sort(key=lambda record: str(record["model"]))
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) for record in kept)
    path.write_text("".join(f"{line}\n" for line in lines))
