"""The records in a checkpoint of Trainer's; tests/training/test_checkpoints.py has Trainer write them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorac
from lorac.formats.checkpoint import FILE
from tests.refusing import refuses
from tests.zoo import ZOO

RECORD = "adapter_tensors.a._extra_state"


@pytest.fixture(scope="module")
def compiled() -> Any:
    return lorac.compile(ZOO["plain_mlp"].model(), {"a": lorac.LoRA(r=2, targets=["up"])})


@pytest.fixture
def state(compiled: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in compiled.state_dict().items()}


def test_reads_a_checkpoint_with_and_without_its_model(compiled: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / FILE)
    own = compiled.adapters["a"]
    for model in (None, ZOO["plain_mlp"].model()):
        read = lorac.load_adapter(tmp_path, model)
        assert (read.name, read.variant, read.provenance["format"]) == ("a", own.variant, "checkpoint")
        assert all(map(torch.equal, read.parameters(), own.parameters()))


def test_rejects_an_invalid_record_and_names_the_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {"is not a text": torch.zeros(2), "holds a list": torch.tensor([*b"[]"], dtype=torch.uint8)}
    for what, record in wrong.items():
        save_file({**state, RECORD: record}, tmp_path / FILE)
        with refuses("corrupt_file", match=f"in .{re.escape(str(tmp_path / FILE))}. {what}"):
            lorac.load_adapter(tmp_path)
