"""PEFT's POLY: a task of the file is an adapter, and a row of a call has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PolyConfig

import lorac
from tests.parity import assert_parity
from tests.peft_files import configure, load_peft, quiet, wrap
from tests.refusing import refuses
from tests.zoo import ZOO

TASKS = 3
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base() -> Any:
    return ZOO["tiny_llama"].fresh(torch.float64)


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three tasks, away from its start, of two splits and three skills."""
    place = tmp_path_factory.mktemp("poly")
    wrapped = wrap(base, PolyConfig(r=2, n_tasks=TASKS, n_skills=3, n_splits=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            spread = 2.0 if "logits" in name else 0.3
            parameter.data += spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    with quiet():
        wrapped.save_pretrained(str(place))
    return place


def read(folder: Path, base: Any) -> lorac.Adapter:
    with pytest.warns(lorac.LoracWarning, match=r"3 tasks.*acts as task 0"):
        return lorac.load_adapter(folder, base, "poly")


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.medium("rows of LoRAs"))])
def test_rows_have_the_tasks_of_peft(target: str, base: Any, folder: Path) -> None:
    model = base if target == "eager" else ZOO["tiny_llama"].fresh(torch.float32)
    oracle = load_peft(model, folder)
    ids = torch.randint(0, 100, (4, 5), generator=torch.Generator().manual_seed(2))
    tasks = [2, 0, 1, 2]
    expected = oracle.base_model(input_ids=ids, task_ids=torch.tensor(tasks), use_cache=False).logits
    adapters = lorac.Poly.by_task(read(folder, model))
    assert list(adapters) == ["poly-0", "poly-1", "poly-2"]
    options = {} if target == "eager" else {"example_inputs": {"input_ids": ids, "use_cache": False}}
    compiled = lorac.compile(model, adapters, target=target, **options)
    found = compiled(input_ids=ids, adapters=[f"poly-{task}" for task in tasks], use_cache=False).logits
    assert_parity(found, expected, model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def test_every_task_is_written_back(base: Any, folder: Path, tmp_path: Path) -> None:
    lorac.save_adapter(lorac.Poly.by_task(read(folder, base))["poly-1"], tmp_path / "back", model=base)
    ids, tasks = torch.arange(6).reshape(3, 2), torch.arange(TASKS)
    expected, found = (
        load_peft(base, one).base_model(input_ids=ids, task_ids=tasks).logits for one in (folder, tmp_path / "back")
    )
    assert torch.equal(found, expected)


def test_rejects_to_split_an_adapter_without_tasks() -> None:
    lora = lorac.Adapter("a", lorac.LoRA())
    with pytest.raises(lorac.OptionError, match=r"adapter 'a' is of lora, and only adapters of poly(.|\n)*lorac.Poly"):
        lorac.Poly.by_task(lora)


def test_rejects_a_task_that_is_not_there() -> None:
    with pytest.raises(lorac.OptionError, match="task=3 does not exist, since n_tasks=3"):
        lorac.Poly(n_tasks=3, task=3)


@pytest.mark.parametrize(("name", "value"), [("poly_type", "mhr"), ("n_tasks", 0), ("n_skills", None), ("n_splits", 0)])
def test_rejects_fields(name: str, value: object, base: Any, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "f"
    copied.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / file).write_bytes((folder / file).read_bytes())
    configure(copied, **{name: value})
    with refuses("unsupported_field", match=f"sets {name}="):
        lorac.load_adapter(copied, base)
