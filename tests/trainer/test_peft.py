"""The same adapter, rows and seed in lorac's recipe and in TRL with PEFT: the same losses."""

import copy
import itertools

import datasets
import peft
import pytest
import trl

from lorac.trainer import train
from tests.limits import LOSSES
from tests.trainer.runs import PAIRS, STEPS, TEXTS, losses, recipe, tokenizer, write_rows
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]
TURNS = [
    {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]} for text in TEXTS
]
TASKS = {
    "sft": ([{"text": text} for text in TEXTS], trl.SFTTrainer, trl.SFTConfig),
    "sft of turns": (TURNS, trl.SFTTrainer, trl.SFTConfig),
    "sft of answers": (
        [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS],
        trl.SFTTrainer,
        trl.SFTConfig,
    ),
    "dpo": (PAIRS, trl.DPOTrainer, trl.DPOConfig),
    "kto": (
        [
            {"prompt": p["prompt"], "completion": p[k], "label": k == "chosen"}
            for p in PAIRS
            for k in ("chosen", "rejected")
        ],
        trl.KTOTrainer,
        trl.KTOConfig,
    ),
}


QUICK = (("sft", False), ("sft", True), ("dpo", False))


@pytest.mark.medium("training/test_curves.py has PEFT's losses")
@pytest.mark.slow("texts, with recomputation", keep=["sft-True"])
@pytest.mark.parametrize(
    ("task", "checkpointing"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(TASKS, (False, True))
    ],
)
def test_losses_are_those_of_trl_with_peft(task, checkpointing, tmp_path):
    rows, trainer_class, config = TASKS[task]
    steps = {"max_steps": 20, "gradient_accumulation_steps": 1 + checkpointing, "gradient_checkpointing": checkpointing}
    arguments = {**STEPS, **steps, "save_strategy": "no"}
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(LLAMA.fresh(), settings)
    wrapped.save_pretrained(tmp_path / "begun")
    trainer = trainer_class(
        model=wrapped,
        args=config(output_dir=str(tmp_path / "peft"), **arguments),
        train_dataset=datasets.Dataset.from_list(copy.deepcopy(rows)),
        processing_class=tokenizer(),
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours = recipe(
        write_rows(tmp_path / "rows.jsonl", rows),
        adapters={"mine": {"path": str(tmp_path / "begun")}},
        arguments=arguments,
        task=task.split()[0],
    )
    train(LLAMA.fresh(), tokenizer(), ours, tmp_path / "lorac")
    found = losses(tmp_path / "lorac" / "trainer_state.json")
    assert len(found) == 20
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) <= LOSSES
    assert len({round(loss, 5) for loss in found}) > 10
