"""Counts of PEFT's types for docs/peft.md: what came of the cases of PEFT's own tests, and the code lines of each type.

    python -m campaigns.fit --peft CHECKOUT --answers --journal FILE
    python -m campaigns.peft_types cases --peft CHECKOUT --journal FILE
    python -m campaigns.peft_types lines

The second and third write their part of ``docs/peft_types.json``, from which ``make docs`` makes the tables.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from campaigns.fit import iter_peft_cases
from lorac.formats.peft.config import peft_types
from lorac.formats.peft.peft_type import AnyPeftType
from lorac.variants import variants

RECORD = Path(__file__).parents[1] / "docs" / "peft_types.json"
FORMULA, RULES = "lorac.variants.", "lorac.formats.peft."
Found = dict[str, Any]


def count_cases(known: Mapping[str, str], cases: Iterable[tuple[str, Any, tuple[Any, Any]]]) -> dict[str, Found]:
    """Return what came of the cases of every type.

    Args:
        known: the outcome of a case by its name, as ``campaigns.fit`` has them in its journal.
        cases: as ``campaigns.fit.iter_peft_cases`` yields them.

    Raises:
        KeyError: a case has no outcome.
    """
    import peft

    names = {config: kind.value for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    counts: dict[str, Found] = {}
    for name, _, (config, _) in cases:
        found = counts.setdefault(
            names[config],
            {"cases": 0, "right": {}, "largest": {}, "refused": {}, "unbuilt": {}, "rounding": [], "wrong": []},
        )
        found["cases"] += 1
        outcome, _, rest = known[name].partition(": ")
        if outcome == "PEFT":
            _add(found["unbuilt"], rest)
        elif outcome == "refused":
            _add(found["refused"], f"eager: {_general(rest)}")
        elif outcome in ("rounding", "wrong"):
            found[outcome].append(f"{name}: {rest}")
        else:
            for way, value in ast.literal_eval(rest).items():
                if isinstance(value, str):
                    _add(found["refused"], f"{way}: {_general(value.removeprefix('refused: '))}")
                else:
                    _add(found["right"], way)
                    found["largest"][way] = max(value, found["largest"].get(way, 0.0))
    return counts


def _add(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _general(reason: str) -> str:
    """Return the reason of a refusal without the names of a case, so that those of several cases are one."""
    return re.sub(r"'[^']*'", "'…'", reason.split("\n", maxsplit=1)[0])


def count_lines(types: Mapping[str, AnyPeftType]) -> dict[str, dict[str, float]]:
    """Return the code lines of every type: of its formulas, and of the rules of its files.

    The files of a type are those of its classes, and others that only files of types import. Types that share a class
    share its lines, and those that share a file share its lines outside of classes.
    """
    classes = {name: set(own_classes(one)) for name, one in types.items()}
    own = {name: {cls.__module__ for cls in found} for name, found in classes.items()}
    of_types = set[str]().union(*own.values())
    imports = {module: set(_imports(path)) for module, path in _package().items()}
    inner = {
        module
        for module in imports
        if module not in of_types and {one for one, found in imports.items() if module in found} <= of_types
    }
    used = {name: modules | (inner & {one for of in modules for one in imports[of]}) for name, modules in own.items()}
    sharing = collections.Counter(module for modules in used.values() for module in modules)
    lines = {module: len(code_lines(_package()[module].read_text(encoding="utf-8"))) for module in sharing}
    users = collections.Counter(cls for found in classes.values() for cls in found)
    of_class = {cls: len(code_lines(inspect.getsource(cls))) for cls in {*users, *variants().values()}}
    for cls, count in of_class.items():
        if cls.__module__ in of_types:
            lines[cls.__module__] -= count

    def share(name: str, room: str) -> float:
        rest = sum(lines[one] / sharing[one] for one in sorted(used[name]) if one.startswith(room))
        found = sorted(classes[name], key=lambda cls: cls.__name__)
        return rest + sum(of_class[cls] / users[cls] for cls in found if cls.__module__.startswith(room))

    return {
        name: {"formula": round(share(name, FORMULA), 1), "rules": round(share(name, RULES), 1)}
        for name in sorted(used)
    }


@functools.cache
def _package() -> dict[str, Path]:
    """Return the files of lorac by their modules."""
    root = Path(__file__).parents[1]
    paths = sorted((root / "lorac").rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def _imports(path: Path) -> Iterator[str]:
    yield from re.findall(r"^ *from ([\w.]+) import", path.read_text(encoding="utf-8"), re.MULTILINE)


def own_classes(peft_type: AnyPeftType) -> Iterator[type]:
    """Yield the class of a type and those of the methods that PEFT itself computes for it."""
    yield type(peft_type)
    yield from (cls for cls in peft_type.variants if cls not in peft_type.read_only)


def code_lines(source: str) -> list[str]:
    """Return the lines of a file without blank ones, comments, docstrings and imports."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        left_out: ast.stmt | None = node if isinstance(node, ast.Import | ast.ImportFrom) else None
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            left_out = node.body[0]
        if left_out:
            dropped.update(range(left_out.lineno, (left_out.end_lineno or left_out.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return [line for number, line in lines if number not in dropped and line.strip() and line.strip()[0] != "#"]


def write(part: str, found: object, record: Path) -> None:
    """Put a part into the record next to the others."""
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    text = json.dumps({**known, part: found}, indent=1, sort_keys=True, ensure_ascii=False)
    record.write_text(text + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """Write a part of the record."""
    import peft

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cases", "lines"])
    parser.add_argument("--peft", type=Path, help="a checkout of PEFT, for cases")
    parser.add_argument("--journal", type=Path, nargs="+", help="of campaigns.fit --answers, for cases")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args(words)
    if given.part == "lines":
        write("lines", count_lines(peft_types()), given.record)
        return
    if not (given.peft and given.journal):
        parser.error("cases needs --peft and --journal")
    known = {name: of for one in given.journal for name, of in json.loads(one.read_text(encoding="utf-8")).items()}
    counts = count_cases(known, iter_peft_cases(given.peft))
    write("cases", {"peft": peft.__version__, "types": counts}, given.record)


if __name__ == "__main__":
    main()
