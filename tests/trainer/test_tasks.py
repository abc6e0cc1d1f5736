"""Every task of a recipe that TRL's and transformers' trainers have: the same losses as with PEFT."""

import copy
import importlib
import json

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from PIL import Image
from transformers import DataCollatorForSeq2Seq

from lorac import OptionError
from lorac.trainer import train
from lorac.trainer.recipe import TASKS
from tests.limits import LOSSES
from tests.peft_files import quiet
from tests.trainer.runs import CPU, PAIRS, image_text_model, losses, recipe, tokenizer, write_rows
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [{"prompt": pair["prompt"], "goal": pair["chosen"]} for pair in PAIRS]
ANSWERS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
ONLINE = {"num_generations": 2, "max_completion_length": 4, "reward_funcs": [f"{__name__}:count_odd"]}
CASES = {
    "orpo": (PAIRS, {}),
    "cpo": (PAIRS, {}),
    "simpo": (PAIRS, {}),
    "reward": (PAIRS, {}),
    "grpo": (PROMPTS, {**ONLINE, "num_iterations": 2}),
    "grpo with its reference": (PROMPTS, {**ONLINE, "beta": 0.2}),
    "rloo": (PROMPTS, {**ONLINE, "beta": 0.2}),
    "seq2seq": (ANSWERS, {}),
}
STEPS = {
    **CPU,
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def count_odd(completions, goal, **_):
    """A reward of the tests: how many characters of a completion have an odd number, and whether it is the goal."""
    return [sum(ord(c) % 2 for c in text) + 2.0 * (text == said) for text, said in zip(completions, goal, strict=True)]


def host(task):
    torch.manual_seed(0)
    if task == "seq2seq":
        return ZOO["tiny_t5"].fresh()
    if task != "reward":
        return ZOO["tiny_llama"].fresh()
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    config.pad_token_id = 0
    return transformers.LlamaForSequenceClassification(config).eval()


def train_with_peft(task, model, rows, given, folder):
    """Train a model of PEFT's by the task's trainer, and return its losses."""
    fields = TASKS[task]
    trainer, config = (getattr(importlib.import_module(fields.library), name) for name in fields[1:3])
    made = dict(given)
    more = {"reward_funcs": [count_odd]} if made.pop("reward_funcs", None) else {}
    arguments = config(output_dir=str(folder), **{**fields.defaults, **STEPS, **made})
    rows = datasets.Dataset.from_list(copy.deepcopy(rows))
    if task == "seq2seq":
        text = tokenizer()
        rows = rows.map(
            lambda row: text(row["prompt"], text_target=row["completion"]), remove_columns=["prompt", "completion"]
        )
        more["data_collator"] = DataCollatorForSeq2Seq(text)
    transformers.set_seed(arguments.seed)
    made = trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **more)
    made.train()
    return made.state.log_history


@pytest.mark.medium("another loss of the same trainers", keep=["orpo", "grpo", "seq2seq"])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_trl_with_peft(case, tmp_path):
    (rows, given), task = CASES[case], case.split()[0]
    kind = {"seq2seq": "SEQ_2_SEQ_LM", "reward": "SEQ_CLS"}.get(task, "CAUSAL_LM")
    targets = ["q", "v"] if task == "seq2seq" else ["q_proj", "v_proj"]
    with quiet():
        torch.manual_seed(5)
        settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type=kind)
        wrapped = peft.get_peft_model(host(task), settings)
        wrapped.save_pretrained(tmp_path / "begun")
        expected = train_with_peft(task, wrapped, rows, given, tmp_path / "peft")
    arguments = {**STEPS, **{name: value for name, value in given.items() if name != "reward_funcs"}}
    ours = recipe(
        write_rows(tmp_path / "rows.jsonl", rows),
        adapters={"mine": {"path": str(tmp_path / "begun")}},
        task=task,
        reward_funcs=given.get("reward_funcs"),
        plain=True,
        arguments=arguments,
    )
    with quiet():
        train(host(task), tokenizer(), ours, tmp_path / "lorac")
    found = json.loads((tmp_path / "lorac" / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", *["reward"] * ("reward_funcs" in given), "grad_norm"):
        one, other = ([entry[key] for entry in history if key in entry] for history in (found, expected))
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= LOSSES
    assert len(one) == 10 and len({round(number, 5) for number in one}) > 6


@pytest.mark.medium("the other tasks: this model takes a second")
def test_images_and_turns_train_as_with_peft(tmp_path):
    rows = []
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
        turns = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": f"{index}"}]
        rows.append({"images": [f"{index}.png"], "messages": turns})
    steps = {**STEPS, "max_length": None}
    (model, processor), (other, _) = image_text_model(), image_text_model()
    targets = r".*language_model.*\.[qv]_proj"
    with quiet():
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
        wrapped.save_pretrained(tmp_path / "begun")
        whole = [{**row, "images": [str(tmp_path / row["images"][0])]} for row in rows]
        held = datasets.Dataset.from_list(whole).cast_column("images", datasets.List(datasets.Image()))
        arguments = trl.SFTConfig(output_dir=str(tmp_path / "peft"), **steps)
        made = trl.SFTTrainer(wrapped, arguments, train_dataset=held, processing_class=processor)
        made.train()
        begun = {"mine": {"path": str(tmp_path / "begun")}}
        data = write_rows(tmp_path / "rows.jsonl", rows)
        train(other, processor, recipe(data, adapters=begun, task="vlm", plain=True, arguments=steps), tmp_path / "run")
    found = losses(tmp_path / "run" / "trainer_state.json")
    expected = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= LOSSES
    write_rows(tmp_path / "rows.jsonl", [rows[0], {**rows[1], "images": ["9.png"]}])
    with pytest.raises(OptionError, match=r"row 2 names the image '9\.png'"):
        train(other, processor, recipe(data, adapters=begun, task="vlm", plain=True, arguments=steps), tmp_path / "no")
