"""The page docs/peft.md, made from the code: what becomes of every field of PEFT's configurations.

``python -m docs.make_peft`` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lorac.formats.peft.config import COMMON, peft_types
from lorac.formats.peft.peft_type import ABSENT, Field, FieldUse, PeftType

HEAD = """# PEFT's names

Made by `make docs` from the code; `make check` fails where the two differ. [From PEFT](from-peft.md) says how the files
are used.

A field that is *applied* changes what is computed, and lorac does so. One that is *training only* matters while an
adapter is trained: its tensors hold all that is left of it. What is *irrelevant* changes no number. A field that is
*refused* away from its default changes what is computed in a way that lorac does not build; the error says what to do
instead. Any other field is unknown, and refused by name.
"""
AFTER = {
    FieldUse.APPLIED: "applied",
    FieldUse.TRAINING: "training only",
    FieldUse.IRRELEVANT: "irrelevant",
    FieldUse.REFUSED: "refused away from its default",
}


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## In every type", "", *_table(COMMON)]
    for peft_type, method in sorted(peft_types().items()):
        own = {name: field for name, field in method.fields.items() if COMMON.get(name) is not field}
        lines += ["", f"## {peft_type}", "", _classes(method), "", *_table(own)]
    return "\n".join(lines) + "\n"


def _classes(method: PeftType) -> str:
    """The classes of a type, each with the values that pick it where there are several."""
    said = [f"`lorac.{variant.__name__}`{_when(values)}" for variant, values in method.variants.items()]
    return f"It is {', or '.join(said)}."


def _when(values: Mapping[str, object]) -> str:
    return f" ({', '.join(f'`{name}={value!r}`' for name, value in values.items())})" if values else ""


def _table(fields: Mapping[str, Field]) -> Iterator[str]:
    yield "| PEFT | lorac | default in PEFT | it is |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields.items():
        own = f"`{field.to}`" if field.to else "–"
        yield f"| `{name}` | {own} | {_default(field)} | {AFTER[field.use]} |"


def _default(field: Field) -> str:
    if field.default is ABSENT:
        return "never written"
    return f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    print(page(), end="")
