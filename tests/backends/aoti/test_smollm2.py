"""SmolLM2 as a package of AOTInductor: PEFT's tokens, each chosen by whole calls, since packages keep no cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import lorac
from tests import limits, parity
from tests.end_to_end.test_generate_smollm2 import CONFIGS, LENGTH, prompts, reference
from tests.peft_files import load_peft, make_peft
from tests.zoo import ZOO

pytestmark = pytest.mark.slow("test_aoti.py runs a tiny model")
NEW = 12


@pytest.fixture(scope="module")
def host() -> Any:
    """SmolLM2, of which no text ends by itself."""
    model: Any = ZOO["smollm2"].fresh()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


@torch.no_grad()
@pytest.mark.timeout(7200)
def test_chooses_peft_s_tokens(host: Any, tmp_path: Path) -> None:
    """LoRA, DoRA and SHiRA, a mixture, rows with adapters of their own."""
    ids = prompts(2)
    wanted = {name: reference(host, name, tmp_path, ids, NEW) for name in CONFIGS}
    other = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    make_peft(host, tmp_path / "other", other, inputs={"input_ids": ids}, outputs=("logits",), contribution=0.15)
    adapters = {name: tmp_path / name for name in (*CONFIGS, "other")}
    compiled = lorac.compile(host, adapters, target="aoti", active=None, self_test=False)

    def read(text: Tensor, choice: Any) -> Tensor:
        return compiled(input_ids=text, attention_mask=torch.ones_like(text), adapters=choice).logits[:, LENGTH - 1 :]

    for name in CONFIGS:
        right = wanted[name]
        text = torch.cat([ids, right.tokens[:, :-1]], 1)
        found, own = read(text, name), read(text, None)
        limits.assert_same_text(found.argmax(-1), right.tokens, right.logits)
        pair = {"logits": right.logits}, {"logits": right.base}
        parity.assert_parity({"logits": found}, *pair, own_base={"logits": own})
    peft = load_peft(host, tmp_path / "lora")
    peft.load_adapter(tmp_path / "other", "other")
    peft.add_weighted_adapter(["default", "other"], [0.6, 0.5], "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mixed = peft.generate(ids, **settings, return_dict_in_generate=True, output_logits=True)
    found = read(mixed.sequences[:, :-1], {"lora": 0.6, "other": 0.5})
    limits.assert_same_text(found.argmax(-1), mixed.sequences[:, LENGTH:], torch.stack(mixed.logits, 1))
    text = torch.cat([ids, ids])
    rows: list[Any] = ["lora", "shira", {"lora": 0.5, "dora": 0.5}, None]
    alone = torch.cat([read(text[i : i + 1], choice) for i, choice in enumerate(rows)])
    together = read(text, rows)
    assert (together - alone).abs().max() <= limits.ROWS[torch.float32] * alone.abs().max()
