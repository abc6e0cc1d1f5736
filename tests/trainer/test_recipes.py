"""Runs of whole recipes: learning, saving and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.trainer import Recipe, train
from tests.trainer.runs import LORA, TEXTS, losses, recipe, tokenizer, write_rows
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]
ROWS = [{"text": text} for text in (*TEXTS, *TEXTS[::-1], TEXTS[0][::-1], TEXTS[1][::-1])]
MIXED = {"r": 2, "experts": 3, "targets": ["q_proj", "v_proj"]}
ROUTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "remix": ({"method": "remix", "top_k": 1, **MIXED}, {"loss": ["sampled_selection_loss"]}),
    "meteora": ({"method": "meteora", "top_k": 1, "train_experts": True, **MIXED}, {"loss": ["gate_loss"]}),
    "x_lora": (
        {"method": "x_lora", "hidden": "model.norm", "hidden_size": 64, "use_trainable_adapters": True, **MIXED},
        {},
    ),
    "flylora": ({"method": "flylora", "r": 6, "top_k": 2, "targets": ["q_proj"]}, {"rules": ["Balanced"]}),
}


def run(of: Recipe, out: Path, **options: Any) -> Any:
    return train(LLAMA.fresh(), tokenizer(), of, out, **options)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.medium("test_trainer.py: a stopped run, which has routers")
@pytest.mark.slow("the routed method whose gates have a loss of their own", keep=["meteora"])
@pytest.mark.parametrize("name", ROUTED)
def test_routed_methods_train_and_go_on(name: str, tmp_path: Path) -> None:
    said, fields = ROUTED[name]
    rows = [{**row, **({"experts": i % 3} if name == "meteora" else {})} for i, row in enumerate(ROWS)]
    of = recipe(
        write_rows(tmp_path / "rows.jsonl", rows),
        adapters={"mine": said},
        arguments={"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2},
        **fields,
    )
    trained = run(of, tmp_path / "whole")
    first = lorac.load_adapter(tmp_path / "whole" / "checkpoint-2", name="mine")
    named = {key: tensor for key, tensor in trained.named_parameters() if tensor.requires_grad}
    fresh = lorac.compile(LLAMA.fresh(), first).named_parameters()
    moved = {key: not torch.equal(tensor, named[key]) for key, tensor in fresh if key in named}
    assert moved and all(moved.values())
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    torch.manual_seed(99)
    assert same(run(of, tmp_path / "run", resume=True).adapters["mine"], trained.adapters["mine"])


def test_a_run_learns_and_peft_reads_its_adapters(tmp_path: Path) -> None:
    model = LLAMA.fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = {
        "mine": LORA,
        "../evil": {**LORA, "start": "PiSSA"},
        "checkpoint-4": {"method": "vera", "r": 2, "targets": ["q_proj"]},
    }
    of = recipe(
        write_rows(tmp_path / "rows.jsonl", ROWS),
        adapters=adapters,
        arguments={"save_strategy": "no", "max_steps": 12, "lr_scheduler_type": "constant"},
    )
    trained = train(model, tokenizer(), of, tmp_path / "out" / "run")
    found = losses(tmp_path / "out" / "run" / "trainer_state.json")
    assert sum(found[-4:]) < sum(found[:4])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    assert (tmp_path / "out" / "run" / "mine" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "run" / "checkpoint-4").exists()
    assert same(lorac.load_adapter(tmp_path / "out" / "run" / "mine", model), trained.adapters["mine"])


def test_an_adapter_goes_on_from_its_file_and_a_run_without_checkpoints_begins_again(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    steps = {"save_strategy": "no", "max_steps": 1}
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    first = run(recipe(data, arguments=steps), tmp_path / "run")
    second = recipe(
        data, adapters={"mine": {"path": str(tmp_path / "run" / "mine")}}, arguments={**steps, "learning_rate": 0.0}
    )
    assert same(run(second, tmp_path / "second").adapters["mine"], first.adapters["mine"])
    with pytest.raises(lorac.ChoiceError, match="holds a run already"):
        run(recipe(data, arguments=steps), tmp_path / "run")
    with pytest.raises(lorac.ChoiceError, match="holds no finished checkpoint"):
        run(recipe(data, arguments=steps), tmp_path / "second", resume=True)


@pytest.mark.medium("test_train.py: a start without data, and one with")
def test_a_start_sees_the_runs_first_batches(tmp_path: Path) -> None:
    begun = {**LORA, "r": 2, "start": "LoRAGA"}
    of = recipe(
        write_rows(tmp_path / "rows.jsonl", ROWS),
        adapters={"mine": begun},
        arguments={"save_strategy": "no"},
        start_batches=2,
    )
    assert run(of, tmp_path / "run").adapters["mine"].variant.name == "residual"
