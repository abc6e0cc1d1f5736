"""The page: a summary, the picture of each graph, and what its script shows of a box. It needs no other file.

The style sheet and the script lie beside this module and are copied into the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from lorac.ir.host.components import scope_of
from lorac.ir.view.dump import Dump
from lorac.ir.view.picture.content import Facts, Levels, Texts, boxes_told, by_level, said, sites_told
from lorac.ir.view.picture.geometry import BEHIND, GAP, NEAR, Placed, lay_out
from lorac.ir.view.picture.modules import Part, parts_of
from lorac.ir.view.picture.svg import Drawing
from lorac.ir.view.printer import added_flops
from lorac.ir.view.terms import LEFT_OUT, STATES, told_size

_TALLEST = 2600.0
"""Pixels up to which boxes are open from the start: as deep as the picture stays below."""


def to_html(graphs: Mapping[str, Mapping[str, Dump]], facts: Facts) -> str:
    """The page.

    Args:
        graphs: graph -> stage -> how it looked then, in order; the first stage is drawn.
        facts: what is told besides.
    """
    sites = sites_told(facts)
    levels = Levels(Texts(), Texts(), Texts())
    drawn = [_Graph(str(n), stages, facts, sites, levels) for n, stages in enumerate(graphs.values())]
    data = {
        "graphs": [graph.data for graph in drawn],
        "sites": sites,
        "texts": levels.data(),
        "look": {"gap": GAP, "behind": BEHIND, "near": NEAR},
    }
    first = [next(iter(stages.values())) for stages in graphs.values()]
    model = " + ".join(dump.classes.get("", dump.name) for dump in first)
    return _part("page.html").substitute(
        title=_escaped(f"{model} · {facts.report.target}, {facts.report.mode}"),
        style=_text("page.css"),
        places=_text("places.js"),
        script=_text("page.js"),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        summary="".join(_summary(model, facts, first)),
        adapters=_adapters(facts),
        states="".join(_states(facts)),
        report=_escaped(str(facts.report)),
        pictures="".join(_picture(graph, alone=len(drawn) == 1) for graph in drawn),
    )


class _Graph:
    """One graph: its picture, and the data of its boxes."""

    def __init__(
        self, number: str, stages: Mapping[str, Dump], facts: Facts, sites: Mapping[str, Any], levels: Levels
    ) -> None:
        dump = next(iter(stages.values()))
        self.name, self.number = dump.name, number
        known = dump.sites or sites
        here = {path: told for path, told in sites.items() if path in known and path.startswith(scope_of(dump.name))}
        root = parts_of(dump, said(here))
        drawing = Drawing(number, facts.marks(), [row.type for row in dump.rows], facts.report.reserved)
        numbers = drawing.number(root)
        placed = lay_out(root, drawing.size, _TALLEST)
        self.svg = drawing.svg(placed)
        shown = by_level(stages)
        self.data = {
            "name": dump.name,
            "boxes": boxes_told(root, numbers, dump),
            "places": _places(placed, numbers),
            "levels": [levels.told(title, stage, facts.notes) for title, stage in shown.items()],
        }


def _places(root: Placed, numbers: Mapping[Part, int]) -> list[dict[str, Any]]:
    """What the script needs to draw anew, by number of the box: where it lies, and what of it."""
    found: list[dict[str, Any]] = [{} for _ in numbers]
    waiting = [root]
    while waiting:
        box = waiting.pop()
        waiting.extend(box.inner)
        inner = [numbers[child.part] for child in box.inner]
        wires = [
            [
                -1 if wire.source is None else inner[wire.source],
                -1 if wire.target is None else inner[wire.target],
                wire.value,
                wire.xs,
                wire.layers,
            ]
            for wire in box.wires
        ]
        found[numbers[box.part]] = {
            "x": box.x,
            "slot": box.width,
            "full": box.full,
            "heading": [box.heading.width, box.heading.height],
            "layers": [[inner[n] for n in layer] for layer in box.layers],
            "wires": wires,
            "into": {value: x for (value, into), x in box.doors.items() if into},
            "out": {value: x for (value, into), x in box.doors.items() if not into},
        }
    return found


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _summary(model: str, facts: Facts, dumps: Sequence[Dump]) -> Iterator[str]:
    report, notes = facts.report, facts.notes
    adapted = len({row.site for row in report.terms})
    called = {site for dump in dumps for site in dump.calls}
    unused = [path for path in report.bare if called and path not in called]
    flops = sum(added_flops(dump, notes) for dump in dumps)
    trained = sum((notes.trainable or {}).values())
    sites = [f"{adapted} adapted", f"{len(report.bare) - len(unused)} bare"]
    sites += [f"{len(report.reserved)} reserved"] if report.reserved else []
    sites += [f"{len(unused)} never called"] if unused else []
    yield _card("model", model)
    yield _card("runs", f"{report.target}, {report.mode}")
    yield _card("active", report.active)
    yield _card("sites", " · ".join(sites))
    yield _card("adapters", f"{len(report.adapters)}, {_number(sum(facts.parameters.values()))} parameters")
    yield _card("trainable", f"{_number(trained)} parameters")
    yield _card("cost of what is active", f"+{flops / 1000:.1f} kFLOP per token")
    yield _card("memory of adapters", told_size(sum(row.nbytes for row in report.adapters)))


def _card(what: str, value: str) -> str:
    return f"<div><dt>{_escaped(what)}</dt><dd>{_escaped(value)}</dd></div>"


def _adapters(facts: Facts) -> str:
    heads = ("adapter", "method", "forms", "sites", "parameters", "memory", "FLOP per token", "strength")
    rows = "".join(_adapter(row.name, facts) for row in facts.report.adapters)
    if not rows:
        return "<p>No adapter.</p>"
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    return f"<table class='adapters'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _adapter(name: str, facts: Facts) -> str:
    (row,) = (row for row in facts.report.adapters if row.name == name)
    terms = [term for term in facts.report.terms if term.adapter == name]
    described = [t for terms in facts.notes.terms.values() for t in terms if t.adapter == name]
    states = _counted(term.state for term in terms)
    flops = sum(term.flops * facts.notes.calls.get(term.site, 1) for term in described)
    cells = (
        row.method,
        ", ".join(dict.fromkeys(term.form for term in terms)),
        states or "none",
        _number(facts.parameters.get(name, 0)),
        told_size(row.nbytes),
        _number(flops),
        f"{row.strength:g}" if row.strength else "off",
    )
    label = f"<span class='swatch c{facts.colour(name)}'></span>{_escaped(name)}"
    return (
        f"<tr class='{'' if row.strength else 'off'}'><th scope='row'>"
        f"<button type='button' data-find='{_escaped(name)}'>{label}</button></th>"
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in cells)
        + "</tr>"
    )


def _counted(words: Iterator[str]) -> str:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))


def _states(facts: Facts) -> Iterator[str]:
    """The legend of how terms run: those that there are."""
    for state in dict.fromkeys(row.state for row in facts.report.terms):
        word = _escaped(state.replace(" ", "-"))
        yield f"<li><i class='key {word}'></i><b>{_escaped(state)}</b> {_escaped(STATES[state])}</li>"
    if any(not row.strength and row.state != LEFT_OUT for row in facts.report.terms):
        yield "<li><i class='key off'></i><b>off</b> not active: what a swap to it alone would do</li>"
    if facts.report.reserved:
        yield "<li><i class='key reserved'></i><b>reserved</b> a site with slots for an adapter that comes later</li>"
    yield "<li><i class='key bare'></i><b>bare</b> a site without adapter</li>"


def _picture(graph: _Graph, *, alone: bool) -> str:
    heading = "" if alone else f"<h2>{_escaped(graph.name)}</h2>"
    return f"<section class='picture' data-graph='{graph.number}'>{heading}{graph.svg}</section>"


def _number(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _part(name: str) -> Template:
    return Template(_text(name))


def _text(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
