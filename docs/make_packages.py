"""The page docs/packages.md, made from the code: the packages of lorac, their purposes and their imports.

``python -m docs.make_packages`` prints it. The interface, ``lorac/__init__.py``, imports from all of them on first use
and is left out. Packages that import each other (a package and its own registry) are one box.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp
import networkx

from docs.foot import FOOT

PACKAGE = "lorac"
ROOT = Path(__file__).parents[1]
HEAD = """# Packages

A box is a package with the number of its modules; an arrow leads to a package that it imports from. Arrows for indirect
imports are not drawn. Modules that are found because they exist (backends, formats, PEFT types, methods) are imported
by no name, so no arrow leads to them. The interface, `lorac/__init__.py`, imports from all packages on first use and is
left out. The contracts in `pyproject.toml` say which imports are allowed
([Architecture](architecture.md)).
"""


def packages() -> dict[str, list[str]]:
    """Package -> names of its modules, both sorted."""
    found = {}
    for door in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        package = ".".join(door.parent.relative_to(ROOT).parts)
        found[package] = sorted(path.stem for path in door.parent.glob("*.py") if path != door)
    return found


def arrows(known: Mapping[str, list[str]]) -> networkx.DiGraph:
    """Return the boxes and the arrows between them; each box knows its ``members``."""
    modules = grimp.build_graph(PACKAGE, exclude_type_checking_imports=False, cache_dir=None)
    modules.remove_module(f"{PACKAGE}.__main__")  # a way in, like the interface
    drawn: networkx.DiGraph = networkx.DiGraph()
    drawn.add_nodes_from(known)
    for module in modules.modules - {PACKAGE}:
        for other in modules.find_modules_directly_imported_by(module) - {PACKAGE}:
            drawn.add_edge(_package_of(module, known), _package_of(other, known))
    drawn.remove_edges_from(list(networkx.selfloop_edges(drawn)))
    boxes = networkx.condensation(drawn)
    reduced = networkx.transitive_reduction(boxes)
    reduced.add_nodes_from(boxes.nodes(data=True))
    return reduced


def _package_of(module: str, known: Mapping[str, list[str]]) -> str:
    return module if module in known else module.rpartition(".")[0]


def page() -> str:
    """Make the whole page."""
    known = packages()
    lines = [HEAD, "```mermaid", *_flowchart(known), "```", "", *_table(known), "", FOOT]
    return "\n".join(lines) + "\n"


# --- the picture -----------------------------------------------------------------------------------------------------


def _flowchart(known: Mapping[str, list[str]]) -> Iterator[str]:
    boxes = arrows(known)
    names = {box: sorted(members) for box, members in boxes.nodes(data="members")}
    floors = defaultdict(list)
    for members in sorted(names.values()):
        floors[_house(members[0])].append(members)
    yield "flowchart TD"
    for house, inside in floors.items():
        if len(inside) == 1:
            yield f"    {_box(inside[0], known)}"
            continue
        yield f'    subgraph {_key(house)}_house ["{house.replace(".", "/")}"]'
        yield from (f"        {_box(members, known)}" for members in inside)
        yield "    end"
    yield from sorted(f"    {_key(names[one][0])} --> {_key(names[other][0])}" for one, other in boxes.edges)


def _house(package: str) -> str:
    """Return the package directly below lorac that a package belongs to."""
    return ".".join(package.split(".")[:2])


def _box(members: list[str], known: Mapping[str, list[str]]) -> str:
    labels = [f"{_folder(package, known)} · {len(known[package])}" for package in members]
    return f'{_key(members[0])}["{"<br>".join(labels)}"]'


def _folder(package: str, known: Mapping[str, list[str]]) -> str:
    """Return the package's folder; its own files alone, where packages of the picture lie in it."""
    has_inner = any(other.startswith(f"{package}.") for other in known)
    return package.replace(".", "/") + ("/*.py" if has_inner else "")


def _key(package: str) -> str:
    return package.replace(".", "_")


# --- the table -------------------------------------------------------------------------------------------------------


def _table(known: Mapping[str, list[str]]) -> Iterator[str]:
    yield "| package | what it is for | modules |"
    yield "| --- | --- | --- |"
    for package, modules in known.items():
        folder = package.replace(".", "/")
        yield f"| `{folder}/` | {_purpose(ROOT / folder)} | {', '.join(modules)} |"


def _purpose(folder: Path) -> str:
    """Return the first line of a package's docstring."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
