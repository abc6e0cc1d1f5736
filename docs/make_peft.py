"""The page docs/peft.md, made from the code: what becomes of every field of PEFT's configurations.

``python -m docs.make_peft`` prints it.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from campaigns.peft_types import own_classes
from docs.foot import FOOT
from lorac.cli.models import method_rows
from lorac.formats._config_fields import Field
from lorac.formats.peft.config import REFUSED_TYPES, peft_types
from lorac.formats.peft.fields import COMMON
from lorac.formats.peft.peft_type import AnyPeftType
from lorac.variants import variants
from lorac.variants.base import BranchVariant, PromptVariant, Variant

HEAD = """# PEFT's names

[From PEFT](from-peft.md) says how the files are used.

A field that is *applied* changes what is computed, and lorac does so. One that is *training only* matters while an
adapter is trained: its tensors hold all that is left of it. What is *irrelevant* changes no number. A field that is
*refused* away from its default changes what is computed in a way that lorac does not build; the error says what to do
instead. Any other field is unknown, and refused by name.
"""

RECORD = Path(__file__).with_name("peft_types.json")
WAYS = {"eager": "eager", "onnxruntime": "ONNX Runtime", "back": "back in PEFT"}
CASES = """## PEFT's own tests

What came of the {count} `TEST_CASES` of PEFT {peft}: {outcomes}. PEFT moves its adapters off their start and saves
them, and lorac reads them; *back in PEFT* is PEFT's answer with the file that lorac writes. A figure is the number of
cases within 1e-3 of what the adapter adds to PEFT's output, in float32, and the largest difference. Where an adapter
adds as little as the output's own roundings, float32 cannot judge.

{table}

{refusals}

*Counted by `python -m campaigns.fit --peft CHECKOUT --answers --journal FILE` and `python -m campaigns.peft_types`.*
"""
CONTRACT = """## What PEFT's types ask of the contract

Most types are one formula, and a table of fields and names of tensors. What did not fit that has a place in the
contract of formulas or of files, which any method and type may use; no pass asks for a type by its name.

{table}

Code lines of a type: its formulas, and the rules of its files. What several types share is divided among them; a file
that serves other parts of lorac as well counts for none. The median is **{median}**.

{lines}

*As `python -m campaigns.peft_types lines` counted them: without blank lines, comments, docstrings and imports.*
"""
PLACES = (
    ("`PromptVariant`", "virtual tokens before a sequence, at no layer", r"\((?:Embedded)?PromptVariant\)"),
    ("`Variant.acts_at_sites`", "keys and values for every layer, which no layer's formula reads", "acts_at_sites"),
    ("`WeightVariant.compute_bias`", "a bias that depends on the weight", "def compute_bias"),
    ("`BranchVariant.reads`", "queries, base weights and rotary tables of the layers around", r"def reads\("),
    ("`BranchVariant.once`", "shares that one router gives to all layers", r"def once\("),
    ("`BranchVariant.samples`", "random numbers of its own in training", "samples = True"),
    ("`BranchVariant.mixes_tokens`", "a mean over the tokens of a call", "mixes_tokens = True"),
    ("`ParamSpec(tie=)`", "one tensor for several layers", "tie="),
    ("`ParamSpec(of_gradients=)`", "frozen parts that only the backward pass reads", "of_gradients"),
    ("`Variant.for_model`", "a meaning that the order or structure of the model's layers decides", "def for_model"),
    ("`PeftType.derived`", "parameters that no file holds, since configuration and base tell them", "derived = "),
    ("`PeftType.complete_site`", "parameters that the base's weights complete", "def complete_site"),
    ("`PeftType.shared`", "a tensor of all modules, or of groups of modules", "shared = "),
    ("`PeftType.names_no_site`", "a file that names no module", "names_no_site = True"),
    (
        "`PeftType.refine_variant`",
        "a method that the tensors decide along with the configuration",
        "def refine_variant",
    ),
    ("`PeftType.check_copies`", "copies of one tensor at several modules", "def check_copies"),
    ("`PeftType.read_folder`", "a folder that holds no tensors of modules", "def read_folder"),
    ("`PlacedType`", "tensors whose places the model tells", r"PlacedType|PromptType"),
)
"""Place in the contract, what it is for, and the pattern that finds it in the files of a type that uses it."""


def page() -> str:
    """Return the whole page."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [
        HEAD,
        "## Types",
        "",
        _count(),
        "",
        *_types(),
        "",
        cases_section(record["cases"]),
        contract_section(record["lines"]),
    ]
    lines += ["## In every type", "", *_table(COMMON)]
    for name, peft_type in sorted(peft_types().items()):
        fields = {key: field for key, field in peft_type.fields.items() if COMMON.get(key) is not field}
        lines += ["", f"## {name}", "", _classes(peft_type), "", *_table(fields)]
    return "\n".join([*lines, "", FOOT]) + "\n"


def _count() -> str:
    """Return how many of PEFT's types are read, and how the table of them is read."""
    return (
        f"Of PEFT's {len(_known())} types lorac reads {len(peft_types())}, each below. "
        f"It refuses {' and '.join(REFUSED_TYPES)} by name. "
        "A type runs *next to the weight*, *merged* into it, as a *subgraph*, or *before the sequence*. "
        "*Cache*: text is generated with a cache of keys and values. *Per row*: rows of a batch "
        "that have choices of their own take *one call* on ONNX Runtime, or a call each."
    )


def _known() -> list[str]:
    """Return the names of the newest PEFT's types."""
    import peft

    return sorted(kind.value for kind in peft.PeftType)


def _types() -> Iterator[str]:
    """Return the table of PEFT's types: a row for each class of a type that is read, one for each that is not."""
    rows = {row.title: row for row in method_rows(variants().values())}
    yield "| type | class | read | written | eager | ONNX Runtime | cache | per row |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in _known():
        peft_type = peft_types().get(name)
        if peft_type is None:
            yield f"| {name} | – | refused: {REFUSED_TYPES[name][0]} | – | – | – | – | – |"
            continue
        for variant in peft_type.variants:
            written = "no" if variant in peft_type.read_only else "yes"
            runs, cached, by_row = _runs(variant, rows[variant.__name__].form)
            emitted = runs if variant.acts_at_sites else f"{runs}, with `cache=True` alone"
            cells = (name, f"`lorac.{variant.__name__}`", "yes", written, runs, emitted, cached, by_row)
            yield f"| {' | '.join(cells)} |"


def _runs(variant: type[Variant], form: str) -> tuple[str, str, str]:
    """Return how a method of a normal form runs, whether with a cache, and how rows have choices of their own."""
    if issubclass(variant, PromptVariant):
        return "before the sequence", "yes", "one call"
    if form.startswith("low-rank"):
        return "next to the weight", "yes", "one call"
    if issubclass(variant, BranchVariant):
        return "subgraph", "no" if variant.mixes_tokens else "yes", "a call each"
    return "merged", "yes", "a call each"


def cases_section(record: Mapping[str, Any]) -> str:
    """Return the section of PEFT's own tests: a row for each type that they try."""
    rows, types = [f"| type | cases | {' | '.join(WAYS.values())} | refused |"], record["types"]
    rows.append("| --- |" + " --- |" * (len(WAYS) + 2))
    for name, found in sorted(types.items()):
        cells = [_agreement(found, way) for way in WAYS]
        rows.append(f"| {name} | {found['cases']} | {' | '.join(cells)} | {_whole(found) or '–'} |")
    reasons = [
        f"- {name}, {number} of {found['cases']}: {_reason(reason)}"
        for name, found in sorted(types.items())
        for reason, number in sorted({**found["refused"], **found["unbuilt"]}.items())
    ]
    count = sum(one["cases"] for one in types.values())
    others = {
        "refused by name": sum(map(_whole, types.values())),
        "not built by PEFT": sum(sum(one["unbuilt"].values()) for one in types.values()),
        "within four roundings of the output alone": sum(len(one["rounding"]) for one in types.values()),
        "wrong": sum(len(one["wrong"]) for one in types.values()),
    }
    numbers = {"right": count - sum(others.values()), **others}
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in numbers.items())
    table = "\n".join(rows)
    return CASES.format(count=count, peft=record["peft"], outcomes=outcomes, table=table, refusals="\n".join(reasons))


def _agreement(found: Mapping[str, Any], way: str) -> str:
    number = found["right"].get(way, 0)
    return f"{number} (≤ {found['largest'][way]:.0e})" if number else "–"


def _whole(found: Mapping[str, Any]) -> int:
    """Return how many cases of a type are refused as a whole."""
    return sum(number for reason, number in found["refused"].items() if reason.startswith("eager: "))


def _reason(reason: str) -> str:
    way, _, text = reason.partition(": ")
    return text if way == "eager" else f"{WAYS[way]} alone: {text}" if text else f"PEFT raises {way}"


def contract_section(lines: Mapping[str, Mapping[str, float]]) -> str:
    """Return the section of the contract: which types have each place in it, and their code lines."""
    sources = {
        name: "\n".join(inspect.getsource(cls) for cls in own_classes(one)) for name, one in peft_types().items()
    }
    places = ["| place | for | types |", "| --- | --- | --- |"]
    for place, need, pattern in PLACES:
        users = ", ".join(name for name in sorted(sources) if re.search(pattern, sources[name]))
        places.append(f"| {place} | {need} | {users} |")
    sums = {name: of["formula"] + of["rules"] for name, of in lines.items()}
    rows = ["| type | formulas | rules of files | together |", "| --- | --- | --- | --- |"]
    rows += [f"| {name} | {of['formula']:.0f} | {of['rules']:.0f} | {sums[name]:.0f} |" for name, of in lines.items()]
    median = f"{statistics.median(sums.values()):.0f}"
    return CONTRACT.format(table="\n".join(places), lines="\n".join(rows), median=median)


def _classes(peft_type: AnyPeftType) -> str:
    """Return the classes of a type, each with the values that select it where there are several."""
    classes = [f"`lorac.{variant.__name__}`{_when(values)}" for variant, values in peft_type.variants.items()]
    former = f" PEFT called it {', '.join(peft_type.former_names)} before." if peft_type.former_names else ""
    return f"It is {', or '.join(classes)}.{former}"


def _when(values: Mapping[str, object]) -> str:
    return f" ({', '.join(f'`{name}={value!r}`' for name, value in values.items())})" if values else ""


def _table(fields: Mapping[str, Field]) -> Iterator[str]:
    yield "| PEFT | lorac | default in PEFT | it is |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields.items():
        names = [field.to] if field.to else [inner.to for inner in field.nested.values() if inner.to]
        to = ", ".join(f"`{own}`" for own in names) or "–"
        yield f"| `{name}` | {to} | {_default(field)} | {field.use} |"


def _default(field: Field) -> str:
    return f"`{json.dumps(field.default)}`" if field.written else "never written"


if __name__ == "__main__":
    print(page(), end="")
