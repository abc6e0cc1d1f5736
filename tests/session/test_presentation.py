"""How a compiled model presents itself on every target: its summary and its attributes."""

import json

import pytest
import torch
from torch import nn

import lorac
from lorac.cli import main
from lorac.session.presentation import INTERFACE
from tests.mistakes import Tiny, example, lora


@pytest.fixture(scope="module")
def compiled():
    """A compiled model of target "eager", which is a module."""
    return lorac.compile(Tiny(), {"sql": lora(), "style": lorac.DoRA(r=3, targets=["out_proj"])}, active={"sql": 0.5})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A compiled model that runs a program, and is not a module."""
    folder = tmp_path_factory.mktemp("stored") / "compiled"
    lorac.compile(Tiny(), {"sql": lora()}, example_inputs=example()).save(folder)
    return lorac.load(folder)


def test_repr_names_target_sites_and_adapters(compiled, stored):
    assert repr(compiled).splitlines() == [
        "<CompiledTiny for eager, live",
        "  sites: 4 with slots, of 8",
        "  adapters: sql (lora r=2 alpha=8), style (dora r=3 alpha=8)",
        "  active: sql*0.5>",
    ]
    assert repr(stored).startswith("<Compiled for eager, live\n")


def test_repr_of_an_adapter_counts_its_values(compiled):
    assert repr(compiled.adapters["sql"]) == "<Adapter 'sql': lora, sites: 2, values: 208 (float32)>"
    assert len(str(compiled.adapters)) < 200
    empty = lorac.Adapter("none", lora(), replaced={"bias": torch.zeros(3, dtype=torch.float16)})
    assert repr(empty) == "<Adapter 'none': lora, sites: 0, replaced parameters: 1, values: 3 (float16)>"


def test_many_adapters_are_counted():
    many = lorac.compile(Tiny(), {f"a{i}": lora() for i in range(9)})
    assert "a3 (lora r=2 alpha=8), 5 more\n" in repr(many)
    assert "a4" not in repr(many)
    assert "adapters: none\n" in repr(lorac.compile(Tiny()))


def test_dir_lists_only_the_public_interface(compiled, stored):
    assert dir(stored) == list(INTERFACE)
    assert set(INTERFACE) < set(dir(compiled)) <= {*INTERFACE, "save_pretrained", *dir(nn.Module)}
    assert [name for name in dir(compiled) if not hasattr(type(compiled), name) and name not in vars(compiled)] == []
    internals = {"engine", "plans", "pool", "session", "rebind", "choice", "snapshot"}
    assert not internals & {*dir(compiled), *dir(stored)}


@pytest.mark.parametrize("name", ["train", "eval", "parameters", "state_dict", "to"])
def test_rejects_attributes_of_modules_on_other_targets(stored, name):
    with pytest.raises(lorac.EagerOnly, match=f"has no '{name}'"):
        getattr(stored, name)
    assert not hasattr(stored, name)  # who asks so gets an answer, not an error


def test_a_name_that_is_misspelt(compiled, stored):
    for one in (compiled, stored):
        with pytest.raises(AttributeError, match="has no 'swop'\n  nearest: swap"):
            _ = one.swop
    with pytest.raises(AttributeError, match=r"nearest: lorac\.LoRA"):
        _ = lorac.Lora
    assert compiled.embed is not None  # the host's own


NAME = "\x1b]0;title\x07\x1b[31mred\x9b0m\u202e"
ESCAPED = r"\x1b]0;title\x07\x1b[31mred\x9b0m\u202e"


def test_escapes_control_characters_in_all_texts(tmp_path, monkeypatch, capsys):
    """A file may name its adapter so that whoever prints the name sees another text."""
    adapter = lorac.compile(Tiny(), {NAME: lora()}).adapters[NAME]
    lorac.save_adapter(adapter, tmp_path / "a.safetensors", "native")
    read = lorac.load_adapter(tmp_path / "a.safetensors", Tiny())
    assert read.name == NAME
    compiled = lorac.compile(Tiny(), [read], example_inputs=example())
    with pytest.raises(lorac.ChoiceError) as refused:
        compiled.swap({NAME: "strong"})
    texts = [repr(compiled), str(compiled.explain()), str(compiled.graph), repr(compiled.adapters), str(refused.value)]
    for words in (["inspect"], ["inspect", "--json"]):
        monkeypatch.setattr("sys.argv", ["lorac", *words, str(tmp_path / "a.safetensors")])
        with pytest.raises(SystemExit):
            main()
        texts.append(capsys.readouterr().out)
    assert json.loads(texts.pop())["name"] == NAME
    for text in texts:
        assert ESCAPED in text
        assert all(c.isprintable() or c in "\n\t" for c in text)
