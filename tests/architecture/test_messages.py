"""Every next step that a message names exists: names, calls, commands, flags, arguments, extras, pages.

The texts are read off the sources: whatever is said to an error, a warning or a field of a table that becomes a next
step. What is run of them is in ``tests/test_mistakes.py``.
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import tomllib

import pytest
import torch
import typer

import lorac
from lorac import errors
from lorac.cli import app
from lorac.formats import formats
from lorac.formats.adapterhub.loras import LoraFields
from lorac.formats.peft.config import peft_types
from lorac.ir.slots.required_slots import MODES
from lorac.merging import ways
from lorac.session.compiled import CompiledModule
from lorac.session.targets import find_backend, targets
from tests.sources import ROOT, SOURCES, parse

SPEAKS = {*errors.__all__, "warn", "check_type", "refuse", "unsupported_error", "corrupt_error", "require_base"}
SPEAKS |= {name for name in vars(errors) if name.endswith("_error")}
"""Calls whose texts reach a person."""

NAME = re.compile(r"(?<![\w./':])lorac\.[A-Za-z_]\w*(?:\.\w+)*")
COMMAND = re.compile(r"`lorac ([^`]*)`")
FLAG = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")
EXTRA = re.compile(r"lorac\[(\w+)\]")
PAGE = re.compile(r"docs/[\w/-]+\.\w+")
ARGUMENT = re.compile(r"(?<![\w.'\[{-])([a-z_]\w*)=(?!=)")
VALUE = re.compile(r"(?<![\w.])(target|mode|format|dtype)='([\w…]+)'")
CALL = re.compile(r"(?<![\w.'])((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)\(")

PUBLIC = [
    *(f"lorac.diffusion.{path.stem}" for path in (ROOT / "lorac/diffusion").glob("[!_]*.py")),
    "lorac",
    "lorac.serving",
    "lorac.serving.store",
    "lorac.trainer",
    "lorac.training",
    "lorac.training.loram",
    "lorac.training.initialisation",
    "lorac.training.transfer",
    "lorac.testing",
    "lorac.analysis.entanglement",
    "lorac.web",
    "lorac.diffusion",
    "lorac.variants.shira",
]
FOREIGN = {
    "architectures": "a transformers configuration",
    "assistant_model": "generate of transformers",
    "cache": "generate of transformers",
    "do_sample": "generate of transformers",
    "inplace": "torch.nn.ReLU",
    "input_ids": "models of transformers",
    "labels": "models of transformers",
    "max_new_tokens": "generate of transformers",
    "output_logits": "generate of transformers",
    "padding": "tokenizers of transformers",
    "path_initial_model_for_weight_conversion": "PeftModel.save_pretrained",
    "ref_model": "trainers of TRL",
    "return_dict_in_generate": "generate of transformers",
    "return_tensors": "tokenizers of transformers",
    "stop_strings": "generate of transformers",
    "stopping_criteria": "generate of transformers",
    "weights_only": "torch.load",
}
"""Arguments that messages name -> whose they are."""
CALLED = {
    "W": torch.Tensor,
    "backward": torch.Tensor.backward,
    "can_generate": "models of transformers",
    "copy": importlib.import_module("copy"),
    "model": torch.nn.Module,
    "pipeline": "diffusers:StableDiffusionPipeline",
    "numpy": importlib.import_module("numpy"),
    "save_pretrained": "peft's",
    "step": torch.optim.Optimizer.step,
    "torch": torch,
    "transformers": importlib.import_module("transformers"),
}
"""Names in messages that other libraries define, and modules that take long to import."""


OF_MODELS = {
    "resize_token_embeddings": "models of transformers",
    "save_pretrained": "models of transformers and PEFT",
    "unmerge_adapter": "PeftModel",
}
"""Methods of ``model`` that messages name -> whose they are."""


# --- what is said ----------------------------------------------------------------------------------------------------


OTHER_LANGUAGES = ("lorac/report/", "lorac/trainer/log.py", "lorac/web/texts.py")
"""Files whose texts are graphs, pages, pictures and samples for a tokenizer."""


@functools.cache
def texts():
    """Every text that may reach a person, with its file: those of one call together are one text."""
    found = []
    for source in SOURCES:
        where = source.relative_to(ROOT).as_posix()
        if where.startswith(OTHER_LANGUAGES):
            continue
        found += [(where, text) for text in map(_said, _spoken(parse(source))) if text]
    return found


def _spoken(tree):
    """Calls that raise or warn, and statements outside of them that hold a text for one."""
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called(node) in SPEAKS]
    inside = {id(inner) for call in calls for inner in ast.walk(call)}
    held = [
        node for node in nodes if isinstance(node, ast.Assign | ast.Return | ast.keyword) and id(node) not in inside
    ]
    return [*calls, *held]


def _called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _said(node):
    """The texts within a node, with … for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) and " " in node.value else ""
    return "\n".join(filter(None, map(_said, ast.iter_child_nodes(node))))


def _all(pattern):
    return sorted({(found, where) for where, text in texts() for found in pattern.findall(text)})


def test_finds_the_texts_of_errors():
    said = [text for _, text in texts()]
    assert len(said) > 300
    for part in ("add_adapter(source, name=...)", "pip install", "`lorac sites MODEL`", "use format='native'"):
        assert any(part in text for text in said), part


# --- what there is ---------------------------------------------------------------------------------------------------


@functools.cache
def arguments():
    """Names that something public takes: arguments, fields, those of PEFT's and AdapterHub's configurations."""
    known = set()
    for module in map(importlib.import_module, PUBLIC):
        for name in getattr(module, "__all__", None) or vars(module):
            known |= _taken(getattr(module, name))
    for target in targets():
        try:
            kinds = [find_backend(target).options]
        except lorac.MissingExtra:  # openvino, which no extra of development brings
            kinds = vars(importlib.import_module(f"lorac.backends.{target}.options")).values()
        known |= {field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)}
    for way in ways().values():
        known |= {field.name for field in dataclasses.fields(way)}
    for kind in peft_types().values():
        known |= set(kind.fields)
    return known | {field.name for field in dataclasses.fields(LoraFields)} | FOREIGN.keys()


def _taken(found):
    if not callable(found):
        return set()
    methods = [method for _, method in inspect.getmembers(found, callable)] if inspect.isclass(found) else []
    return {name for one in (found, *methods) for name in _parameters(one)}


@functools.cache
def _parameters(function):
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


@functools.cache
def commands():
    """Command -> its flags; "" -> those before any."""
    group = typer.main.get_command(app)
    found = {name: _flags(command) for name, command in group.commands.items()}
    return found | {"": _flags(group)}


def _flags(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


# --- what is named exists --------------------------------------------------------------------------------------------


def test_names():
    assert [found for found in _all(NAME) if not _is_public(found[0])] == []


def _is_public(name):
    home = max((room for room in PUBLIC if name.startswith(f"{room}.")), key=len)
    if home != "lorac":
        return hasattr(importlib.import_module(home), name.removeprefix(f"{home}.").partition(".")[0])
    found, inner = lorac, name.split(".")[1:]
    for part in inner:
        found = getattr(found, part, None)
    return found is not None and inner[0] in lorac.__all__


def test_commands():
    assert len(_all(COMMAND)) > 5
    assert [found for found in _all(COMMAND) if not _is_command(found[0])] == []


def _is_command(line):
    command = next((word for word in line.split() if not word.startswith("-")), "")
    flags = commands().get("" if command == "…" else command)
    return flags is not None and flags.issuperset(FLAG.findall(line))


def test_flags():
    known = set().union(*commands().values())
    said = [(flag, where) for where, text in texts() for flag in FLAG.findall(text) if where.startswith("lorac/cli/")]
    assert [(flag, where) for flag, where in said if flag not in known and flag not in {"-c", "-d"}] == []


def test_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert _all(EXTRA)
    assert [found for found in _all(EXTRA) if found[0] not in extras] == []


def test_pages():
    assert [found for found in _all(PAGE) if not (ROOT / found[0]).exists()] == []


def test_arguments():
    assert len(_all(ARGUMENT)) > 50
    assert [found for found in _all(ARGUMENT) if found[0] not in arguments()] == []


def test_values():
    known = {
        "target": (*targets(), "…"),
        "mode": MODES,
        "format": formats(),
        "dtype": ("float32", "float64", "float16", "…"),
    }
    assert [(found, where) for found, where in _all(VALUE) if found[1] not in known[found[0]]] == []


def test_calls():
    said = {(called, where) for where, text in _steps() for called in CALL.findall(text)}
    assert [(called, where) for called, where in sorted(said) if not _exists(called)] == []


def _steps():
    """The next steps alone: elsewhere a name before a bracket may be a formula."""
    for where, text in texts():
        if text.count("\n"):
            yield where, text.partition("\n")[2]


def _exists(called):
    """Whether a call in a message is one of lorac's, of a compiled model's, of torch's or of Python's."""
    first, *rest = called.split(".")
    if first == "model" and rest and rest[0] in OF_MODELS:
        return True
    homes = {"lorac": lorac, "compiled": CompiledModule, **CALLED}
    if first in homes:
        home = homes[first]
        if isinstance(home, str) and ":" in home:
            home = pkgutil.resolve_name(home)
        # A room is an attribute of the package only once something has imported it.
        return not rest or hasattr(home, rest[0]) or (home is lorac and _is_room(rest[0]))
    own = (lorac.Compiled, builtins, importlib.import_module("lorac.testing"))
    return not rest and (called in lorac.__all__ or any(hasattr(home, called) for home in own))


def _is_room(name):
    return importlib.util.find_spec(f"lorac.{name}") is not None


@pytest.mark.parametrize(
    ("called", "exists"),
    [
        ("lorac.load", True),
        ("lorac.to_lore", False),
        ("compiled.explain", True),
        ("compiled.adapters.values", True),
        ("compiled.settel", False),
        ("add_adapter", True),
        ("conformance", True),
        ("numpy.savez", True),
        ("pipeline.save_pretrained", True),
        ("load_adaptor", False),
    ],
)
def test_recognises_calls_that_exist(called, exists):
    assert _exists(called) is exists


# --- every message has a next step -----------------------------------------------------------------------------------


def test_every_error_has_a_next_step():
    """By the raise, or by what is usual for its class."""
    nodes = ((source, node) for source in SOURCES for node in ast.walk(parse(source)))
    raises = [(s, n) for s, n in nodes if isinstance(n, ast.Call) and _called(n) in errors.__all__]
    assert len(raises) > 300
    silent = [f"{source}:{node.lineno}: {ast.unparse(node)}" for source, node in raises if not _has_next_step(node)]
    assert silent == []


def _has_next_step(node):
    given = {keyword.arg for keyword in node.keywords}
    return (
        "next_step" in given
        or _called(node) == "MissingExtra"
        or _code(node) in getattr(errors, _called(node)).usual_steps
    )


def _code(node):
    """The code that a call gives its error; without one, an artifact's."""
    codes = [keyword.value.value for keyword in node.keywords if keyword.arg == "code"]
    return codes[0] if codes else "artifact_error"
