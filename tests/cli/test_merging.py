"""``lorac merge``: adapters in the weights of a model's folder."""

import json

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


def test_it_says_what_it_did(folder):
    code, printed = run("model", "-a", "a=0.7", "-a", "b=0.3", "-o", "out")
    assert code == 0 and printed.strip() == "out: a*0.7, b*0.3 merged into 3 tensors; 510 kB in all"


def test_an_adapter_called_as_a_number_would_be(folder):
    """What exists as a whole is a path."""
    (folder / "a").rename(folder / "a=2")
    code, printed = run("model", "-a", "a=2", "-o", "out", "--json")
    assert code == 0 and json.loads(printed)["weights"] == {"a=2": 1.0}


def test_two_adapters_of_one_name_are_refused(folder):
    with pytest.raises(lorac.AdapterError, match=r"two adapters are called 'a'\n.*NAME=PATH=WEIGHT"):
        run("model", "-a", "a", "-a", "a=2", "-o", "out")
