"""Checkpoints of a training: the adapters and nothing of the base, to resume and to be read elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorac
from tests import peft_files
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.training.loops import data, host
from tests.zoo import ZOO

STEPS = 4


def trainer_of(compiled: Any, folder: Path, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in batch.items()} for batch in data("tiny_bert", STEPS) for i in range(2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return Trainer(model=compiled, args=arguments, train_dataset=rows)


def compiled_bert() -> Any:
    """Over a BERT with dropout, so that going on needs the random state too; VeRA's tensors are of all its sites."""
    adapters = {
        "a": lorac.LoRA(r=2, dropout=0.1, targets=["query", "value"], modules_to_save=["classifier"]),
        "b": lorac.VeRA(r=4, targets=["query", "key"]),
    }
    return lorac.compile(host("tiny_bert"), adapters, active={"a": 1.0, "b": 0.5})


def tensors_of(compiled: Any) -> list[Tensor]:
    return [tensor.detach().clone() for adapter in compiled.adapters.values() for tensor in adapter.parameters()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model trained in one go, and the folder with its checkpoints after half of the steps and after all."""
    folder = tmp_path_factory.mktemp("run")
    compiled = compiled_bert()
    trainer_of(compiled, folder).train()
    return compiled.eval(), folder


def test_trainer_saves_the_adapters_alone(trained: tuple[Any, Path]) -> None:
    compiled, folder = trained
    file = folder / f"checkpoint-{STEPS}" / "model.safetensors"
    saved = load_file(file)
    values = sum(adapter.numel() for adapter in compiled.adapters.values())
    records = [name for name in saved if name.endswith("_extra_state")]
    assert sorted(records) == ["adapter_tensors.a._extra_state", "adapter_tensors.b._extra_state"]
    assert sum(tensor.numel() for name, tensor in saved.items() if name not in records) == values
    assert not any(name.startswith("host.") for name in saved)


def test_trainer_resumes_bit_for_bit(trained: tuple[Any, Path], tmp_path: Path) -> None:
    compiled, folder = trained
    other = compiled_bert()
    trainer_of(other, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert all(map(torch.equal, tensors_of(compiled), tensors_of(other)))
    half = compiled_bert()
    half.load_state_dict(load_file(folder / "checkpoint-2" / "model.safetensors"))
    assert not all(map(torch.equal, tensors_of(compiled), tensors_of(half)))


def test_a_checkpoint_is_read_as_an_adapter(trained: tuple[Any, Path], tmp_path: Path) -> None:
    compiled, folder = trained
    checkpoint, model = folder / f"checkpoint-{STEPS}", host("tiny_bert")
    for name in ("a", "b"):
        read = lorac.load_adapter(checkpoint, model, name)
        assert read.variant == compiled.adapters[name].variant
        again = lorac.compile(model, read)
        compiled.swap(name)
        inputs = ZOO["tiny_bert"].inputs(seed=3)
        assert torch.equal(again(**inputs).logits, compiled(**inputs).logits)
        assert len({id(t) for t in read.parameters()}) == len(list(compiled.adapters[name].parameters()))
    with pytest.raises(lorac.FormatError, match="holds the adapters a, b, and name= chooses none of them") as error:
        lorac.load_adapter(checkpoint, model)
    assert error.value.next_step == "give name=, one of them: name='a'"
    # PEFT reads what lorac writes of it.
    lorac.save_adapter(lorac.load_adapter(checkpoint, model, "a"), tmp_path / "peft", model=model)
    with peft_files.quiet():
        peft = PeftModel.from_pretrained(host("tiny_bert"), tmp_path / "peft").eval()
    compiled.swap("a")
    assert_parity(compiled(**inputs).logits, peft(**inputs).logits, model(**inputs).logits)


def test_warns_of_a_state_of_another_method(trained: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = trained
    state = load_file(folder / "checkpoint-2" / "model.safetensors")
    own = {key: tensor for key, tensor in state.items() if key.startswith("adapter_tensors.b.")}
    other = lorac.compile(host("tiny_bert"), {"b": lorac.VeRA(r=4, dropout=0.5, targets=["query", "key"])})
    with pytest.warns(lorac.LoracWarning, match="for adapter 'b' was saved from an adapter with another config"):
        other.load_state_dict(own)
    file = tmp_path / "model.safetensors"
    record = "adapter_tensors.b._extra_state"
    lacking = dict(list(own.items())[1:]) | {record: own[record]}
    assert len(lacking) < len(own)
    with pytest.warns(lorac.LoracWarning), pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(lacking)
    save_file(lacking, file)
    with refuses("corrupt_file", match="lacks the tensor"):
        lorac.load_adapter(tmp_path)
    fields = json.loads(bytes(own[record].tolist()))
    del fields["seal"]
    text = json.dumps({**fields, "record": {**fields["record"], "variant": "verra"}})
    save_file({**own, record: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}, file)
    with pytest.raises(lorac.UnknownMethod, match="'verra'"):
        lorac.load_adapter(tmp_path)


@pytest.mark.medium("trainer/test_trainer.py: a changed byte is found in every file")
def test_a_changed_checkpoint_never_gives_other_numbers(trained: tuple[Any, Path], tmp_path: Path) -> None:
    """Trainer writes no hash over its file; lorac's records have one over the adapter's tensors."""
    compiled, folder = trained
    sound = (folder / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(sound[:8], "little")
    outcomes = []
    for at in (*range(8, begin, 61), *range(begin, len(sound), len(sound) // 60)):
        (tmp_path / "model.safetensors").write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            read = lorac.load_adapter(tmp_path, name="a")
        except lorac.LoracError as error:
            outcomes.append(type(error))
            continue
        assert all(map(torch.equal, read.parameters(), compiled.adapters["a"].parameters())), at
    assert lorac.FormatError in outcomes


def test_the_state_holds_the_models_running_statistics() -> None:
    """A training moves a batch norm's statistics, which the model itself leaves as they were."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    one, other = (lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["0"])}) for _ in range(2))
    one.train()(torch.randn(8, 4))  # type: ignore[attr-defined]  # in eager it is a module
    assert {"host.1.running_mean", "host.1.running_var", "host.1.num_batches_tracked"} <= one.state_dict().keys()  # type: ignore[attr-defined]  # the same
    other.load_state_dict(one.state_dict())  # type: ignore[attr-defined]  # the same
    assert torch.equal(other.host[1].running_mean, one.host[1].running_mean)  # type: ignore[attr-defined]  # the same
    assert not torch.equal(one.host[1].running_mean, model[1].running_mean)  # type: ignore[attr-defined]  # the same


def test_save_pretrained_writes_the_adapters_as_peft_does(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    lora = lorac.LoRA(r=2, targets=["up"])
    one: Any = lorac.compile(model, {"a": lora})
    one.save_pretrained(tmp_path / "one")
    assert lorac.load_adapter(tmp_path / "one", model).variant == lorac.LoRA(r=2, targets=("up",))
    two: Any = lorac.compile(model, {"a": lora, "b": lora})
    two.save_pretrained(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a", "b"]
    assert lorac.load_adapter(tmp_path / "two" / "b", model).name == "b"


def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    lora = lorac.LoRA(r=2, targets=["up"])
    compiled: Any = lorac.compile(model, {"../evil": lora, "a/b": lora, "NUL": lora})
    compiled.save_pretrained(tmp_path / "out" / "all")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["all"]
    folders = sorted((tmp_path / "out" / "all").iterdir())
    assert len(folders) == 3
    assert {lorac.load_adapter(folder, model).variant.name for folder in folders} == {"lora"}
