"""explain: per site what was done with each adapter, what it costs, and why not something cheaper."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorac.ir.host.sites import Site, SiteKind
from lorac.ir.slots.choice import describe
from lorac.ir.slots.site import SitePlan
from lorac.ir.view.dump import short_dtype
from lorac.ir.view.terms import BAKED, BOUND, FUSED, Term, describe_terms, describe_variant

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class TermRow:
    """What became of one adapter at one site.

    Attributes:
        site: path of the site.
        kind: what the site computes.
        shape: (in, out).
        adapter: the adapter's name.
        form: its normal form, with rank or count.
        state: ``live``, ``bound``, ``fused`` or ``baked`` (``lorac.ir.view.terms.Term``).
        strength: in the active choice; 0: off.
        slots: which of the site's slots it fills.
        dtype: dtype it is computed in.
        nbytes: size of its tensors.
        swap: what switching to it costs.
        reasons: why it has no cheaper form or place.
    """

    site: str
    kind: str
    shape: tuple[int, int]
    adapter: str
    form: str
    state: str
    strength: float
    slots: tuple[str, ...]
    dtype: str
    nbytes: int
    swap: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its method, where it sits and how large it is.

    Attributes:
        name, method: the adapter's name; its method and hyper-parameters.
        states: how many of its terms are live, bound, fused, baked.
        nbytes: size of its tensors in their normal form.
        strength: in the active choice; 0: off.
    """

    name: str
    method: str
    states: Mapping[str, int]
    nbytes: int
    strength: float


@dataclass(frozen=True)
class Report:
    """What ``compiled.explain()`` answers; ``str`` of it is for people.

    Attributes:
        target, mode, active: as compiled; the active choice in one line.
        adapters: one row per adapter.
        terms: one row per adapter and site.
        reserved: paths of sites that have slots and no adapter.
        bare: paths of sites that run as the model has them.
        casts: dtypes of the model that the target computes with in another one.
    """

    target: str
    mode: str
    active: str
    adapters: tuple[AdapterRow, ...]
    terms: tuple[TermRow, ...]
    reserved: tuple[str, ...]
    bare: tuple[str, ...]
    casts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(_text(self)) + "\n"


def explain(compiled: Any) -> Report:
    """The report of a compiled model, as it is now."""
    plans: Mapping[str, SitePlan] = compiled.plans
    strengths, mode = compiled.active, compiled.mode
    terms = describe_terms(compiled.pool, plans, mode=mode, strengths=strengths)
    rows = tuple(
        _row(term, plans[path], compiled.services.reasons(term.adapter, path), mode)
        for path, found in terms.items()
        for term in found
    )
    adaptable = [path for path, s in compiled.sites.items() if s.kind not in (SiteKind.BLOCK, SiteKind.PARAMETER)]
    return Report(
        target=compiled.engine.target,
        mode=mode,
        active=describe(compiled.choice),
        adapters=tuple(_adapter(n, a, rows, strengths) for n, a in compiled.adapters.items()),
        terms=rows,
        reserved=tuple(path for path, plan in plans.items() if not plan.empty and path not in terms),
        bare=tuple(path for path in adaptable if path not in plans or plans[path].empty),
        casts=tuple((short_dtype(a), short_dtype(b)) for a, b in compiled.services.casts),
    )


def _row(term: Term, plan: SitePlan, reasons: Sequence[str], mode: str) -> TermRow:
    site = plan.site
    own = tuple(reason for reason in plan.reasons if f"'{term.adapter}'" in reason)
    cheapest = term.form == "low-rank" and term.state not in (BOUND, FUSED)
    known = reasons or ((term.unfusable,) if term.unfusable else ())
    why = () if cheapest or term.state == BAKED else (*known, *own, *_asked(term, mode))
    return TermRow(
        site=term.site,
        kind=str(site.kind),
        shape=(site.in_features, site.out_features),
        adapter=term.adapter,
        form=" ".join(part for part in (term.form, term.size) if part),
        state=term.state,
        strength=term.strength,
        slots=_slots(term, plan),
        dtype=_dtype(term, site),
        nbytes=term.nbytes,
        swap=_swap_cost(term, site),
        reasons=tuple(dict.fromkeys(why)),
    )


def _asked(term: Term, mode: str) -> tuple[str, ...]:
    return (f"mode='{mode}' merges every adapter into the weight",) if term.state == FUSED else ()


def _slots(term: Term, plan: SitePlan) -> tuple[str, ...]:
    """Names of the slots a term fills."""
    if term.state == BAKED:
        return ()
    if term.state in (BOUND, FUSED):
        return tuple(role.name for role, _ in plan.roles() if role.merged)
    if term.form == "branch":
        return tuple(part.name for part in term.parts)
    held = {part.name for part in term.parts}
    return tuple(role.name for role, _ in plan.roles() if role.letter in held)


def _dtype(term: Term, site: Site) -> str:
    floating = [part.dtype for part in term.parts if part.dtype.is_floating_point]
    own = floating[0] if floating else site.dtype
    return short_dtype(own if own == site.dtype or term.state == "live" else site.dtype)


def _swap_cost(term: Term, site: Site) -> str:
    """What switching to the adapter alone costs at this site, by its form (docs/architecture.md, invariant 7)."""
    weight = site.out_features * site.in_features * torch.empty(0, dtype=site.dtype).element_size()
    if term.state == BAKED:
        return "none: constants of the program"
    if term.state == BOUND:
        return f"once {_size(weight)} for its merged weight, then rebinding"
    if term.state == FUSED and term.form == "sparse":
        return f"restore and write of {_size(next(p.nbytes for p in term.parts if p.name == 'values'))}"
    if term.state == FUSED:
        return f"one pass over {_size(weight)}"
    return "rebinding, no copy"


def _adapter(name: str, adapter: Any, rows: Sequence[TermRow], strengths: Mapping[str, float]) -> AdapterRow:
    own = [row for row in rows if row.adapter == name]
    states = Counter(row.state for row in own)
    nbytes = sum(row.nbytes for row in own)
    return AdapterRow(name, describe_variant(adapter.variant), dict(states), nbytes, strengths.get(name, 0.0))


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _text(report: Report) -> Iterator[str]:
    yield f"{report.target}, {report.mode}, active: {report.active}"
    for before, after in report.casts:
        yield f"computed in {after}: {report.target} has no kernels for the model's {before}"
    for row in report.adapters:
        states = ", ".join(f"{count} {state}" for state, count in sorted(row.states.items())) or "no term"
        yield f"{row.name}: {row.method}  {states}  {_size(row.nbytes)}{'' if row.strength else '  off'}"
    yield ""
    yield from _aligned(report)
    for what, paths in (("reserved, no adapter", report.reserved), ("bare", report.bare)):
        if paths:
            yield f"{what}: {', '.join(_counted(paths))}"


def _aligned(report: Report) -> Iterator[str]:
    """Sites, those that differ only in the number of their layer together; their terms below, in columns."""
    groups: dict[tuple[str, tuple[TermRow, ...]], int] = {}
    for site in dict.fromkeys(row.site for row in report.terms):
        rows = tuple(replace(row, site="") for row in report.terms if row.site == site)
        key = (_pattern(site), rows)
        groups[key] = groups.get(key, 0) + 1
    columns = [_columns(row) for _, rows in groups for row in rows]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)] if columns else []
    for (pattern, rows), count in groups.items():
        shape = f"{rows[0].shape[0]} -> {rows[0].shape[1]}"
        yield f"{pattern}  {rows[0].kind} {shape}" + (f"  x {count}" if count > 1 else "")
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(_columns(row), widths, strict=True)]
            yield ("  " + "  ".join(cells)).rstrip()
            yield from (f"      why: {reason}" for reason in row.reasons)


def _columns(row: TermRow) -> tuple[str, ...]:
    return (row.adapter, row.form, row.state, " ".join(row.slots), row.dtype, _size(row.nbytes), f"swap: {row.swap}")


def _counted(paths: Sequence[str]) -> list[str]:
    return [f"{p} x {n}" if n > 1 else p for p, n in Counter(map(_pattern, paths)).items()]


def _pattern(path: str) -> str:
    return _NUMBER.sub("*", path)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
