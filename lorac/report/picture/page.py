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

from lorac.frontend.components import get_graph_scope
from lorac.report.dump import Dump
from lorac.report.picture.boxes import Box, build_boxes
from lorac.report.picture.layout import BEHIND, GAP, NEAR, BoxLayout, lay_out
from lorac.report.picture.page_data import (
    InternTable,
    LevelTable,
    PictureContext,
    describe_boxes,
    describe_sites,
    select_levels,
    serialize_sites,
)
from lorac.report.picture.svg import SvgWriter
from lorac.report.printer import count_added_flops
from lorac.report.terms import LEFT_OUT, STATES, format_size

_MAX_HEIGHT = 2600.0
"""Pixels up to which boxes are open from the start: as deep as the picture stays below."""


def to_html(graphs: Mapping[str, Mapping[str, Dump]], facts: PictureContext) -> str:
    """The page.

    Args:
        graphs: graph -> stage -> how it looked then, in order; the first stage is drawn.
        facts: what is told besides.
    """
    sites = describe_sites(facts)
    levels = LevelTable(InternTable(), InternTable(), InternTable())
    drawn = [_GraphPicture(str(n), stages, facts, sites, levels) for n, stages in enumerate(graphs.values())]
    data = {
        "graphs": [graph.data for graph in drawn],
        "sites": sites,
        "texts": levels.data(),
        "look": {"gap": GAP, "behind": BEHIND, "near": NEAR},
    }
    first = [next(iter(stages.values())) for stages in graphs.values()]
    model = " + ".join(dump.classes.get("", dump.name) for dump in first)
    return _load_template("page.html").substitute(
        title=_escape(f"{model} · {facts.report.target}, {facts.report.mode}"),
        style=_read_resource("page.css"),
        places=_read_resource("places.js"),
        script=_read_resource("page.js"),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        summary="".join(_summary_cards(model, facts, first)),
        adapters=_adapter_table(facts),
        states="".join(_state_legend(facts)),
        report=_escape(str(facts.report)),
        pictures="".join(_picture_section(graph, alone=len(drawn) == 1) for graph in drawn),
    )


class _GraphPicture:
    """One graph: its picture, and the data of its boxes."""

    def __init__(
        self,
        number: str,
        stages: Mapping[str, Dump],
        facts: PictureContext,
        sites: Mapping[str, Any],
        levels: LevelTable,
    ) -> None:
        dump = next(iter(stages.values()))
        self.name, self.number = dump.name, number
        known = dump.sites or sites
        here = {
            path: told for path, told in sites.items() if path in known and path.startswith(get_graph_scope(dump.name))
        }
        root = build_boxes(dump, serialize_sites(here))
        drawing = SvgWriter(number, facts.marks(), [row.type for row in dump.rows], facts.report.reserved)
        numbers = drawing.number(root)
        placed = lay_out(root, drawing.size, _MAX_HEIGHT)
        self.svg = drawing.svg(placed)
        shown = select_levels(stages)
        self.data = {
            "name": dump.name,
            "boxes": describe_boxes(root, numbers, dump),
            "places": _layout_data(placed, numbers),
            "levels": [levels.told(title, stage, facts.notes) for title, stage in shown.items()],
        }


def _layout_data(root: BoxLayout, numbers: Mapping[Box, int]) -> list[dict[str, Any]]:
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
def _summary_cards(model: str, facts: PictureContext, dumps: Sequence[Dump]) -> Iterator[str]:
    report, notes = facts.report, facts.notes
    adapted = len({row.site for row in report.terms})
    called = {site for dump in dumps for site in dump.calls}
    unused = [path for path in report.bare if called and path not in called]
    flops = sum(count_added_flops(dump, notes) for dump in dumps)
    trained = sum((notes.trainable or {}).values())
    sites = [f"{adapted} adapted", f"{len(report.bare) - len(unused)} bare"]
    sites += [f"{len(report.reserved)} reserved"] if report.reserved else []
    sites += [f"{len(unused)} never called"] if unused else []
    yield _format_card("model", model)
    yield _format_card("runs", f"{report.target}, {report.mode}")
    yield _format_card("active", report.active)
    yield _format_card("sites", " · ".join(sites))
    yield _format_card(
        "adapters", f"{len(report.adapters)}, {_format_count(sum(facts.parameters.values()))} parameters"
    )
    yield _format_card("trainable", f"{_format_count(trained)} parameters")
    yield _format_card("cost of what is active", f"+{flops / 1000:.1f} kFLOP per token")
    yield _format_card("memory of adapters", format_size(sum(row.nbytes for row in report.adapters)))


def _format_card(what: str, value: str) -> str:
    return f"<div><dt>{_escape(what)}</dt><dd>{_escape(value)}</dd></div>"


def _adapter_table(facts: PictureContext) -> str:
    heads = ("adapter", "method", "forms", "sites", "parameters", "memory", "FLOP per token", "strength")
    rows = "".join(_adapter_table_row(row.name, facts) for row in facts.report.adapters)
    if not rows:
        return "<p>No adapter.</p>"
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    return f"<table class='adapters'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _adapter_table_row(name: str, facts: PictureContext) -> str:
    (row,) = (row for row in facts.report.adapters if row.name == name)
    terms = [term for term in facts.report.terms if term.adapter == name]
    described = [t for terms in facts.notes.terms.values() for t in terms if t.adapter == name]
    states = _count_words(term.state for term in terms)
    flops = sum(term.flops * facts.notes.calls.get(term.site, 1) for term in described)
    cells = (
        row.method,
        ", ".join(dict.fromkeys(term.form for term in terms)),
        states or "none",
        _format_count(facts.parameters.get(name, 0)),
        format_size(row.nbytes),
        _format_count(flops),
        f"{row.strength:g}" if row.strength else "off",
    )
    label = f"<span class='swatch c{facts.colour(name)}'></span>{_escape(name)}"
    return (
        f"<tr class='{'' if row.strength else 'off'}'><th scope='row'>"
        f"<button type='button' data-find='{_escape(name)}'>{label}</button></th>"
        + "".join(f"<td>{_escape(cell)}</td>" for cell in cells)
        + "</tr>"
    )


def _count_words(words: Iterator[str]) -> str:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))


def _state_legend(facts: PictureContext) -> Iterator[str]:
    """The legend of how terms run: those that there are."""
    for state in dict.fromkeys(row.state for row in facts.report.terms):
        word = _escape(state.replace(" ", "-"))
        yield f"<li><i class='key {word}'></i><b>{_escape(state)}</b> {_escape(STATES[state])}</li>"
    if any(not row.strength and row.state != LEFT_OUT for row in facts.report.terms):
        yield "<li><i class='key off'></i><b>off</b> not active: what a swap to it alone would do</li>"
    if facts.report.reserved:
        yield "<li><i class='key reserved'></i><b>reserved</b> a site with slots for an adapter that comes later</li>"
    yield "<li><i class='key bare'></i><b>bare</b> a site without adapter</li>"


def _picture_section(graph: _GraphPicture, *, alone: bool) -> str:
    heading = "" if alone else f"<h2>{_escape(graph.name)}</h2>"
    return f"<section class='picture' data-graph='{graph.number}'>{heading}{graph.svg}</section>"


def _format_count(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _load_template(name: str) -> Template:
    return Template(_read_resource(name))


def _read_resource(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
