"""The page docs/peft.md, made from the code: what becomes of every field of PEFT's configurations.

``python -m docs.make_peft`` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lorac.formats._config_fields import Field
from lorac.formats.peft.config import peft_types
from lorac.formats.peft.fields import COMMON
from lorac.formats.peft.peft_type import AnyPeftType

HEAD = """# PEFT's names

Made by `make docs` from the code; `make check` fails where the two differ. [From PEFT](from-peft.md) says how the files
are used.

A field that is *applied* changes what is computed, and lorac does so. One that is *training only* matters while an
adapter is trained: its tensors hold all that is left of it. What is *irrelevant* changes no number. A field that is
*refused* away from its default changes what is computed in a way that lorac does not build; the error says what to do
instead. Any other field is unknown, and refused by name.
"""


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, "## Types", "", _types(), "", "## In every type", "", *_table(COMMON)]
    for name, peft_type in sorted(peft_types().items()):
        fields = {key: field for key, field in peft_type.fields.items() if COMMON.get(key) is not field}
        lines += ["", f"## {name}", "", _classes(peft_type), "", *_table(fields)]
    return "\n".join(lines) + "\n"


def _types() -> str:
    """Return which of PEFT's types are read, and which are not."""
    import peft

    known, read = sorted(kind.value for kind in peft.PeftType), peft_types().keys()
    refused = ", ".join(kind for kind in known if kind not in read)
    return f"Of PEFT's {len(known)} types lorac reads {len(read)}, each below. It refuses by name: {refused}."


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
