"""The house rules of CONTRIBUTING.md that can be read off the sources: rooms, circles, classes, nesting, reasons."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import grimp
import networkx
import pytest

from lorac import Compiled, LoracError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lorac"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({source.parent for source in SOURCES})
LARGEST_ROOM = 14
DEEPEST = 2
LEVELS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
SILENCED = re.compile(r"# (?:noqa|type: ignore)\b(?P<rest>.*)")
REASON = re.compile(r"(?:: [A-Z0-9, ]+  \(|\[[a-z, -]+\]  # )\w")

SMALLEST = 0.01
TOLERANCES = {"allclose", "isclose", "approx", "assert_allclose", "assert_almost_equal"}
MEASURES = ROOT / "tests" / "limits.py"


def _within(path):
    return path.relative_to(PACKAGE).as_posix()


# --- rooms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_has_a_door_plate_and_can_be_overlooked(room):
    """Every folder says what it is for, and holds few modules, those aside that each register one thing.

    A registry (one file per method, per PEFT type) is as long as its list is, and nobody has to overlook it.
    """
    plate = room / "__init__.py"
    assert plate.is_file(), f"{room} is no package"
    assert ast.get_docstring(ast.parse(plate.read_text())), f"{plate} does not say what the room is for"
    modules = [source for source in room.glob("*.py") if source != plate and not _registers_one(source)]
    assert len(modules) <= LARGEST_ROOM, f"{len(modules)} modules: {sorted(m.name for m in modules)}"


def _registers_one(source):
    """Whether a module is an entry of a registry: it defines one ``METHOD``, or one class that gives its ``name``."""
    entries = [node for node in ast.parse(source.read_text()).body if _is_entry(node)]
    return len(entries) == 1


def _is_entry(node):
    if isinstance(node, ast.ClassDef):
        return any("name" in _assigned(inner) and inner.value is not None for inner in node.body)
    return "METHOD" in _assigned(node)


def _assigned(node):
    """Names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_what_counts_as_a_registrys_entry():
    assert _registers_one(PACKAGE / "variants" / "lora.py")
    assert _registers_one(PACKAGE / "formats" / "peft" / "types" / "lora.py")
    assert not _registers_one(PACKAGE / "variants" / "base.py")
    assert not _registers_one(PACKAGE / "errors.py")


def test_no_two_modules_import_each_other():
    """Not by a longer way round either, nor inside a function, nor for the sake of types alone."""
    graph = grimp.build_graph("lorac", exclude_type_checking_imports=False, cache_dir=None)
    arrows = ((one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one))
    circles = [sorted(c) for c in networkx.strongly_connected_components(networkx.DiGraph(arrows)) if len(c) > 1]
    assert not circles


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_abstract_or_final():
    """No concrete class inherits from a concrete class of lorac.

    The exception tree is exempt, since ``except`` asks for it; and the eager ``Compiled``, which is an nn.Module too.
    """
    found = {cls for source in SOURCES for cls in _classes(source)}
    offenders = {
        f"{cls.__name__}({base.__name__})"
        for cls in found - {Compiled}
        for base in cls.__bases__
        if base in found and base is not Compiled and not inspect.isabstract(base)
        if not issubclass(cls, LoracError)
    }
    assert not offenders
    assert {cls.__name__ for cls in found if Compiled in cls.__bases__} == {"CompiledModule"}


def _classes(source):
    """The classes that a module defines itself."""
    module = importlib.import_module(".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]


# --- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=_within)
def test_at_most_two_levels_of_nesting(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert _depth(node) <= DEEPEST, f"{node.name}, line {node.lineno}: return early, or take a step out"


def _depth(node):
    """Levels of blocks below a node; an ``elif`` is none of its own, nor is a function within the function."""
    deepest = 0
    for name, children in ast.iter_fields(node):
        statements = children if isinstance(children, list) else [children]
        chained = isinstance(node, ast.If) and name == "orelse" and len(statements) == 1
        for child in statements:
            if isinstance(child, ast.AST) and not isinstance(child, SCOPES):
                level = isinstance(child, LEVELS) and not (chained and isinstance(child, ast.If))
                deepest = max(deepest, level + _depth(child))
    return deepest


@pytest.mark.parametrize(
    ("code", "depth"),
    [
        ("x = 1", 0),
        ("for a in b:\n    if a:\n        c()", 2),
        ("if a:\n    b()\nelif c:\n    d()\nelse:\n    e()", 1),
        ("if a:\n    b()\nelse:\n    if c:\n        d()\n    e()", 2),
        ("try:\n    with a:\n        b()\nexcept C:\n    for d in e:\n        while f:\n            g()", 3),
        ("with a:\n    def f():\n        if b:\n            c()", 1),
    ],
)
def test_how_nesting_is_counted(code, depth):
    assert _depth(ast.parse(code)) == depth


@pytest.mark.parametrize("source", SOURCES, ids=_within)
def test_whatever_silences_a_tool_says_why(source):
    """``# noqa: CODE  (reason)`` and ``# type: ignore[code]  # reason``."""
    for number, line in enumerate(source.read_text().splitlines(), 1):
        silenced = SILENCED.search(line)
        assert silenced is None or REASON.match(silenced["rest"]), f"line {number}: {line.strip()}"


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_chooses_a_tolerance(source):
    """A test decides by ``torch.equal``, ``assert_parity``, ``assert_close`` or what ``tests/limits.py`` defines."""
    if source == MEASURES:
        return
    for node in ast.walk(ast.parse(source.read_text())):
        assert not _is_tolerance(node), f"line {node.lineno}: {ast.unparse(node)}: see tests/limits.py"


def _is_tolerance(node):
    """A library's comparison with tolerances of its own, a limit handed over, or a comparison with a tiny number."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        given = {keyword.arg for keyword in node.keywords}
        own = called.rpartition(".")[2] in TOLERANCES or called == "torch.testing.assert_close"
        return own or bool(given & {"rtol", "atol"}) or (called.endswith("assert_parity") and "limit" in given)
    if not isinstance(node, ast.Compare) or all(isinstance(op, ast.Eq | ast.NotEq | ast.In) for op in node.ops):
        return False
    numbers = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
    return any(isinstance(number, float) and 0 < number < SMALLEST for number in numbers)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.allclose(x, y)", True),
        ("torch.testing.assert_close(x, y)", True),
        ("matrix_rank(x, rtol=r)", True),
        ("assert_parity(y, ref, base, limit=1)", True),
        ("(x - y).norm() <= 1e-9 * y.norm()", True),
        ("x == 1e-9", False),
        ("assert_close(x, y)", False),
        ("loss <= 0.9 * before", False),
        ("SGD(x, lr=1e-3)", False),
    ],
)
def test_what_counts_as_a_tolerance(code, expected):
    assert _is_tolerance(ast.parse(code, mode="eval").body) is expected
