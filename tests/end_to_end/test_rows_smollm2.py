"""SmolLM2 with rows of several methods: each row's text is the text of its adapter alone."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL
from tests.program_calls import note_calls
from tests.zoo import ZOO, tokenizer

pytestmark = pytest.mark.slow
VARIANTS: dict[str, Any] = {
    "lora": lorac.LoRA(r=8, targets="all-linear"),
    "dora": lorac.DoRA(r=4, targets=["q_proj", "v_proj", "gate_proj"]),
    "hydra": lorac.Hydra(r=4, targets=["o_proj", "down_proj"]),
    "vera": lorac.VeRA(r=16, targets=["q_proj", "up_proj"]),
    "ia3": lorac.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
    "routed": lorac.MeteoRA(r=4, targets=["q_proj"]),
}
CHOICES: list[Any] = ["lora", "dora", "hydra", {"lora": 0.5, "vera": 0.5}, "vera", "ia3", "routed", None]
LENGTH, NEW = 24, 8


@pytest.mark.parametrize("options", [{}, {"weights": "int4", "accuracy_level": FLOAT32_LEVEL}], ids=["float32", "int4"])
def test_each_row_writes_its_own_text(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products over int4 compute in float32: rounding what they read to int8 makes a rounding a different token."""
    host: Any = ZOO["smollm2"].fresh()
    compiled = lorac.compile(
        host,
        dict(VARIANTS),
        target="onnxruntime",
        cache=True,
        active=None,
        self_test=False,
        branch_rows=True,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(compiled.adapters):
            for tensor in compiled.adapters[name].parameters():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    texts = [tokenizer("smollm2")(topics[name])["input_ids"][:LENGTH] for name in sorted(topics)]
    ids = torch.tensor([text for text in texts if len(text) == LENGTH][: len(CHOICES)])

    def write(adapters: Any) -> Tensor:
        tokens: Tensor = compiled.generate(
            ids, adapters=adapters, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return tokens[:, LENGTH:]

    written = [write(choice) for choice in CHOICES]
    alone = torch.stack([tokens[row] for row, tokens in enumerate(written)])
    steps: list[int] = []
    note_calls(monkeypatch, compiled.switch.state.bound, "decode", lambda *_: steps.append(1))
    together = write(CHOICES)
    assert torch.equal(together, alone)
    assert len(steps) <= NEW + 1, "one run for all rows"
    assert len({tuple(tokens.flatten().tolist()) for tokens in written}) > 3
