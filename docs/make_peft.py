"""The page docs/peft.md, made from the code: what becomes of every field of PEFT's configurations.

``python -m docs.make_peft`` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

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


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, "## Types", "", _count(), "", *_types(), "", "## In every type", "", *_table(COMMON)]
    for name, peft_type in sorted(peft_types().items()):
        fields = {key: field for key, field in peft_type.fields.items() if COMMON.get(key) is not field}
        lines += ["", f"## {name}", "", _classes(peft_type), "", *_table(fields)]
    return "\n".join([*lines, "", FOOT]) + "\n"


def _count() -> str:
    """Return how many of PEFT's types are read, and how the table of them is read."""
    return (
        f"Of PEFT's {len(_known())} types lorac reads {len(peft_types())}, each below. "
        f"It refuses {' and '.join(REFUSED_TYPES)} by name. "
        "A type runs *next to the weight*, *merged* into it, as a *subgraph*, or *before the sequence*, in eager mode"
        " as in ONNX Runtime. *Cache*: text is generated with a cache of keys and values. *Per row*: rows of a batch "
        "that have choices of their own take *one call*, or a call each."
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
            yield f"| {name} | – | refused: {REFUSED_TYPES[name]} | – | – | – | – | – |"
            continue
        for variant in peft_type.variants:
            written = "no" if variant in peft_type.read_only else "yes"
            runs, cached, by_row = _runs(variant, rows[variant.__name__].form)
            yield f"| {name} | `lorac.{variant.__name__}` | yes | {written} | {runs} | {runs} | {cached} | {by_row} |"


def _runs(variant: type[Variant], form: str) -> tuple[str, str, str]:
    """Return how a method of a normal form runs, whether with a cache, and how rows have choices of their own."""
    if issubclass(variant, PromptVariant):
        return "before the sequence", "yes", "one call"
    if form.startswith("low-rank"):
        return "next to the weight", "yes", "one call"
    if issubclass(variant, BranchVariant):
        whole = variant.once is not BranchVariant.once or variant.mixes_tokens
        return "subgraph", "no" if whole else "yes", "a call each" if whole else "one call"
    return "merged", "yes", "a call each"


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
