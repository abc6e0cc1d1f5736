"""PEFT's Arrow: the router's folder next to those of its experts, against PEFT's own outputs."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model
from torch import nn

import lorac
from lorac import load_adapter
from tests.parity import assert_parity
from tests.peft_files import configure, make_peft, quiet
from tests.refusing import refuses
from tests.zoo import ZOO

ENTRY = ZOO["tiny_llama"]


def save_router(folder: Path, *, general: int = 0, **settings: Any) -> tuple[Any, nn.Module]:
    """Save PEFT's router over three LoRAs of rank 1, whose directions power iteration finds at once."""
    model = ENTRY.model()
    config = LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    paths = [str(folder / f"lora{index}") for index in range(3 + general)]
    for seed, path in enumerate(paths):
        make_peft(model, path, config, inputs=ENTRY.inputs(), outputs=ENTRY.outputs, seed=seed)
    base: Any = copy.deepcopy(model)
    with quiet():
        oracle = create_arrow_model(
            base, paths[:3], ArrowConfig(use_gks=general > 0, **settings), general_adapter_paths=paths[3:]
        )
        oracle.eval().save_pretrained(str(folder / "saved"))
    return oracle, model


@pytest.mark.parametrize(("settings", "general"), [({"top_k": 2}, 0), ({"router_temperature": 0.5}, 0), ({}, 1)])
@torch.no_grad()
def test_a_router_is_read_with_the_experts_next_to_it(tmp_path: Path, settings: dict[str, Any], general: int) -> None:
    oracle, model = save_router(tmp_path, general=general, **settings)
    adapter = load_adapter(tmp_path / "saved" / "arrow_router", model)
    assert isinstance(adapter.variant, lorac.Arrow)
    answer = lorac.compile(model, {"a": adapter})(**ENTRY.inputs())
    assert_parity(answer, oracle(**ENTRY.inputs()), model(**ENTRY.inputs()))


def test_rejects_a_router_without_its_experts(tmp_path: Path) -> None:
    _, model = save_router(tmp_path, top_k=2)
    router = tmp_path / "saved" / "arrow_router"
    shutil.rmtree(tmp_path / "saved" / "task_1")
    with refuses("corrupt_file", match="chooses from the LoRA 'task_1'"):
        load_adapter(router, model)
    configure(router, arrow_config={"task_adapter_names": ["../lora0"]})
    with refuses("corrupt_file", match="no such folder"):
        load_adapter(router, model)
    configure(router, arrow_config={"top_k": 0})
    with refuses("unsupported_field", match="sets top_k=0"):
        load_adapter(router, model)
