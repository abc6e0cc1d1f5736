"""Recipes over bases that other libraries hold in few bits, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from lorac.trainer import train
from tests.trainer.runs import TEXTS, losses, recipe, tokenizer, write_rows
from tests.zoo import ZOO

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "8 bits": ("bitsandbytes", {"load_in_8bit": True}),
    "nf4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8": ("torchao", {}),
}


def quantised(library: str, settings: dict[str, Any], folder: Path) -> Any:
    """A small Llama whose weights the library holds."""
    model: Any = ZOO["tiny_llama"].fresh()
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

        quantize_(model.model, Int8WeightOnlyConfig())  # the head stays whole, as with transformers' TorchAoConfig
        return model
    model.save_pretrained(folder)
    given = transformers.BitsAndBytesConfig(**settings)
    return type(model).from_pretrained(folder, quantization_config=given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_learns_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    library, settings = KINDS[kind]
    pytest.importorskip(library)
    model = quantised(library, settings, tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    said = recipe(data, arguments={"max_steps": 12, "save_strategy": "no"})
    trained = train(model, tokenizer(), said, tmp_path / "run")
    found = losses(tmp_path / "run" / "trainer_state.json")
    assert sum(found[-3:]) < sum(found[:3])
    assert all(trained.sites[path].packed for path in trained.adapters["mine"].tensors)
