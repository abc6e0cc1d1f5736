"""The page docs/formats.md, made from the code: which files of which tools are read and written, and for what methods.

``python -m docs.make_formats`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from docs.foot import FOOT
from lorac.formats import Evidence, Format, formats
from lorac.formats._authors import REQUIRED, AuthorsFormat

HEAD = """# Formats

```text
lorac inspect FILE --model MODEL
lorac convert FILE OUT --to NAME --model MODEL
```

lorac recognises the format of a file that it reads; `--to` names the format of the file that it writes. Some files lack
names or shapes that `--model` supplies: an error says so where it is needed. [Files](files.md) says how the files are
used.
"""
RULE = """## Which format a file is of

Where several formats recognise one file or folder, the surest kind of evidence decides, in this order: {order}. Of two
formats with the same kind, one that refines the other wins: {refinements}. Any other file that fits two formats is
refused, naming both.
"""
SETTINGS = """## Hyper-parameters that authors' files lack

The result depends on these hyper-parameters, which are not in the file of tensors. They are read from a JSON file
beside it, with its name and the suffix `.json` unless another is given here; where it is missing, the error prints what
to write.
"""
KINDS = {
    Evidence.METADATA: "metadata that lorac wrote",
    Evidence.LAYOUT: "the name of a file, its first bytes or a configuration",
    Evidence.NAMES: "the names of tensors",
}


def page() -> str:
    """Return the whole page."""
    known = formats()
    refinements = ", ".join(f"`{one.name}` over `{one.refines}`" for one in known.values() if one.refines)
    order = "; ".join(KINDS[kind] for kind in sorted(KINDS))
    rule = RULE.format(order=order, refinements=refinements)
    return "\n".join([HEAD, *_table(known), "", rule, SETTINGS, *_settings(known), "", FOOT]) + "\n"


def _table(known: Mapping[str, Format]) -> Iterator[str]:
    yield "| format | files of | recognised by | can be written | methods |"
    yield "| --- | --- | --- | --- | --- |"
    for name, one in known.items():
        every = "[its types](peft.md)" if name == "peft" else "every method"
        methods = ", ".join(f"`lorac.{method.__name__}`" for method in one.methods) or every
        yield f"| `{name}` | {one.written_by or name} | {_escape(one.looks_for)} | {_say(one.writes)} | {methods} |"


def _say(flag: bool) -> str:
    return "yes" if flag else "no"


def _escape(text: str) -> str:
    """Return a phrase whose placeholders are not taken for HTML."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _settings(known: Mapping[str, Format]) -> Iterator[str]:
    yield "| format | file | required | optional |"
    yield "| --- | --- | --- | --- |"
    for name, one in known.items():
        if isinstance(one, AuthorsFormat) and one.settings:
            file = one.settings_file or f"{one.weights.rpartition('.')[0]}.json"
            needed = [key for key, field in one.settings.items() if field.default is REQUIRED]
            others = [key for key, field in one.settings.items() if key not in needed and field.to]
            listed = (", ".join(f"`{key}`" for key in keys) or "–" for keys in (needed, others))
            yield f"| `{name}` | `{file}` | {' | '.join(listed)} |"


if __name__ == "__main__":
    print(page(), end="")
