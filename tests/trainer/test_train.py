"""Training from a recipe: what it writes, that it goes on to the bit, and what the names in it stand for."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lorac
from lorac.cli import main
from lorac.testing.eager_checks import assert_close
from lorac.trainer import Recipe, read_recipe, train
from lorac.trainer.data import TrainingData
from tests.letters import CHAT, letters
from tests.refusing import refuses
from tests.zoo import ZOO

LORAC = str(Path(sys.executable).with_name("lorac"))
ENTRY = ZOO["tiny_llama"]
LORA = {"method": "lora", "r": 3, "alpha": 6, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}
RECIPE = Recipe(
    adapters={"mine": LORA},
    max_steps=4,
    batch_size=2,
    gradient_accumulation_steps=2,
    max_length=12,
    eval_rows=3,
    logging_steps=2,
    save_steps=2,
    learning_rate=1e-2,
)


@pytest.fixture
def recipe(tmp_path):
    """A recipe on a few texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 4)
    (folder / "b.md").write_text("pack my box with five dozen liquor jugs! " * 3)
    return dataclasses.replace(RECIPE, data=str(folder))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_it_learns_tells_and_saves_what_peft_reads(recipe, tmp_path):
    model, out = ENTRY.fresh(), tmp_path / "run"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = dataclasses.replace(recipe, max_steps=30, lr_scheduler_type="constant", save_steps=None)
    compiled = train(model, letters(), recipe, out)
    log = log_of(out)
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] - 0.1
    assert [line["step"] for line in log[1:-1]] == list(range(2, 31, 2))
    assert all(line["tokens_per_second"] > 0 and line["learning_rate"] == 1e-2 for line in log[1:-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(out.glob("checkpoint-*"))

    loaded = lorac.load_adapter(out / "mine", model)
    assert (out / "mine" / "adapter_config.json").is_file()
    assert same(loaded, compiled.adapters["mine"])


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="adamw"),
        pytest.param({"rule": {"name": "AltLoRA", "plus": True}, "optimizer": "SGD"}, id="rule"),
        pytest.param(
            {
                "adapters": {"mine": {"method": "full", "targets": ["q_proj"]}},
                "optimizer": {"name": "GaLoreAdamW", "rank": 2, "update_proj_gap": 3},
            },
            id="galore",
        ),
        pytest.param({"rule": {"name": "Squeeze", "stages": [[3, 1], [2, 1], [1, 2]]}}, id="squeeze"),
    ],
)
def test_a_run_that_is_resumed_is_one_that_never_stopped(recipe, tmp_path, how):
    recipe = dataclasses.replace(recipe, **how)
    whole = train(ENTRY.fresh(), letters(), recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    torch.manual_seed(99)
    resumed = train(ENTRY.fresh(), letters(), recipe, tmp_path / "again", resume=True)
    assert same(whole.adapters["mine"], resumed.adapters["mine"])
    beginning = lorac.load_adapter(tmp_path / "again" / "checkpoint-2" / "mine.safetensors")
    assert not same(beginning, resumed.adapters["mine"])


def test_batches_go_round_all_rows_and_depend_on_their_number_alone(recipe):
    data = TrainingData(dataclasses.replace(recipe, batch_size=3), letters())
    count = len(data._rows)
    rows = [row for batch in data._order(0, count) for row in batch]
    assert all(sorted(rows[turn * count : (turn + 1) * count]) == list(range(count)) for turn in range(3))
    assert rows[:count] != rows[count : 2 * count]
    assert list(data._order(5, 8)) == list(data._order(0, 8))[5:]
    assert list(TrainingData(dataclasses.replace(recipe, seed=1, batch_size=3), letters())._order(0, 1)) != [rows[:3]]


def test_an_adapter_goes_on_from_its_file(recipe, tmp_path):
    train(ENTRY.fresh(), letters(), recipe, tmp_path / "first")
    second = dataclasses.replace(recipe, adapters={"mine": {"path": str(tmp_path / "first" / "mine")}})
    train(ENTRY.fresh(), letters(), second, tmp_path / "second")
    ended, began = (log_of(tmp_path / name)[place]["held_out_loss"] for name, place in (("first", -1), ("second", 0)))
    assert ended == began


def test_a_start_sees_the_runs_first_batches(recipe, tmp_path):
    begun = {**LORA, "start": {"name": "PiSSA"}}
    compiled = train(ENTRY.fresh(), letters(), dataclasses.replace(recipe, adapters={"mine": begun}), tmp_path / "run")
    assert compiled.adapters["mine"].variant.name == "residual"
    of_data = dataclasses.replace(recipe, adapters={"mine": {**LORA, "start": "LoRAGA", "r": 2}}, start_batches=2)
    other = train(ENTRY.fresh(), letters(), of_data, tmp_path / "other")
    assert "mine" in other.adapters


WRONG = {
    "method": ({"adapters": {"mine": {"method": "lor"}}}, "no method 'lor'", "lora"),
    "keyword": ({"adapters": {"mine": {**LORA, "alhpa": 1}}}, "no alhpa", "alpha"),
    "start": ({"adapters": {"mine": {**LORA, "start": "pissa2"}}}, "no start 'pissa2'", "PiSSA"),
    "rule": ({"rule": "LoraPlus"}, "no rule 'LoraPlus'", "LoRAPlus"),
    "rule's keyword": ({"rule": {"name": "LoRAPlus", "ratoi": 2}}, "no ratoi", "ratio"),
    "optimizer": ({"optimizer": "adamw"}, "no optimizer 'adamw'", "AdamW"),
    "precision": ({"mixed_precision": "f16"}, "no mixed_precision 'f16'", "fp16"),
    "data": ({"data": "python-dosc"}, "is no folder, file or set", "python-docs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_there_is_named_with_what_is_nearest(recipe, tmp_path, case):
    changes, what, nearest = WRONG[case]
    with pytest.raises(lorac.OptionError, match=what) as caught:
        train(ENTRY.fresh(), letters(), dataclasses.replace(recipe, **changes), tmp_path / "run")
    assert caught.value.nearest == nearest
    assert not (tmp_path / "run").exists()


def test_amounts_out_of_range_and_other_runs_are_refused(recipe, tmp_path):
    with pytest.raises(lorac.ChoiceError, match="max_steps=0"):
        dataclasses.replace(recipe, max_steps=0)
    with pytest.raises(lorac.WrongType, match="batch_size"):
        dataclasses.replace(recipe, batch_size="2")
    with pytest.raises(lorac.ChoiceError, match="without adapters"):
        dataclasses.replace(recipe, adapters={})
    with pytest.raises(lorac.ChoiceError, match="eval_rows=30"):
        train(ENTRY.fresh(), letters(), dataclasses.replace(recipe, eval_rows=30), tmp_path / "run")
    with pytest.raises(lorac.ChoiceError, match="no row of 4000 tokens"):
        train(ENTRY.fresh(), letters(), dataclasses.replace(recipe, max_length=4000), tmp_path / "run")
    with pytest.raises(lorac.ChoiceError, match="holds no checkpoint"):
        train(ENTRY.fresh(), letters(), recipe, tmp_path / "run", resume=True)
    train(ENTRY.fresh(), letters(), dataclasses.replace(recipe, max_steps=2), tmp_path / "run")
    with pytest.raises(lorac.ChoiceError, match="holds a run already"):
        train(ENTRY.fresh(), letters(), recipe, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "state.pt").write_bytes(b"PK")
    with refuses("corrupt_file", match=r"state\.pt"):
        train(ENTRY.fresh(), letters(), recipe, tmp_path / "run", resume=True)


def test_rows_of_prompts_and_conversations_count_what_is_to_be_learnt(tmp_path):
    lines = [
        {"prompt": "2+2=", "completion": "4"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = letters(CHAT)
    data = TrainingData(dataclasses.replace(RECIPE, data=str(file), eval_rows=0, max_length=40), tokenizer)
    batch = next(iter(data.loader(0, 1)))
    learnt = {"".join(chr(t) for t in row[row != -100]) for row in batch["labels"]}
    read = {
        tokenizer.decode(row[mask == 1]) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert learnt == {"4", "yo;a:"}
    assert read == {"2+2=4", "u:hi;a:yo;a:"}
    file.write_text('{"prompt": "x"}')
    with pytest.raises(lorac.OptionError, match="line 1 has none of the keys"):
        TrainingData(dataclasses.replace(RECIPE, data=str(file), eval_rows=0), tokenizer)


def test_the_command_line_reads_a_file_and_goes_on(recipe, tmp_path, monkeypatch, capsys):
    ENTRY.fresh().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    said = {**dataclasses.asdict(recipe), "model": str(tmp_path / "model"), "out": str(tmp_path / "run")}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(said))
    assert read_recipe(file)[0] == recipe

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
    file.write_text(yaml.safe_dump({**said, "max_step": 3}))
    code, _, complaint = call()
    assert code == 1
    assert "max_steps" in complaint


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_rows(recipe, tmp_path):
    ENTRY.fresh().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    adapters = {"mine": {**LORA, "dropout": 0.0}}
    for processes, rows in ((1, 2), (2, 1)):
        one = dataclasses.replace(recipe, adapters=adapters, batch_size=rows, optimizer="SGD", save_steps=None)
        out = tmp_path / f"run{processes}"
        said = {**dataclasses.asdict(one), "model": str(tmp_path / "model"), "out": str(out)}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(said))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, "--no-python", LORAC, "train", str(tmp_path / "recipe.yaml")]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    one, two = (lorac.load_adapter(tmp_path / f"run{n}" / "mine") for n in (1, 2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(a, b)
    losses = [[line.get("loss", line.get("held_out_loss")) for line in log_of(tmp_path / f"run{n}")] for n in (1, 2)]
    one, two = torch.tensor(losses)
    assert_close(one, two)
