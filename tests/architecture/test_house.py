"""House rules of CONTRIBUTING.md that can be read off the sources; each test lists all offenders."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grimp
import networkx
import pytest

import lorac
from lorac import Compiled, LoracError
from tests.sources import ROOT, SOURCES, parse

PACKAGE = ROOT / "lorac"
ROOMS = sorted({source.parent for source in SOURCES})
SHARED = {"passes", "backends", "runtime", "ir", "frontend", "target"}
LARGEST_ROOM = 20
SHORT = 5
MOST_SHORT_FUNCTIONS = 61
USES_OF_A_RECORD = 3
MOST_RECORDS = 57
TEST_NAME = re.compile(r"^\s*def test_(\w+)", re.MULTILINE)
RIDDLES = {"what", "whatever", "told", "tells", "asked", "came", "whom", "beside", "besides", "refused", "refuses"}
SILENCED = re.compile(r"# (?:noqa|type: ignore)\b(?P<rest>.*)")
REASON = re.compile(r"(?:: [A-Z0-9, ]+  \(|\[[a-z, -]+\]  # )\w")

SMALLEST = 0.01
TOLERANCES = {"allclose", "isclose", "approx", "assert_allclose", "assert_almost_equal"}
MAY_CHOOSE = re.compile(rf"{'|'.join(TOLERANCES)}|torch\.testing|rtol|atol|limit\s*=|\.00|[eE]-\d")
MEASURES = ROOT / "tests" / "limits.py"


def _within(path):
    return path.relative_to(PACKAGE).as_posix()


# --- rooms -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow("`make check` runs the same tool")
def test_dependencies_point_inward():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def test_packages_are_small():
    """A package has at most ``LARGEST_ROOM`` modules, files of a registry not counted."""
    sizes = {
        _within(room): sum(not _registers(s) for s in room.glob("*.py") if s.name != "__init__.py") for room in ROOMS
    }
    assert {room: size for room, size in sizes.items() if size > LARGEST_ROOM} == {}
    assert [_within(room) for room in ROOMS if not (room / "__init__.py").is_file()] == []


def _registers(source):
    """Whether a module is a registry's: it defines a class, or a family, that gives its ``name`` or ``peft_type``."""
    return any(map(_is_entry, parse(source).body))


def _is_entry(node):
    inside = node.body if isinstance(node, ast.ClassDef) else ()
    return any({"name", "peft_type"} & _assigned(inner) and inner.value is not None for inner in inside)


def _assigned(node):
    """Names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_recognises_entries_of_registries():
    assert _registers(PACKAGE / "variants" / "lora.py")
    assert _registers(PACKAGE / "formats" / "peft" / "types" / "lora.py")
    assert not _registers(PACKAGE / "variants" / "base.py")
    assert not _registers(PACKAGE / "errors.py")


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
    found = {cls for source in _importable() for cls in _classes(source)}
    offenders = {
        f"{cls.__name__}({base.__name__})"
        for cls in found - {Compiled}
        for base in cls.__bases__
        if base in found and base is not Compiled and not inspect.isabstract(base)
        if not issubclass(cls, LoracError)
    }
    assert not offenders
    assert {cls.__name__ for cls in found if Compiled in cls.__bases__} == {"CompiledModule"}


def _importable():
    """All modules; those of Ray and OpenVINO where they are installed, which no extra of development brings."""
    folders = {"ray": PACKAGE / "serving" / "ray", "openvino": PACKAGE / "backends" / "openvino"}
    missing = [folder for library, folder in folders.items() if importlib.util.find_spec(library) is None]
    return [source for source in SOURCES if not {*missing} & {*source.parents}]


def _classes(source):
    """The classes that a module defines itself."""
    module = importlib.import_module(".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]


# --- functions -------------------------------------------------------------------------------------------------------


def test_comments_that_silence_a_tool_give_a_reason():
    """``# noqa: CODE  (reason)`` and ``# type: ignore[code]  # reason``."""
    found = [
        f"{_within(source)}:{number} {line.strip()}"
        for source in SOURCES
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if (silenced := SILENCED.search(line)) and not REASON.match(silenced["rest"])
    ]
    assert found == []


def test_short_private_functions_have_two_callers():
    """A private function has two callers or more than ``SHORT`` lines of body, but for a number that only falls."""
    found = [
        f"{_within(source)}:{node.lineno} {node.name}"
        for source in SOURCES
        for node in _outer_functions(parse(source))
        if node.name.startswith("_") and not node.name.startswith("__")
        if _uses()[node.name] == 1 and _body_lines(node) <= SHORT
    ]
    assert len(found) <= MOST_SHORT_FUNCTIONS, found


def test_records_are_built_in_two_places():
    """A dataclass is built in two places, but for passes and methods, which are values, and a number that only falls.

    A method is built where it is used, outside of lorac.
    """
    calls = Counter(
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in _nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    )
    found = [
        node.name
        for node in _nodes()
        if isinstance(node, ast.ClassDef) and "dataclass" in " ".join(map(ast.unparse, node.decorator_list))
        if calls[node.name] <= 1 and _uses()[node.name] <= USES_OF_A_RECORD
        if not any(ast.unparse(base).endswith(("Pass", "Variant")) for base in node.bases)
    ]
    assert len(found) <= MOST_RECORDS, found


def _nodes():
    return (node for source in SOURCES for node in ast.walk(parse(source)))


@functools.cache
def _uses():
    """Count how often the package reads each name or attribute."""
    names = (node.id for node in _nodes() if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return Counter(names) + Counter(node.attr for node in _nodes() if isinstance(node, ast.Attribute))


def _outer_functions(node):
    """Yield a module's functions and methods, without those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outer_functions(child)


def _body_lines(function):
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


# --- names and texts -------------------------------------------------------------------------------------------------


def test_class_names_are_unique():
    trees = map(parse, SOURCES)
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_public_definitions_have_docstrings():
    assert [
        _within(source)
        for source, tree in ((source, parse(source)) for source in SOURCES)
        if not ast.get_docstring(tree)
    ] == []
    bare = [
        f"{_within(source)}:{node.lineno} {node.name}"
        for source, tree in ((source, parse(source)) for source in SOURCES)
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
        if "overload" not in map(ast.unparse, node.decorator_list)  # the function itself has one
    ]
    assert bare == []


def test_shared_code_names_no_method():
    """Passes, backends and runtime know the forms; a method's name in them would be a special case."""
    methods = {v.__name__ for v in lorac.variants().values() if v.__module__.startswith("lorac.variants.")}
    # Names in code; docstrings and comments may say who an algorithm comes from.
    shared = {
        source: tree
        for source, tree in ((source, parse(source)) for source in SOURCES)
        if _within(source).partition("/")[0] in SHARED
    }
    named = {
        f"{_within(source)}:{node.lineno} {node.id}"
        for source, tree in shared.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in methods
    }
    assert named == set()


def test_no_path_of_a_machine_in_the_sources():
    assert [_within(s) for s in SOURCES if re.search(r"/(home|work|root|Users)/", s.read_text())] == []


# --- tests -----------------------------------------------------------------------------------------------------------


def test_names_of_tests_state_a_behaviour():
    """As in ``test_rejects_…``, ``test_returns_…``, ``test_keeps_…``."""
    names = [name for file in (ROOT / "tests").rglob("test_*.py") for name in TEST_NAME.findall(file.read_text())]
    assert [name for name in names if RIDDLES & set(name.split("_"))] == []


def test_no_test_chooses_a_tolerance():
    """A test decides by ``torch.equal``, ``assert_parity``, ``assert_close`` or what ``tests/limits.py`` defines."""
    texts = {source: source.read_text() for source in sorted((ROOT / "tests").rglob("*.py")) if source != MEASURES}
    found = [
        f"{source.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for source, text in texts.items()
        if MAY_CHOOSE.search(text)  # to parse all of them takes seconds
        for node in ast.walk(ast.parse(text))
        if _is_tolerance(node)
    ]
    assert found == []


def _is_tolerance(node):
    """A library's comparison with tolerances of its own, a limit handed over, or a comparison with a tiny number."""
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        own = called in TOLERANCES or (called == "assert_close" and ast.unparse(node.func).startswith("torch.testing."))
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
def test_recognises_tolerances(code, expected):
    assert _is_tolerance(ast.parse(code, mode="eval").body) is expected
    assert not expected or MAY_CHOOSE.search(code)
