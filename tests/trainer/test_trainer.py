"""Checkpoints of ``AdapterTrainer``: those that it resumes, and those that it rejects."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import lorac
from lorac.trainer.checkpoints import find_checkpoint, finish_checkpoint, open_checkpoint
from lorac.trainer.trainer import AdapterTrainer, adapter_trainer
from tests.trainer.trainings import ROWS, STEPS, Stop, compiled_of, plan, same, tensors_of, trainer_of
from tests.training import every_rule
from tests.training.every_rule import RULES
from tests.training.loops import host

TARGETS = ("q_proj", "v_proj")
LORA = lorac.LoRA(r=4, alpha=8, dropout=0.2, targets=TARGETS)
PLAN = plan()
SAMPLED = plan(loss=["sampled_selection_loss"])
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "two": ({"z": LORA, "a": lorac.LoRA(r=2, dropout=0.1, targets=["q_proj", "down_proj"])}, PLAN),
    "two, in the other order": ({"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"]), "z": LORA}, PLAN),
    "modules_to_save": ({"a": dataclasses.replace(LORA, modules_to_save=["lm_head"])}, PLAN),
    "bottleneck": ({"a": lorac.Bottleneck(dropout=0.2, reduction_factor=4.0)}, PLAN),
    "remix": ({"a": lorac.ReMix(r=2, experts=3, top_k=1, dropout=0.1, targets=TARGETS)}, SAMPLED),
    "names": ({"../a": LORA, "a/b": lorac.VeRA(r=2, targets=TARGETS)}, PLAN),
    "bf16": ({"a": LORA}, plan(arguments={"bf16": True})),
    "recomputed": ({"a": LORA}, plan(arguments={"activation_checkpointing": True})),
}


def same_tensors(one: lorac.Adapter, other: lorac.Adapter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ── Going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def gone_on(adapters: Any, recipe: Any, folder: Path, step: int, **settings: Any) -> tuple[Any, Any]:
    """A training in one go, and one that ended after a step, of which only the checkpoint before it was left."""
    whole, stopped = compiled_of(adapters, recipe), compiled_of(adapters, recipe)
    trainer_of(whole, recipe, folder / "whole", **settings).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(stopped, recipe, folder / "run", callbacks=[Stop(step)], **settings).train()
    found = find_checkpoint(folder / "run")
    assert found.step == step - 1
    torch.manual_seed(99)
    resumed = compiled_of(found.adapters(host("tiny_llama")), recipe)
    assert not same(whole, resumed)
    trainer_of(resumed, recipe, folder / "run", **settings).train(resume_from_checkpoint=True)
    return whole, resumed


@pytest.mark.medium("two adapters in another order", cases=["remix"])
@pytest.mark.slow("two adapters in another order, whose routers draw", keep=["two, in the other order", "remix"])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    assert same(*gone_on(*CASES[name], tmp_path, 3))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_stops_at_any_step_of_any_epoch(step: int, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 2}
    assert same(*gone_on(*CASES["two"], tmp_path, step, **settings))


SPECS: dict[str, dict[str, Any]] = {
    "nested_ranks": {"rules": ["NestedRanks"]},
    "proximal_gates": {"rules": [{"name": "ProximalGates", "threshold": 0.01}]},
    "preconditioned": {"rules": [{"name": "Preconditioned", "reg": 0.1}], "optimizer": "SGD"},
    "lora_pro": {"rules": ["LoRAPro"], "optimizer": "AdamW"},
    "lora_pro_full": {"rules": [{"name": "LoRAPro", "full": True}], "optimizer": "SGD"},
    "altlora": {"rules": ["AltLoRA"], "optimizer": "SGD"},
    "altlora_plus_skipping": {
        "rules": [{"name": "AltLoRA", "plus": True, "turns": {"first": "B", "period": 2, "skip_idle": True}}],
        "optimizer": "SGD",
    },
    "altlora_released": {"rules": [{"name": "AltLoRA", "plus": True, "released": True}], "optimizer": "SGD"},
    "allora": {"rules": ["ALLoRA"], "optimizer": "SGD"},
    "lora_plus": {"rules": [{"name": "LoRAPlus", "ratio": 4.0}]},
    "relora": {"rules": [{"name": "ReLoRA", "into": "sum", "every": 2, "prune": 0.5}]},
    "squeeze": {"rules": [{"name": "Squeeze", "stages": [[4, 2], [2, 3], [1, 9]]}]},
    "balanced": {"rules": [{"name": "Balanced", "rate": 0.05}]},
    "galore_adamw": {"optimizer": {"name": "GaLoreAdamW", "rank": 2, "update_proj_gap": 2}},
    "galore_sgd": {"optimizer": {"name": "GaLoreSGD", "rank": 2, "update_proj_gap": 2, "momentum": 0.9}},
}


@pytest.mark.medium("test_a_resumed_run_equals_an_uninterrupted_one, and training/test_resuming.py")
@pytest.mark.slow("a rule with stages", cases=["altlora*"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("squeeze", "altlora_plus_skipping") else pytest.mark.slow)
        for name in RULES
    ],
)
def test_every_rule_resumes(name: str, tmp_path: Path) -> None:
    ruled, recipe = RULES[name], plan(**SPECS[name])
    rows = [{key: value[i] for key, value in every_rule.batch(step).items()} for step in range(2) for i in range(4)]
    settings = {"rows": rows, "remove_unused_columns": False, "learning_rate": 0.05}
    whole, stopped = ruled.compiled(), ruled.compiled()
    trainer_of(whole, recipe, tmp_path / "whole", **settings).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(stopped, recipe, tmp_path / "run", callbacks=[Stop(4)], **settings).train()
    found = find_checkpoint(tmp_path / "run")
    resumed = ruled.compiled(found.adapters(every_rule.Host()))
    torch.manual_seed(5)
    trainer_of(resumed, recipe, tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    assert same(whole, resumed)


def by_process(*words: object, processes: int = 1) -> int:
    """Run ``tests.trainer.processes`` and return how it ended."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "tests.trainer.processes", *map(str, words)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, timeout=300, env=environment).returncode


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_resumes_a_killed_run(where: str, tmp_path: Path) -> None:
    """Killed in a step, or while its checkpoint is written."""
    assert by_process(tmp_path / "whole") == 0
    assert by_process(tmp_path / "run", "--kill", where) == -signal.SIGKILL
    found = find_checkpoint(tmp_path / "run")
    assert found.step == 2
    assert (tmp_path / "run" / "checkpoint-3").exists() == (where == "checkpoint")
    assert by_process(tmp_path / "run", "--resume") == 0
    ends = [open_checkpoint(tmp_path / name / f"checkpoint-{STEPS}") for name in ("whole", "run")]
    assert same_tensors(*(end.adapters(host("tiny_llama"))["a"] for end in ends))


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path) -> None:
    assert by_process(tmp_path / "whole", processes=2) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert by_process(tmp_path / "run", "--resume", processes=2) == 0
    ends = [open_checkpoint(tmp_path / name / f"checkpoint-{STEPS}") for name in ("whole", "run")]
    assert same_tensors(*(end.adapters(host("tiny_llama"))["a"] for end in ends))
    alone = trainer_of(compiled_of({"a": LORA}, PLAN), PLAN, tmp_path / "run")
    with pytest.raises(lorac.ChoiceError, match="processes is 2 there, and 1 here"):
        alone.train(resume_from_checkpoint=True)


# ── What a checkpoint is bound to ────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("written")
    recipe = plan(arguments={"learning_rate": 1e-2, "seed": 1})
    trainer_of(compiled_of({"a": LORA}, recipe), recipe, folder, max_steps=2).train()
    return folder


def other_base() -> Any:
    model = host("tiny_llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rate": ({"arguments": {"learning_rate": 1e-3, "seed": 1}}, {}, "arguments.learning_rate is 0.01 there, and 0.001"),
    "seed": ({"arguments": {"learning_rate": 1e-2, "seed": 2}}, {}, "arguments.seed is 1 there, and 2"),
    "rule": ({"rules": ["LoRAPlus"]}, {}, r"rules is \[\] there"),
    "recipe's method": ({"adapters": {"a": {"method": "dora"}}}, {}, "adapters.a.method is 'lora' there, and 'dora'"),
    "method": ({}, {"adapters": {"a": lorac.DoRA(r=4, alpha=8, targets=TARGETS)}}, "adapters.a.method is 'lora'"),
    "set": ({}, {"adapters": {"a": LORA, "b": LORA}}, "adapters.b is None there"),
    "base": ({}, {"model": other_base}, "base is 'float32:"),
    "rows": ({}, {"rows": ROWS[:6]}, "rows is 8 there, and 6"),
}


@pytest.mark.medium("another rate, method and base", keep=["rate", "method", "base"])
@pytest.mark.parametrize("case", OTHERS)
def test_rejects_a_checkpoint_of_another_run(case: str, written: Path, tmp_path: Path) -> None:
    fields, other, message = OTHERS[case]
    recipe = plan(**{"arguments": {"learning_rate": 1e-2, "seed": 1}, **fields})
    adapters = other.get("adapters", {"a": LORA})
    compiled = lorac.compile(
        other.get("model", lambda: host("tiny_llama"))(), adapters, active=dict.fromkeys(adapters, 1.0)
    )
    trainer = trainer_of(compiled, recipe, written, max_steps=2, rows=other.get("rows", ROWS))
    before = tensors_of(compiled)
    with pytest.raises(lorac.ChoiceError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(compiled).items())


def test_resuming_accepts_changes_that_do_not_affect_training(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "checkpoint-1", tmp_path / "checkpoint-1")
    recipe = plan(arguments={"learning_rate": 1e-2, "seed": 1, "logging_steps": 1, "save_total_limit": 1})
    compiled = compiled_of({"a": LORA}, recipe)
    trainer_of(compiled, recipe, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    ends = [open_checkpoint(path / "checkpoint-2") for path in (written, tmp_path)]
    assert same_tensors(*(end.adapters(host("tiny_llama"))["a"] for end in ends))


@pytest.mark.medium("test_arguments.py: until nothing gets better and the best is kept")
def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    recipe = plan(arguments={**evaluation, "learning_rate": 0.3})
    compiled = compiled_of({"a": LORA}, recipe)
    trainer = trainer_of(compiled, recipe, tmp_path, eval_dataset=ROWS[:2])
    trainer.train()
    best = open_checkpoint(trainer.state.best_model_checkpoint)
    assert same_tensors(best.adapters(host("tiny_llama"))["a"], compiled.adapters["a"])
    assert len([*tmp_path.glob("checkpoint-*")]) <= 2


def test_ignores_unfinished_checkpoints(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2" / "checkpoint.json").unlink()
    for name in ("checkpoint-99999", "checkpoint-٤", f"checkpoint-{'9' * 5000}"[:200], "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path).step == 1
    with pytest.raises(lorac.ChoiceError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path / "checkpoint-x")
    for name in ("checkpoint-2", "checkpoint-x", "nowhere"):
        with pytest.raises(lorac.ArtifactError, match=r"it has no checkpoint\.json"):
            open_checkpoint(tmp_path / name)
    trainer = trainer_of(compiled_of({"a": LORA}, PLAN), PLAN, tmp_path / "empty")
    with pytest.raises(lorac.ChoiceError, match="holds no finished checkpoint"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.medium("test_a_changed_byte_is_found_in_every_file, and formats/test_budget.py's bombs")
def test_a_state_of_strangers_is_answered_in_lorac_words(written: Path, tmp_path: Path) -> None:
    """Hashes say that a file is the one that was written, and not who wrote it."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(written / "checkpoint-2", folder)
    with zipfile.ZipFile(folder / "scheduler.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("scheduler/data.pkl", bytes(300 << 20))
    run = open_checkpoint(written / "checkpoint-2").run
    finish_checkpoint(folder, 2, run)
    with pytest.raises(lorac.FormatError, match="MiB beyond its size"):
        open_checkpoint(folder)
    shutil.copyfile(written / "checkpoint-2" / "scheduler.pt", folder / "scheduler.pt")
    recipe = plan(arguments={"learning_rate": 1e-2, "seed": 1})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save([1], folder / name)
        finish_checkpoint(folder, 2, run)
        trainer = trainer_of(compiled_of({"a": LORA}, recipe), recipe, tmp_path, max_steps=3)
        with pytest.raises(lorac.ArtifactError, match="the run cannot go on from"):
            trainer.train(resume_from_checkpoint=str(folder))
        shutil.copyfile(written / "checkpoint-2" / name, folder / name)


def test_the_adapters_of_a_manifest_are_those_of_the_file(written: Path, tmp_path: Path) -> None:
    """A file is read once, however many adapters a manifest promises."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(written / "checkpoint-2", folder)
    run = open_checkpoint(folder).run
    for promised in ({}, {str(number): {} for number in range(2000)}, {"b": {}}):
        finish_checkpoint(folder, 2, {**run, "adapters": promised})
        begun = time.process_time()
        with pytest.raises(lorac.ArtifactError, match=r"has adapters \['a'\], its manifest"):
            open_checkpoint(folder).adapters(host("tiny_llama"))
        assert time.process_time() - begun < 2


def test_a_changed_byte_is_found_in_every_file(written: Path, tmp_path: Path) -> None:
    """In the beginning, in the middle and at the end; a file that is missing or longer is found too."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(written / "checkpoint-2", folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert {name.split(".")[0] for name in state["state"]} == {"adapter_tensors"}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 4
    for file in files:
        sound = file.read_bytes()
        places = {*range(0, len(sound), max(len(sound) // 24, 1)), 0, 8, len(sound) - 1}
        flipped = [sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :] for at in sorted(places)]
        for damaged in (*flipped, sound[:-2], sound + b"x", b""):
            file.write_bytes(damaged)
            with pytest.raises(lorac.ArtifactError):
                open_checkpoint(folder)
        file.write_bytes(sound)
    open_checkpoint(folder)


RELIED_ON = {
    "_save_checkpoint": ("self", "model", "trial"),
    "_set_signature_columns_if_needed": ("self",),
    "_determine_best_metric": ("self", "metrics", "trial"),
    "_get_output_dir": ("self", "trial"),
}
"""Of these the last is called alone."""


def test_overridden_private_functions_exist() -> None:
    for name, parameters in RELIED_ON.items():
        assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    overridden = {name for name in vars(AdapterTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert {name for name in overridden if name.startswith("_")} == {*RELIED_ON} - {"_get_output_dir"}
    sft = adapter_trainer(pytest.importorskip("trl").SFTTrainer)
    assert issubclass(sft, AdapterTrainer) and sft.__name__ == "AdapterSFTTrainer"
