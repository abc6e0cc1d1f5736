"""The page docs/rooms.md, made from the code: which rooms lorac has, what each is for, and who imports whom.

``python -m docs.make_rooms`` prints it. A room is a package; the interface, ``lorac/__init__.py``, reaches into all of
them on first use and is left out. Rooms that import each other (a package and its own registry) are one box.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp
import networkx

PACKAGE = "lorac"
ROOT = Path(__file__).parents[1]
HEAD = """# Rooms

Made by `make docs` from the code; `make check` fails where the two differ. What the rooms are about is said in
[architecture.md](architecture.md).

A box is a room with the number of its modules; an arrow leads to a room that it imports from. Only arrows that no
longer way round implies are drawn (the transitive reduction, for the sake of reading): a room may import from any room
that can be reached along the arrows too. What is found by its existence (backends, formats, PEFT types, methods) is
imported by no name, so no arrow tells of it. The interface, `lorac/__init__.py`, reaches into all rooms on first use
and is left out. What may import what is said by the contracts in `pyproject.toml`.
"""


def rooms() -> dict[str, list[str]]:
    """Room -> names of its modules, both sorted."""
    found = {}
    for door in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        room = ".".join(door.parent.relative_to(ROOT).parts)
        found[room] = sorted(path.stem for path in door.parent.glob("*.py") if path != door)
    return found


def arrows(known: Mapping[str, list[str]]) -> networkx.DiGraph:
    """Return the boxes and the arrows between them; each box knows its ``members``."""
    modules = grimp.build_graph(PACKAGE, exclude_type_checking_imports=False, cache_dir=None)
    drawn: networkx.DiGraph = networkx.DiGraph()
    drawn.add_nodes_from(known)
    for module in modules.modules - {PACKAGE}:
        for other in modules.find_modules_directly_imported_by(module) - {PACKAGE}:
            drawn.add_edge(_room(module, known), _room(other, known))
    drawn.remove_edges_from(list(networkx.selfloop_edges(drawn)))
    boxes = networkx.condensation(drawn)
    reduced = networkx.transitive_reduction(boxes)
    reduced.add_nodes_from(boxes.nodes(data=True))
    return reduced


def _room(module: str, known: Mapping[str, list[str]]) -> str:
    return module if module in known else module.rpartition(".")[0]


def page() -> str:
    """Make the whole page."""
    known = rooms()
    lines = [HEAD, "```mermaid", *_flowchart(known), "```", "", *_table(known)]
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


def _house(room: str) -> str:
    """Return the package directly below lorac that a room belongs to."""
    return ".".join(room.split(".")[:2])


def _box(members: list[str], known: Mapping[str, list[str]]) -> str:
    labels = [f"{_folder(room, known)} · {len(known[room])}" for room in members]
    return f'{_key(members[0])}["{"<br>".join(labels)}"]'


def _folder(room: str, known: Mapping[str, list[str]]) -> str:
    """Return the room's folder; its own files alone, where rooms of the picture lie in it."""
    holds_rooms = any(other.startswith(f"{room}.") for other in known)
    return room.replace(".", "/") + ("/*.py" if holds_rooms else "")


def _key(room: str) -> str:
    return room.replace(".", "_")


# --- the table -------------------------------------------------------------------------------------------------------


def _table(known: Mapping[str, list[str]]) -> Iterator[str]:
    yield "| room | what it is for | modules |"
    yield "| --- | --- | --- |"
    for room, modules in known.items():
        folder = room.replace(".", "/")
        yield f"| `{folder}/` | {_purpose(ROOT / folder)} | {', '.join(modules)} |"


def _purpose(folder: Path) -> str:
    """Return the first line of a package's docstring."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
