"""Adapters in their normal forms in a file, so that serving them needs no formula.

    <site path>/<letter>           a tensor of a change (``lorac.ir.algebra.changes.to_outputs``)
    <site path>/params/<name>      a parameter of a branch, whose formula is in the program

The metadata entry "forms" is JSON with the form of each change and the rest of the description. A tensor that sites
share is stored once, and is one tensor again when it is read.
"""

from pathlib import Path

from torch import Tensor

from lorac.errors import ArtifactError
from lorac.ir.algebra.changes import SparseSum, from_outputs, to_outputs
from lorac.ir.slots.plans import BranchTerm, PreparedAdapter, Reason
from lorac.storage.open_file import OpenFile
from lorac.storage.plans import branch_from_json, branch_to_json
from lorac.storage.strict_json import dump_json, parse_object
from lorac.storage.tensor_file import TensorFile

_ENTRY = "forms"


def write_normal_forms(path: Path, prepared: PreparedAdapter) -> None:
    """Write an adapter's normal forms; equal forms give equal bytes."""
    tensors: dict[str, Tensor] = {}
    changes, branches = {}, {}
    for site, change in prepared.changes.items():
        assert not isinstance(change, SparseSum)  # only sums of several adapters are sparse sums
        form, parts = to_outputs(change)
        changes[site] = {"form": form, "letters": [*parts]}
        tensors |= {_letter(site, letter): part for letter, part in parts.items()}
    for site, term in prepared.branches.items():
        branches[site] = branch_to_json(term.slot)
        tensors |= {_parameter(site, name): part for name, part in zip(term.slot.params, term.params, strict=True)}
    description = {
        "changes": changes,
        "branches": branches,
        "truncatable": prepared.truncatable,
        "reasons": [[reason.adapter, reason.site, reason.why] for reason in prepared.reasons],
        "sizes": dict(prepared.sizes),
    } | ({"invocation": [*prepared.invocation]} if prepared.invocation else {})
    TensorFile.write(path, tensors, notes={_ENTRY: dump_json(description)})


def read_normal_forms(opened: OpenFile) -> PreparedAdapter:
    """Read an adapter's normal forms into memory.

    Raises:
        ArtifactError: the file has no valid description.
    """

    def damaged(reason: str) -> ArtifactError:
        return ArtifactError(
            f"the description in '{opened.where}' {reason}", next_step="copy the whole folder again, or save it anew"
        )

    file = TensorFile(opened)
    entries = parse_object(file.notes.get(_ENTRY, ""), damaged)
    tensors = file.load_all()
    changes = {}
    for site, stored in entries["changes"].items():
        parts = {letter: tensors[_letter(site, letter)] for letter in stored["letters"]}
        changes[site] = from_outputs(stored["form"], parts, None)
    branches = {}
    for site, stored in entries["branches"].items():
        slot = branch_from_json(site, stored)
        branches[site] = BranchTerm(slot, tuple(tensors[_parameter(site, name)] for name in slot.params))
    return PreparedAdapter(
        changes=changes,
        branches=branches,
        truncatable=entries["truncatable"],
        reasons=tuple(Reason(*reason) for reason in entries["reasons"]),
        sizes=entries.get("sizes", {}),
        invocation=tuple(entries.get("invocation", ())),
    )


def _letter(site: str, letter: str) -> str:
    return f"{site}/{letter}"


def _parameter(site: str, name: str) -> str:
    return f"{site}/params/{name}"
