"""SmolLM2 over a cache in OpenVINO: the tokens of PEFT's own model, by the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lorac
from tests import limits
from tests.end_to_end.test_generate_smollm2 import CONFIGS, LENGTH, compare, prompts, reference
from tests.peft_files import load_peft, make_peft
from tests.zoo import ZOO

pytest.importorskip("openvino")
pytestmark = pytest.mark.slow("test_generation.py compares the tokens of tiny models")
NEW = 12


@pytest.fixture(scope="module")
def host() -> Any:
    """SmolLM2, of which no text ends by itself."""
    model: Any = ZOO["smollm2"].fresh()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def test_writes_peft_s_tokens(host: Any, tmp_path: Path) -> None:
    """LoRA, DoRA and SHiRA, a mixture, rows with adapters of their own; and once loaded."""
    ids, settings = prompts(4), {"max_new_tokens": NEW, "do_sample": False}
    wanted = {name: reference(host, name, tmp_path, ids[:2], NEW) for name in CONFIGS}
    other = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    make_peft(host, tmp_path / "other", other, inputs={"input_ids": ids[:2]}, outputs=("logits",), contribution=0.15)
    adapters = {name: tmp_path / name for name in (*CONFIGS, "other")}
    compiled = lorac.compile(host, adapters, target="openvino", cache=True, active=None, self_test=False)
    for name in CONFIGS:
        compare(compiled, name, ids[:2], wanted[name])
    peft = load_peft(host, tmp_path / "lora")
    peft.load_adapter(tmp_path / "other", "other")
    peft.add_weighted_adapter(["default", "other"], [0.6, 0.5], "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    found = peft.generate(ids[:2], **settings, return_dict_in_generate=True, output_logits=True)
    mixed = compiled.generate(ids[:2], adapters={"lora": 0.6, "other": 0.5}, **settings)
    limits.assert_same_text(mixed[:, LENGTH:], found.sequences[:, LENGTH:], torch.stack(found.logits, 1))
    choices: list[Any] = ["lora", "dora", {"lora": 0.5, "dora": 0.5}, None]
    alone = [compiled.generate(ids[i : i + 1], adapters=choice, **settings) for i, choice in enumerate(choices)]
    rows = compiled.generate(ids, adapters=choices, **settings)
    assert torch.equal(rows, torch.cat(alone))
    compiled.save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved", threads=1)
    assert torch.equal(loaded.generate(ids, adapters=choices, **settings), rows)
