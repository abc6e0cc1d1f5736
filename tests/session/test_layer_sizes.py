"""Adapters that replace a layer by one of another size: classifiers of other labels, other vocabularies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import lorac
from tests.limits import ROWS
from tests.peft_files import quiet

LABELS = (2, 3, 5, 77)
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
IDS = torch.arange(3, 31).reshape(4, 7)
TARGETS = ("eager", "onnxruntime")
LIMIT = ROWS[torch.float32]


class Classifiers:
    """A BERT of two labels, adapters of other numbers of labels as PEFT saves them, and PEFT's models of these."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(**SIZES, num_labels=2)
        self.base = transformers.BertForSequenceClassification(config).eval()
        self.folders = {f"c{labels}": folder / f"c{labels}" for labels in LABELS}
        self.models: dict[str | None, Any] = {None: self.base}
        for labels in LABELS:
            host = transformers.BertForSequenceClassification(
                transformers.BertConfig(**SIZES, num_labels=labels)
            ).eval()
            own = {n: t for n, t in self.base.state_dict().items() if not n.startswith("classifier")}
            host.load_state_dict(own, strict=False)
            lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
            with quiet():
                model = peft.get_peft_model(host, lora)
                model.save_pretrained(folder / f"c{labels}")
            self.models[f"c{labels}"] = model.eval()

    @torch.no_grad()
    def answer(self, name: str | None, ids: Tensor) -> Tensor:
        """Return PEFT's logits."""
        logits: Tensor = self.models[name](input_ids=ids).logits
        return logits


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Classifiers:
    return Classifiers(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, classifiers: Classifiers) -> Any:
    return lorac.compile(classifiers.base, dict(classifiers.folders), target=request.param)


def agrees(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= LIMIT * expected.abs().max())


@torch.no_grad()
def test_each_adapter_answers_with_its_own_labels(compiled: Any, classifiers: Classifiers) -> None:
    for name in classifiers.models:
        for ids in (IDS, IDS[:3, :5]):
            assert agrees(compiled(input_ids=ids, adapters=name).logits, classifiers.answer(name, ids))


@torch.no_grad()
def test_rows_of_several_sizes_end_in_minus_infinity(compiled: Any, classifiers: Classifiers) -> None:
    names = ["c77", "c2", None, "c5"]
    logits = compiled(input_ids=IDS, adapters=names).logits
    assert logits.shape == (4, 77)
    for row, name in enumerate(names):
        expected = classifiers.answer(name, IDS[row : row + 1])[0]
        assert agrees(logits[row][: len(expected)], expected)
        assert (logits[row][len(expected) :] == -math.inf).all()
    assert compiled(input_ids=IDS, adapters=["c2", "c5", "c2", None]).logits.shape == (4, 5)
