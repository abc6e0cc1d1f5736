"""The page: a summary, the picture of each graph, and the data of its script. It needs no other file.

The style sheet and the scripts, dagre's among them, are files of this folder that are copied into the page.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from lorac.frontend.components import get_graph_scope
from lorac.report.dump import Dump
from lorac.report.explain import AdapterRow
from lorac.report.picture.boxes import build_boxes
from lorac.report.picture.page_data import (
    LevelTable,
    PictureContext,
    describe_boxes,
    describe_sites,
    select_levels,
)
from lorac.report.printer import count_added_flops
from lorac.report.terms import LEFT_OUT, STATES, format_size


def to_html(graphs: Mapping[str, Mapping[str, Dump]], context: PictureContext) -> str:
    """Return the page.

    Args:
        graphs: graph -> stage -> its dump at that stage, in order; the first stage is drawn.
        context: the facts shown next to the graphs.
    """
    sites, levels = describe_sites(context), LevelTable()
    records = []
    for stages in graphs.values():
        dump = next(iter(stages.values()))
        known, scope = dump.sites or sites, get_graph_scope(dump.name)
        here = {path: site for path, site in sites.items() if path in known and path.startswith(scope)}
        root = build_boxes(dump, {path: json.dumps(site, sort_keys=True) for path, site in here.items()})
        rows = [levels.describe(title, stage, context.notes) for title, stage in select_levels(stages).items()]
        records.append({"name": dump.name, "levels": rows, **describe_boxes(root, dump)})
    data = {"graphs": records, "sites": sites, "texts": levels.data()}
    first = [next(iter(stages.values())) for stages in graphs.values()]
    model = " + ".join(dump.classes.get("", dump.name) for dump in first)
    explanation = context.explanation
    items = "".join(_adapter_item(row, context) for row in explanation.adapters)
    return Template(_read_resource("page.html")).substitute(
        title=escape(f"{model} · {explanation.target}, {explanation.mode}"),
        style=_read_resource("page.css"),
        dagre=f"/*\n{_read_resource('dagre.LICENSE')}*/\n{_read_resource('dagre.min.js')}",
        script=_read_resource("picture.js") + _read_resource("page.js"),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        summary="".join(_summary_cards(context, first)),
        adapters=f"<ul class='adapters'>{items}</ul>" if items else "<p>No adapter.</p>",
        states="".join(_state_legend(context)),
        report=escape(str(explanation)),
        pictures="".join(
            f"<section>{f'<h2>{name}</h2>' if len(first) > 1 else ''}"
            f"<svg class='graph' role='group' aria-label='graph {name}'></svg></section>"
            for name in (escape(dump.name) for dump in first)
        ),
    )


def _summary_cards(context: PictureContext, dumps: Sequence[Dump]) -> Iterator[str]:
    explanation, notes = context.explanation, context.notes
    adapted = len({row.site for row in explanation.terms})
    called = {site for dump in dumps for site in dump.calls}
    unused = [path for path in explanation.bare if called and path not in called]
    flops = sum(count_added_flops(dump, notes) for dump in dumps)
    sites = [f"{adapted} adapted", f"{len(explanation.bare) - len(unused)} bare"]
    sites += [f"{len(explanation.reserved)} reserved"] if explanation.reserved else []
    sites += [f"{len(unused)} never called"] if unused else []
    parameters = sum(context.parameters.values())
    yield _format_card("active", explanation.active)
    yield _format_card("sites", " · ".join(sites))
    yield _format_card("adapters", f"{len(explanation.adapters)}, {_format_count(parameters)} parameters")
    yield _format_card("trainable", f"{_format_count(sum((notes.trainable or {}).values()))} parameters")
    yield _format_card("cost of the active adapters", f"+{flops / 1000:.1f} kFLOP per token")
    yield _format_card("memory of adapters", format_size(sum(row.nbytes for row in explanation.adapters)))


def _format_card(name: str, value: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _adapter_item(row: AdapterRow, context: PictureContext) -> str:
    name = row.name
    terms = [term for term in context.explanation.terms if term.adapter == name]
    states = ", ".join(f"{count} {state}" for state, count in sorted(Counter(t.state for t in terms).items()))
    flops = sum(term.flops * context.notes.calls.get(term.site, 1) for term in terms)
    facts = (
        ", ".join(dict.fromkeys(term.form for term in terms)),
        states or "no site",
        f"{_format_count(context.parameters.get(name, 0))} parameters",
        format_size(row.nbytes),
        f"{_format_count(flops)} FLOP per token",
    )
    strength = f"× {row.strength:g}" if row.strength else "off"
    return (
        f"<li class='c{context.color(name)}{'' if row.strength else ' off'}'>"
        f"<button type='button' data-find='{escape(name)}'>{escape(name)}</button> {escape(row.method)} "
        f"<b>{strength}</b><p class='soft'>{escape(' · '.join(filter(None, facts)))}</p></li>"
    )


def _state_legend(context: PictureContext) -> Iterator[str]:
    """Yield the legend of the states that occur."""
    terms = context.explanation.terms
    for state in dict.fromkeys(row.state for row in terms):
        yield _legend_item(state.replace(" ", "-"), state, STATES[state])
    if any(not row.strength and row.state != LEFT_OUT for row in terms):
        yield _legend_item("off", "off", "not active: the result of a swap to it alone")
    if context.explanation.reserved:
        yield _legend_item("reserved", "reserved", "a site with slots for an adapter that is added later")
    yield _legend_item("bare", "bare", "a site without adapter")


def _legend_item(key: str, name: str, meaning: str) -> str:
    return f"<li><i class='key {key}'></i><b>{escape(name)}</b> {escape(meaning)}</li>"


def _format_count(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _read_resource(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
