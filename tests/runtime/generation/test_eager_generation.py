"""Where the model itself runs, it generates by itself, whatever its kind and its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

import lorac
from tests.runtime.generation.texts import LENGTHS, SIZES, compiled, padded, prompts

NEW = 8


@dataclass(frozen=True, kw_only=True)
class Watching(lorac.BranchVariant):
    """y' = y + gate(base(x))·(x·Aᵀ): a branch that reads what the last layer gives without it."""

    name: ClassVar[str] = "watching_the_base"
    paper: ClassVar[str] = "none"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "A": lorac.ParamSpec((site.out_features, site.in_features), lambda c: torch.randn(c.shape) * 0.2),
            "gate": lorac.ParamSpec((1, 48), lambda c: torch.randn(c.shape)),
        }

    def reads(self, site: Any) -> tuple[str, ...]:
        return ("base:model.layers.1",)

    def branch(self, x: Any, y: Any, p: Any, ctx: Any) -> Any:
        gates = torch.sigmoid(F.linear(ctx.value("base:model.layers.1"), p.gate))
        return y + gates * F.linear(x, p.A)


def test_a_branch_that_reads_the_base() -> None:
    """Each token is what a call on the whole text says."""
    model = lorac.compile(_llama(), {"watching": Watching(targets=["q_proj"])})
    row = prompts()[0][None]
    answer = model.generate(row, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    base = model.generate(row, max_new_tokens=NEW, do_sample=False, adapters=None)
    assert not torch.equal(answer, base)
    for length in range(row.shape[1], answer.shape[1]):
        logits = model(input_ids=answer[:, :length], use_cache=False).logits
        assert int(logits[0, -1].argmax()) == int(answer[0, length])


def _llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.medium("test_encoder_decoder_driver.py has a BART in eager, too")
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoders_with_decoders(kind: str) -> None:
    """Rows keep the side on which they are padded: an encoder reads its mask."""
    import transformers

    sizes = {
        "T5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "Bart": {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1, "init_std": 0.3},
    }
    torch.manual_seed(0)
    common = {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, f"{kind}Config")(**common, **sizes[kind])
    host = transformers.AutoModelForSeq2SeqLM.from_config(config).double().eval()
    target = {"T5": "q", "Bart": "q_proj"}[kind]
    model = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=[target])}, active=None)
    with torch.no_grad():
        for tensor in model.adapters["a"].parameters():
            tensor.normal_(0, 0.5)
    batch, told = padded(prompts(), "right"), {"max_new_tokens": NEW, "do_sample": False}
    expected = host.generate(**batch, **told)
    assert torch.equal(model.generate(**batch, **told), expected)
    assert torch.equal(model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **told), expected)
    own = model.generate(**batch, **told, adapters="a")
    assert not torch.equal(own, expected)
    rows = model.generate(**batch, **told, adapters=["a", None, "a", None])
    for place, (row, other) in enumerate(zip(own, expected, strict=True)):
        given = row if place % 2 == 0 else other
        assert torch.equal(rows[place][: len(given)], given[: rows.shape[1]])


def test_moves_other_inputs_with_the_tokens() -> None:
    """Positions, which the host takes, move with the tokens of rows that are padded on the right."""
    model, rows = compiled("llama"), prompts()
    left, right = padded(rows, "left"), padded(rows, "right")
    told = {"max_new_tokens": NEW, "do_sample": False}
    places = [(batch["attention_mask"].cumsum(1) - 1).clamp(min=0) for batch in (left, right)]
    expected = model.generate(**left, position_ids=places[0] + 3, **told)
    answer = model.generate(**right, position_ids=places[1] + 3, **told)
    assert torch.equal(answer[:, max(LENGTHS) :], expected[:, max(LENGTHS) :])


def test_components_generate_by_their_names() -> None:
    host = _llama()
    both = lorac.compile({"text": host, "other": torch.nn.Linear(3, 4)})
    row = prompts()[0][None]
    expected = host.generate(row, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(both["text"].generate(row, max_new_tokens=NEW, do_sample=False), expected)
    with pytest.raises(lorac.Unavailable, match="does not generate"):
        both["other"].generate(row)
    with pytest.raises(lorac.ChoiceError, match="several models"):
        both.generate(row)


class _Counting(torch.nn.Module):
    """A model that is not one of transformers', with its own ``generate``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)

    def generate(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        for _ in range(steps):
            x = self(x)
        return x


def test_keeps_the_models_own_generate() -> None:
    model = lorac.compile(_Counting(), {"a": lorac.LoRA(r=2, targets=["up"])})
    with torch.no_grad():
        for tensor in model.adapters["a"].parameters():
            tensor.normal_()
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = {name: model(model(x, adapters=name), adapters=name) for name in ("a", None)}
    for name, whole in expected.items():
        assert torch.equal(model.generate(x=x, steps=2, adapters=name), whole)
    mixed = model.generate(x=x, steps=2, adapters=["a", None, "a"])
    assert torch.equal(mixed[1:2], model.generate(x=x[1:2], steps=2, adapters=None))
