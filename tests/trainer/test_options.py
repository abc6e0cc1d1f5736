"""Options of a run beside its recipe, and its outputs: longer runs, merged models, pictures, sweeps."""

import json
import sys
from xml.etree import ElementTree

import pytest
import torch
import transformers
import yaml

import lorac
from lorac.cli import main
from lorac.testing import assert_close
from lorac.trainer import read_recipe, train
from tests.hub import Hub, use_hub
from tests.trainer.runs import LORA, STEPS, TEXTS, losses, recipe, tokenizer, write_rows
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def run(said, folder, **options):
    return train(LLAMA.fresh(), tokenizer(), said, folder, **options)


def test_a_run_goes_on_for_longer(texts, tmp_path):
    constant = {"lr_scheduler_type": "constant", "save_steps": 2}
    whole = run(recipe(texts, arguments={**constant, "max_steps": 4}), tmp_path / "whole")
    run(recipe(texts, arguments={**constant, "max_steps": 2}), tmp_path / "run")
    longer = run(recipe(texts, arguments={**constant, "max_steps": 4}), tmp_path / "run", resume=True)
    for one, other in zip(whole.adapters["mine"].parameters(), longer.adapters["mine"].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(lorac.ChoiceError, match=r"max_steps is 4 there, and 3 here"):
        run(recipe(texts, arguments={**constant, "max_steps": 3}), tmp_path / "run", resume=True)


def test_writes_a_merged_model_and_a_picture_and_lines(texts, tmp_path, capsys):
    said = recipe(texts, arguments={"save_strategy": "no"}, merge=str(tmp_path / "merged"))
    compiled = run(said, tmp_path / "run")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[97, 101, 5, 116]])
    with torch.no_grad():
        assert_close(merged(ids).logits, compiled(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == tokenizer().eos_token
    picture = ElementTree.parse(tmp_path / "run" / "loss.svg").getroot()
    (line,) = [one for one in picture if one.tag.endswith("polyline")]
    assert len(line.get("points").split()) == 4
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    first = losses(tmp_path / "run" / "trainer_state.json")[0]
    assert printed[0].startswith(f"step 1/4: loss {first:.4g}, grad_norm ") and printed[0].endswith(" left)")
    with pytest.raises(lorac.ChoiceError, match="exists already"):
        recipe(texts, merge=str(tmp_path / "merged"))


def test_pushes_the_adapter(texts, tmp_path, monkeypatch):
    with Hub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        run(recipe(texts, arguments={"max_steps": 1, "save_strategy": "no"}, push="me/mine"), tmp_path / "run")
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
            *hub.repositories["me/mine"].commits["main"]
        }


def test_overrides_fields_by_their_paths(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("adapters: {mine: {method: lora, r: 2}}\nmax_steps: 9\n")
    said = read_recipe(file, {"max_steps": 3, "adapters.mine.r": 8, "seed": 5})
    assert said.adapters == {"mine": {"method": "lora", "r": 8}}
    assert said.arguments == {"max_steps": 3, "seed": 5}
    with pytest.raises(lorac.OptionError, match=r"'max_steps\.x' names a field of max_steps, which holds 9"):
        read_recipe(file, {"max_steps.x": 3})
    with pytest.raises(lorac.OptionError, match="has no field 'max_step'\n  nearest: max_steps"):
        read_recipe(file, {"max_step": 3})


@pytest.mark.medium("test_overrides_fields_by_their_paths")
def test_sweeps_over_a_grid_with_a_table(texts, tmp_path, monkeypatch, capsys):
    LLAMA.fresh().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    said = {"adapters": {"mine": LORA}, "data": texts, **STEPS, "max_steps": 1, "save_strategy": "no"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**said, "model": str(tmp_path / "model"), "out": str(tmp_path / "run")}))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", "train", str(file), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    code, out, _ = call(
        "--sweep", "adapters.mine.r=[1,2]", "--sweep", "seed=[1,2]", "--override", "max_steps=2", "--json"
    )
    runs = json.loads(out)["runs"]
    assert code == 0 and [(one["adapters.mine.r"], one["seed"]) for one in runs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({one["loss"] for one in runs}) > 1
    assert (tmp_path / "run" / "adapters.mine.r=2,seed=1" / "mine" / "adapter_config.json").is_file()
    assert len(losses(tmp_path / "run" / "adapters.mine.r=2,seed=1" / "trainer_state.json")) == 2
    assert "needs a list of values" in call("--sweep", "seed=1")[2]
