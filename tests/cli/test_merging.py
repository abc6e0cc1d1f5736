"""``lorac merge``: adapters in the weights of a model's folder."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lorac
from lorac.cli import app
from tests.merging.test_merged_model import drawn
from tests.zoo import ZOO


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model's folder and two adapters."""
    model = ZOO["tiny_llama"].model()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    for name, adapter in drawn(model, {n: lorac.LoRA(r=1, targets=["q_proj"]) for n in "ab"}, 0.1).adapters.items():
        lorac.save_adapter(adapter, tmp_path / name, model=model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    """The exit code and what is printed."""
    done = CliRunner().invoke(app, ["merge", *arguments], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.medium("one way to give adapters", keep=["given0*"])
@torch.no_grad()
@pytest.mark.parametrize(
    ("given", "paths", "weights"),
    [
        (["a=0.7", "b=0.3"], {"a": "a", "b": "b"}, {"a": 0.7, "b": 0.3}),
        (["a"], {"a": "a"}, {"a": 1.0}),
        (["one=a=-1", "other=b"], {"one": "a", "other": "b"}, {"one": -1.0, "other": 1.0}),
        (["./a=2"], {"a": "a"}, {"a": 2.0}),
    ],
)
def test_adapters_are_merged_by_their_weights(given, paths, weights, folder):
    options = [option for one in given for option in ("-a", one)]
    code, printed = run("model", *options, "-o", "out", "--json")
    assert code == 0 and json.loads(printed)["weights"] == weights
    read = type(ZOO["tiny_llama"].model()).from_pretrained("out")
    expected = lorac.merge_into(ZOO["tiny_llama"].model(), paths, weights).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


def test_prints_a_summary(folder):
    code, printed = run("model", "-a", "a=0.7", "-a", "b=0.3", "-o", "out")
    assert code == 0 and printed.strip() == "out: a*0.7, b*0.3 merged by cat into 3 tensors"


def test_an_adapter_called_as_a_number_would_be(folder):
    """What exists as a whole is a path."""
    (folder / "a").rename(folder / "a=2")
    code, printed = run("model", "-a", "a=2", "-o", "out", "--json")
    assert code == 0 and json.loads(printed)["weights"] == {"a=2": 1.0}


@pytest.mark.parametrize("spec", ["a=half", "one=a=x"])
def test_rejects_a_weight_that_is_not_a_number(spec, folder):
    with pytest.raises(lorac.OptionError, match=rf"-a {spec}: the weight '\w+' is not a number\n.*=0.5"):
        run("model", "-a", spec, "-o", "out")


def test_rejects_two_adapters_of_one_name(folder):
    with pytest.raises(lorac.AdapterError, match=r"two adapters are called 'a'\n.*NAME=PATH=WEIGHT"):
        run("model", "-a", "a", "-a", "a=2", "-o", "out")


@torch.no_grad()
def test_merges_adapters_by_a_method(folder):
    options = ["--method", "ties", "-s", "density=0.5", "-s", "space=knots"]
    code, printed = run("-a", "a=0.7", "-a", "b=0.3", *options, "-o", "c")
    assert code == 0 and printed.strip() == "c: peft"
    expected = lorac.merge(["a", "b"], "ties", [0.7, 0.3], density=0.5, space="knots")
    found = lorac.load_adapter("c")
    for path, at in expected.tensors.items():
        assert all(torch.equal(found.tensors[path][name], tensor) for name, tensor in at.items())
    code, printed = run("-a", "a", "-a", "b", "--method", "ties", "-s", "density=0.5", "-o", "d", "--json")
    assert code == 0 and json.loads(printed)["format"] == "native"


@torch.no_grad()
def test_merges_the_result_of_a_method_into_the_weights(folder):
    code, _ = run("model", "-a", "a=0.7", "-a", "b=0.3", "--method", "ties", "-s", "density=0.5", "-o", "out")
    assert code == 0
    model = ZOO["tiny_llama"].model()
    merged = lorac.merge(["a", "b"], "ties", [0.7, 0.3], model, density=0.5)
    expected, read = lorac.merge_into(model, merged).state_dict(), type(model).from_pretrained("out").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())


def test_accepts_a_recipe_in_mergekits_terms(folder):
    Path("recipe.yaml").write_text(
        "merge_method: ties\nadapters:\n  - adapter: a\n    parameters: {weight: 0.7, density: 0.5}\n"
        "  - adapter: b\n    parameters: {weight: 0.3, density: 0.5}\nparameters: {lambda: 2.0}\n"
    )
    assert run("--recipe", "recipe.yaml", "-o", "c")[0] == 0
    expected = lorac.merge(["a", "b"], "ties", [0.7, 0.3], density=0.5, scale=2.0)
    found = lorac.load_adapter("c")
    assert found.tensors.keys() == expected.tensors.keys()
    for path, at in expected.tensors.items():
        assert all(torch.equal(found.tensors[path][name], tensor) for name, tensor in at.items())


@pytest.mark.medium("two other ways", cases=["given1"])
@pytest.mark.parametrize("given", [[], ["-a", "a", "--recipe", "r.yaml"], ["--recipe", "r.yaml", "-s", "rank=2"]])
def test_rejects_adapters_from_options_and_recipe_together(given, folder):
    with pytest.raises(lorac.OptionError, match="adapters come from -a, or from --recipe"):
        run(*given, "-o", "out")


def test_rejects_an_option_without_a_value(folder):
    with pytest.raises(lorac.OptionError, match=r"'density' is not an option of a method\n.*KEY=VALUE"):
        run("-a", "a", "-s", "density", "-o", "out")
