"""``lorac transfer``: an adapter of one model's folder becomes one of another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorac
from lorac.cli import app
from lorac.training.transfer import Task
from tests.training.transfer.speakers import ALL, characters, llama, speaking

TASK = Task(name="d", seeds=("abc", "hgf"), question=" {name}?", yes="y", no="n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models, two adapters of the first, and a task of which any prompt may be."""
    source, target, tokenizer = llama(16, 0), llama(24, 5), characters()
    yes, no = (tokenizer(letter)["input_ids"][0] for letter in "yn")
    source.lm_head.weight.data[yes] = -source.lm_head.weight.data[no]
    compiled = speaking(source, own=lorac.LoRA(r=2, targets=ALL), judge=lorac.LoRA(r=2, targets=ALL))
    for name, model in (("source", source), ("target", target)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, adapter in compiled.adapters.items():
        lorac.save_adapter(adapter, tmp_path / name, model=source)
    TASK.save(tmp_path / "task")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more: str) -> tuple[int, str]:
    """The exit code, and what is printed."""
    given = ["source", "target", "-a", "own", "--discriminator", "judge", "--task", "task", "-o", "out"]
    few = ["--count", "4", "--tokens", "3", "--epochs", "1", "--lr", "1e-2", "--json"]
    done = CliRunner().invoke(app, ["transfer", *given, *few, *more], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.medium("the other", cases=["soft1"])
@pytest.mark.parametrize("soft", [[], ["--soft"]])
def test_writes_an_adapter_of_the_target(soft: list[str], folder: Path) -> None:
    code, printed = run("-s", "r=3", "-s", f"targets={json.dumps(ALL)}", *soft)
    told = json.loads(printed)
    assert code == 0 and told["path"] == "out" and told["prompts"] <= 4 <= told["tried"]
    found = lorac.load_adapter(folder / "out", llama(24, 5))
    assert found.variant.r == 3  # type: ignore[attr-defined]  # it is a LoRA
    assert any(bool(own["lora_B"].any()) for own in found.tensors.values())


@pytest.mark.medium("test_writes_an_adapter_of_the_target")
def test_accepts_another_method(folder: Path) -> None:
    code, _ = run("--method", "dora", "-s", 'targets=["q_proj"]')
    assert code == 0 and lorac.load_adapter(folder / "out", llama(24, 5)).variant.name == "dora"


def test_rejects_wrong_options_and_tasks(folder: Path) -> None:
    for more in (["--method", "nolora"], ["-s", "r"], ["-s", "rr=3"]):
        with pytest.raises(lorac.OptionError):
            run(*more)
    (folder / "task" / "seeds.jsonl").unlink()
    with pytest.raises(lorac.FormatError, match="does not hold a readable task"):
        run()
    assert not (folder / "out").exists()
