"""PEFT's own models compile with the installed PEFT, whichever transformers' adapter methods ask for."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

import lorac
from lorac.testing import assert_close
from tests.peft_files import quiet
from tests.zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
LEAST = Version(MIN_PEFT_VERSION)
CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def test_the_page_names_the_peft_that_transformers_takes_adapters_from() -> None:
    assert f"needs PEFT {LEAST.major}.{LEAST.minor} or later" in " ".join(PAGE.read_text().split())


@pytest.mark.skipif(Version(peft.__version__) >= LEAST, reason="transformers takes adapters from this PEFT")
def test_compiles_where_transformers_rejects_the_installed_peft(tmp_path: Path) -> None:
    host = ZOO["tiny_llama"].fresh()
    with pytest.raises(ValueError, match=str(LEAST)):
        host.add_adapter(CONFIG)
    with quiet():
        wrapped = peft.get_peft_model(host, CONFIG).eval()
        wrapped.save_pretrained(tmp_path / "kept")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        assert_close(lorac.compile(wrapped)(input_ids=ids).logits, expected)
        base = ZOO["tiny_llama"].fresh()
        assert_close(lorac.compile(base, {"kept": tmp_path / "kept"})(input_ids=ids).logits, expected)
