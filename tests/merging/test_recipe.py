"""Recipes in mergekit's terms: their meaning, and rejected ones."""

import pytest
import torch

import lorac
from lorac.merging.recipe import read_merge_recipe
from tests.merging.hosts import host, lora
from tests.refusing import refuses

TIES = """
merge_method: ties
base_model: base
models:
  - model: base+sql
    parameters: {weight: 0.7, density: 0.25}
  - model: chat
    name: talk
    parameters: {weight: 0.3}
parameters: {density: 0.5, normalize: false, lambda: 2.0, int8_mask: true}
dtype: bfloat16
"""


def read(tmp_path, text):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    return read_merge_recipe(file)


def test_mergekits_words(tmp_path):
    recipe = read(tmp_path, TIES)
    assert recipe.adapters == {"sql": "sql", "talk": "chat"} and recipe.weights == {"sql": 0.7, "talk": 0.3}
    assert recipe.options == {"density": {"sql": 0.25, "talk": 0.5}, "normalize": False, "scale": 2.0}
    assert (recipe.method, recipe.base_model, recipe.dtype) == ("ties", "base", torch.bfloat16)


def test_a_recipe_equals_the_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("sql", 1), ("chat", 2)):
        lorac.save_adapter(lora(name, seed, r=3), name, model=host())
    recipe = read(tmp_path, TIES)
    found = lorac.merge(recipe.adapters, recipe.method, recipe.weights, dtype=recipe.dtype, **recipe.options)
    own = {"density": [0.25, 0.5], "normalize": False, "scale": 2.0}
    expected = lorac.merge(["sql", "chat"], "ties", [0.7, 0.3], dtype=torch.bfloat16, **own)
    assert {path: at["delta"].dtype for path, at in found.tensors.items()} == dict.fromkeys(
        found.tensors, torch.bfloat16
    )
    assert all(torch.equal(at["delta"], expected.tensors[path]["delta"]) for path, at in found.tensors.items())


WRONG = {
    "no method": "adapters: [{adapter: a}]",
    "another method": "merge_method: tiez\nadapters: [{adapter: a}]",
    "no adapters": "merge_method: ties",
    "two lists": "merge_method: ties\nadapters: [{adapter: a}]\nmodels: [{model: a}]",
    "an adapter that is a text": "merge_method: ties\nadapters: [a]",
    "an adapter without a path": "merge_method: ties\nadapters: [{name: a}]",
    "two of one name": "merge_method: ties\nadapters: [{adapter: x/a}, {adapter: y/a}]",
    "slices": "merge_method: ties\nslices: []\nadapters: [{adapter: a}]",
    "a parameter of another way": "merge_method: ties\nadapters: [{adapter: a, parameters: {t: 0.5}}]",
    "a weight that is a text": "merge_method: ties\nadapters: [{adapter: a, parameters: {weight: much}}]",
    "a gradient": "merge_method: ties\nadapters: [{adapter: a, parameters: {weight: [0, 1]}}]",
    "another dtype": "merge_method: ties\ndtype: int3\nadapters: [{adapter: a}]",
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects_invalid_recipes(case, tmp_path):
    with pytest.raises((lorac.OptionError, lorac.WrongType), match=r"recipe\.yml"):
        read(tmp_path, WRONG[case])


ARGUMENTS = {
    "a misspelt way": (("tiez",), {}, "option_error", "ties"),
    "a misspelt option": (("ties",), {"densty": 0.5}, "option_error", "density"),
    "another way's option": (("linear",), {"density": 0.5}, "option_error", "it is one of rank"),
    "a density of 0": (("ties",), {"density": 0.0}, "option_error", "above 0"),
    "a density that is a text": (("ties",), {"density": "half"}, "wrong_type", "float"),
    "densities of three": (("ties",), {"density": [1, 1, 1]}, "choice_error", "2 adapters"),
    "a density of another": (("ties",), {"density": {"a": 1, "c": 1}}, "choice_error", "'c'"),
    "probabilities above 1": (("della",), {"density": 0.9}, "option_error", "0.1"),
    "one weight": (("ties", [1.0]), {}, "choice_error", "2 adapters"),
    "a weight of another": (("ties", {"a": 1, "c": 1}), {}, "choice_error", "'c'"),
    "a weight that is not finite": (("ties", [1, float("nan")]), {}, "choice_error", "finite"),
    "weights without a mean": (("linear", [1, -1]), {}, "choice_error", "normalize=False"),
    "other ranks": (("ties",), {"space": "factors"}, "choice_error", "2, 3"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_rejects_arguments_that_make_no_sense(case):
    given, options, code, said = ARGUMENTS[case]
    with refuses(code, match=said):
        lorac.merge([lora("a", 1, r=2), lora("b", 2, r=3)], *given, **options)


def test_rejects_adapters_that_do_not_fit_each_other():
    one, other = lora("a", 1, r=2), lora("b", 2, r=3)
    other.tensors["fc1"], other.tensors["fc2"] = other.tensors["fc2"], other.tensors["fc1"]
    with refuses("shape_mismatch", match="different layers"):
        lorac.merge([one, other])
    with refuses("adapter_exists"):
        lorac.merge([one, one])
    with refuses("choice_error", match="slerp"):
        lorac.merge({"a": one, "b": one, "c": one}, "slerp")
    with refuses("adapter_error", match="without trained tensors"):
        lorac.merge([one, lorac.LoRA()])
