"""``compiled.explain()``: how each adapter runs at each site, its cost, and why it does not run more cheaply."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lorac.errors import escape_controls
from lorac.ir.algebra.reduction import BRANCH
from lorac.ir.calls.sizes import shorten_condition
from lorac.ir.slots.roles import ROLES
from lorac.report.terms import TermRow, format_reason, format_size

_Row = TypeVar("_Row", TermRow, "AdapterRow")
_FOLD_LIMIT = 3
"""Lines that differ only in their adapters become one where there are more than these."""
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its method, states and size.

    Attributes:
        name, method: the adapter's name; its method and hyper-parameters.
        states: state -> number of its terms in it.
        nbytes: size of its tensors in their normal form.
        strength: in the active choice; 0: off.
        apart: why rows with it take a call of their own, where other rows share one; else empty.
    """

    name: str
    method: str
    states: Mapping[str, int]
    nbytes: int
    strength: float
    apart: str = ""


@dataclass(frozen=True)
class ProgramRow:
    """The limits of a graph that runs as a program, compared with the model.

    Attributes:
        graph: its name; empty for a single model.
        fixed: (input, axis, size, line) of each axis that the trace of the model fixed; the line of the model that
            fixed it, or None where that is not known.
        sizes: conditions on the sizes that vary, except plain equality.
        notes: further notes for callers.
    """

    graph: str
    fixed: tuple[tuple[str, int, int, str | None], ...]
    sizes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The result of ``compiled.explain()``; its ``str`` is for people.

    Attributes:
        target, mode, active: as compiled; the active choice in one line.
        adapters: one row per adapter.
        terms: one row per adapter and site.
        reserved: paths of sites that have slots and no adapter.
        bare: paths of sites without slots.
        casts: (dtype of the model or the request, dtype of the computation), where the target lacks the first.
        programs: the limits of each graph that runs as a program.
        other_target: another target to compare with; empty: none.
        unsupported_ops: the ops that the other target does not compute, each with its module and source line.
        rows: how rows with choices of their own run; empty where all have the choice that is baked in.
    """

    target: str
    mode: str
    active: str
    adapters: tuple[AdapterRow, ...]
    terms: tuple[TermRow, ...]
    reserved: tuple[str, ...]
    bare: tuple[str, ...]
    casts: tuple[tuple[str, str], ...]
    programs: tuple[ProgramRow, ...] = ()
    other_target: str = ""
    unsupported_ops: tuple[str, ...] = ()
    rows: str = ""

    def __str__(self) -> str:
        return escape_controls("\n".join(_explanation_lines(self)) + "\n")


def _explanation_lines(report: Explanation) -> Iterator[str]:
    yield f"{report.target}, {report.mode}, active: {report.active}"
    if report.rows:
        yield f"rows: {report.rows}"
    for before, after in report.casts:
        yield f"computed in {after}: {report.target} has no kernels for {before}"
    for program in report.programs:
        head = f"{program.graph}: " if program.graph else ""
        for name, axis, size, line in program.fixed:
            at = f", at {line}" if line else ""
            yield f"{head}axis {axis} of '{name}' is fixed to {size} by the trace of the model{at}"
        if program.sizes:
            shown = [shorten_condition(text) for text in program.sizes[:_FOLD_LIMIT]]
            more = len(program.sizes) - len(shown)
            yield f"{head}sizes: {', '.join(shown)}" + (f" and {more} more conditions" if more else "")
        yield from (f"{head}{note}" for note in program.notes)
    if report.other_target and not report.unsupported_ops:
        yield f"{report.other_target} claims every op of the program"
    yield from (f"{report.other_target} does not compute {op}" for op in report.unsupported_ops)
    for row, names in _fold_rows(report.adapters, lambda row: replace(row, name="")):
        states = ", ".join(f"{count} {state}" for state, count in sorted(row.states.items())) or "no term"
        each = f"{format_size(row.nbytes)}{' each' if len(names) > 1 else ''}{'' if row.strength else '  off'}"
        yield f"{_elide_names(names)}: {row.method}  {states}  {each}"
        if row.apart:
            yield f"  rows: a call for each choice with it, since {row.apart}"
    yield ""
    yield from _site_lines(report)
    for what, paths in (("reserved, no adapter", report.reserved), ("bare", report.bare)):
        if paths:
            counts = Counter(map(_layer_pattern, paths))
            yield f"{what}: {', '.join(f'{path} x {n}' if n > 1 else path for path, n in counts.items())}"
    slots = {role for row in report.terms if row.form != BRANCH for role in row.slots}
    meanings = [f"{role.letter} {role.meaning}" for role in ROLES.values() if role.name in slots]
    if meanings:
        yield f"slots: {', '.join(meanings)}"


def _site_lines(report: Explanation) -> Iterator[str]:
    """Yield the sites with their terms in columns; sites that differ only in the number of their layer are one."""

    def without_adapter(row: TermRow) -> TermRow:  # rows of similar adapters are then equal
        own = (replace(reason, adapter="") if reason.adapter == row.adapter else reason for reason in row.reasons)
        return replace(row, adapter="", reasons=tuple(own))

    groups: dict[tuple[str, tuple[TermRow, ...]], int] = {}
    by_site: dict[str, list[TermRow]] = {}
    for row in report.terms:
        reasons = tuple(replace(reason, site="") for reason in row.reasons)
        by_site.setdefault(row.site, []).append(replace(row, site="", reasons=reasons))  # equal for similar sites
    for site, found in by_site.items():
        key = (_layer_pattern(site), tuple(found))
        groups[key] = groups.get(key, 0) + 1
    shown = {key: list(_fold_rows(key[1], without_adapter)) for key in groups}
    columns = [_term_cells(row, names) for folded in shown.values() for row, names in folded]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)] if columns else []
    for key, count in groups.items():
        first = key[1][0]
        yield f"{key[0]}  {first.kind} {first.shape[0]} -> {first.shape[1]}" + (f"  x {count}" if count > 1 else "")
        for row, names in shown[key]:
            cells = [cell.ljust(width) for cell, width in zip(_term_cells(row, names), widths, strict=True)]
            yield ("  " + "  ".join(cells)).rstrip()
            yield from (f"      why: {format_reason(reason, names)}" for reason in row.reasons)


def _fold_rows(rows: Sequence[_Row], key: Callable[[_Row], object]) -> Iterator[tuple[_Row, list[str]]]:
    """Yield the rows with the names of their adapters; rows that are equal for many adapters are yielded once."""
    names_by_key: dict[str, list[str]] = {}
    for row in rows:
        names_by_key.setdefault(repr(key(row)), []).append(_adapter_name(row))
    for row in rows:
        names = names_by_key[repr(key(row))]
        if len(names) <= _FOLD_LIMIT:
            yield row, [_adapter_name(row)]
        elif names[0] == _adapter_name(row):
            yield row, names


def _adapter_name(row: TermRow | AdapterRow) -> str:
    return row.adapter if isinstance(row, TermRow) else row.name


def _elide_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} x {len(names)}"


def _term_cells(row: TermRow, names: Sequence[str]) -> tuple[str, ...]:
    slots = row.slots if row.form == BRANCH else [ROLES[role].letter for role in row.slots]
    swap = f"swap: {row.swap}"
    return (_elide_names(names), row.form, row.state, " ".join(slots), row.dtype, format_size(row.nbytes), swap)


def _layer_pattern(path: str) -> str:
    return _LAYER_NUMBER.sub("*", path)
