"""Runs from a recipe: written files, an unchanged model, and the learning of each task."""

import contextlib
import copy
import json
import sys

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from lorac import ChoiceError, OptionError
from lorac.cli import main
from lorac.trainer import Recipe, train
from lorac.trainer.run import _Run
from tests.end_to_end.peft_cases import tie
from tests.limits import LOSSES
from tests.peft_files import quiet
from tests.refusing import refuses
from tests.trainer.runs import CPU, LORA, PAIRS, STEPS, TEXTS, recipe, tokenizer, write_rows
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]


@pytest.fixture
def texts(tmp_path):
    """A file of a few texts."""
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def log(folder, key):
    """Return the values that a run logged under a name."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_evaluates_and_leaves_model_and_tokenizer_unchanged(texts, tmp_path):
    model, processing, out = LLAMA.fresh(), tokenizer(), tmp_path / "run"
    config = (model.config.to_dict(), model.generation_config.to_dict())
    begun = copy.deepcopy(vars(processing))
    steps = {"max_steps": 12, "save_strategy": "no", "eos_token": "Z"}
    compiled = train(model, processing, recipe(texts, eval_data=texts, arguments=steps), out)
    assert log(out, "eval_loss")[-1] < log(out, "loss")[0] - 0.1
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert (processing.eos_token, processing.pad_token) == (chr(3), chr(0))
    assert vars(processing).keys() == begun.keys()
    assert "forward" not in vars(model)
    assert not compiled.training


def test_preference_tasks_reject_initialisers_that_need_data(tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    for start, refused in (("PiSSA", False), ("LoRAGA", True)):
        begun = {"mine": {**LORA, "start": start}}
        said = recipe(pairs, task="dpo", adapters=begun, arguments={"max_steps": 1, "save_strategy": "no"})
        with refuses("option_error", match="which dpo does not use") if refused else contextlib.nullcontext():
            train(LLAMA.fresh(), tokenizer(), said, tmp_path / start)


@pytest.mark.medium("test_evaluates_and_leaves_model_and_tokenizer_unchanged")
def test_an_adapter_that_trains_on_is_its_own_reference(tmp_path):
    pairs, model = write_rows(tmp_path / "pairs.jsonl", PAIRS), LLAMA.fresh()
    first = recipe(pairs, task="dpo", arguments={"max_steps": 8, "save_strategy": "no"})
    train(model, tokenizer(), first, tmp_path / "first")
    again = {"mine": {"path": str(tmp_path / "first" / "mine")}}
    train(
        model, tokenizer(), recipe(pairs, task="dpo", adapters=again, arguments={"max_steps": 2}), tmp_path / "second"
    )
    assert log(tmp_path / "first", "rewards/margins")[-1] > 0.01
    assert abs(log(tmp_path / "second", "rewards/margins")[0]) <= LOSSES


@pytest.mark.slow("test_every_rule.py recomputes, and test_peft.py does under TRL")
def test_a_checkpoint_in_the_backward_pass_recomputes_with_the_adapters(texts, tmp_path):
    found = []
    for checkpointing in (False, True):
        adapters = {"mine": {"method": "dora", "r": 2, "targets": ["q_proj", "down_proj"]}}
        steps = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
        out = tmp_path / str(checkpointing)
        found.append(train(LLAMA.fresh(), tokenizer(), recipe(texts, adapters=adapters, arguments=steps), out))
    for one, other in zip(*(compiled.adapters["mine"].parameters() for compiled in found), strict=True):
        assert torch.equal(one, other)


def test_texts_are_classified(tmp_path):
    rows = [{"text": f"{'yes' if index % 2 else 'no'} {index}", "label": "ab"[index % 2]} for index in range(16)]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    bert = transformers.BertForSequenceClassification(config).eval()
    steps = {"max_steps": 20, "learning_rate": 3e-2, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"}
    adapters = {"mine": {"method": "lora", "r": 4, "targets": ["query", "value", "classifier"]}}
    said = Recipe(
        adapters=adapters,
        task="sequence-classification",
        data=write_rows(tmp_path / "rows.jsonl", rows),
        test_size=4,
        early_stopping_patience=9,
        arguments={**CPU, "per_device_train_batch_size": 2, **steps},
    )
    train(bert, tokenizer(), said, tmp_path / "run")
    assert log(tmp_path / "run", "eval_accuracy")[-1] == 1.0


def test_evaluates_by_the_labels_of_the_training(tmp_path):
    """A set without the first label numbers the others as the training does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=128, num_labels=3, **sizes))
    rows = [{"text": label, "label": label} for label in "abc"]
    data, evaluated = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[1:])
    said = Recipe(
        adapters={"mine": {"method": "lora", "r": 4, "targets": ["query"]}},
        task="sequence-classification",
        data=data,
        eval_data=evaluated,
        arguments={**CPU, "max_steps": 1},
    )
    made = _Run(bert, tokenizer(), said, tmp_path / "run").settings
    assert [made[name]["labels"] for name in ("train_dataset", "eval_dataset")] == [[0, 1, 2], [1, 2]]


@pytest.mark.medium("test_recipes.py goes on from checkpoints")
def test_the_command_line_reads_a_recipe_and_goes_on(texts, tmp_path, monkeypatch, capsys):
    LLAMA.fresh().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    said = {"adapters": {"mine": LORA}, "data": texts, **STEPS, "save_steps": 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**said, "model": str(tmp_path / "model"), "out": str(tmp_path / "run")}))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", "train", str(file), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    code, out, _ = call("--json")
    assert (code, json.loads(out)["adapters"]) == (0, ["mine"])
    code, _, complaint = call()
    assert code == 1
    assert "holds a run already" in complaint
    assert call("--resume")[0] == 0


def test_trains_on_rows_of_a_tied_embedding(texts, tmp_path):
    """Rows of PEFT's file train alone, in a head that TRL reads, and are written as such; README.md says what it is."""
    model = LLAMA.fresh()
    tie(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[97, 101])
    with quiet():
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "begun")
    said = recipe(texts, adapters={"mine": {"path": str(tmp_path / "begun")}}, arguments={"save_steps": 2})
    train(model, tokenizer(), said, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "mine" / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == {"model.embed_tokens": [97, 101]}
    rows = load_file(tmp_path / "run" / "mine" / "adapter_model.safetensors").popitem()[1]
    assert not torch.equal(rows, model.lm_head.weight[[97, 101]])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`mine`: union" in card and "None" not in card


def test_rejects_to_resume_with_other_rows(tmp_path):
    data, said = tmp_path / "rows.jsonl", {"save_steps": 1, "max_steps": 1}
    for more in ("", " again"):
        write_rows(data, [{"text": text + more} for text in TEXTS])
        if more:
            with pytest.raises(ChoiceError, match="of another run: rows_hash is"):
                train(LLAMA.fresh(), tokenizer(), recipe(data, arguments=said), tmp_path / "run", resume=True)
        else:
            train(LLAMA.fresh(), tokenizer(), recipe(data, arguments=said), tmp_path / "run")


def test_rejects_a_metric_that_no_evaluation_gives(texts, tmp_path):
    said = {"metric_for_best_model": "los", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(OptionError, match="gives the metric_for_best_model 'los'\n  nearest: loss"):
        train(LLAMA.fresh(), tokenizer(), recipe(texts, test_size=1, arguments=said), tmp_path / "run")
