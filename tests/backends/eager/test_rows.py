"""Rows with adapters of their own, in one forward of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.limits import ROWS
from tests.program_calls import note_calls
from tests.zoo import SMALL_LLAMA, ZOO

IDS = torch.randint(0, 90, (6, 5), generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, Any] = {
    "lora": lorac.LoRA(r=3, targets=["q_proj", "down_proj", "embed_tokens"]),
    "dora": lorac.DoRA(r=2, targets=["q_proj", "up_proj"]),
    "ia3": lorac.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
    "hydra": lorac.Hydra(r=2, targets=["v_proj"]),
    "oft": lorac.OFT(block_size=4, targets=["o_proj"]),
    "dense": lorac.SHiRA(r=1, targets=["gate_proj"]),
}
CHOICES: list[Any] = ["lora", None, "dora", {"lora": 0.6, "ia3": -0.4}, "oft", "hydra"]


def _compile(model: nn.Module, variants: dict[str, Any]) -> Any:
    made = lorac.compile(model, variants, active=None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(made.adapters):
            for tensor in filter(torch.is_floating_point, made.adapters[name].parameters()):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return made


@contextmanager
def _forwards(compiled: Any) -> Iterator[list[int]]:
    """The rows of each forward of the model."""
    seen: list[int] = []
    handle = compiled.engine.module.register_forward_hook(lambda _, args, y: seen.append(_rows(y)))
    yield seen
    handle.remove()


def _rows(output: Any) -> int:
    return len(output if isinstance(output, Tensor) else output.logits)


@pytest.fixture(scope="module")
def llama() -> Any:
    return _compile(SMALL_LLAMA.fresh(torch.float64), dict(VARIANTS))


@pytest.mark.medium("rows of a program that was not stored, and test_artifact.py loads one")
@torch.no_grad()
def test_a_loaded_program_runs_all_rows_in_one_call(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    calls = list[int]()
    note_calls(monkeypatch, loaded.switch.state.bound, "run", lambda *_: calls.append(1))
    y = loaded(input_ids=IDS, adapters=CHOICES).logits
    assert len(calls) == 1
    for row, choice in enumerate(CHOICES):
        alone = llama(input_ids=IDS[row : row + 1], adapters=choice).logits[0]
        assert float((y[row] - alone).norm() / alone.norm()) < ROWS[y.dtype]
    loaded(input_ids=IDS, adapters=["dense", *CHOICES[1:]])
    assert len(calls) == 3, "a merged weight is shared by all rows of a call"


@pytest.mark.parametrize("grad", [False, True], ids=["slots", "terms"])
def test_one_forward_computes_each_row_as_alone(llama: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        with _forwards(llama) as forwards:
            y = llama(input_ids=IDS, adapters=CHOICES).logits
        assert forwards == [6]
        for row, choice in enumerate(CHOICES):
            alone = llama(input_ids=IDS[row : row + 1], adapters=choice).logits
            error = (y[row] - alone[0]).abs().max() / alone.abs().max()
            assert float(error.detach()) < ROWS[torch.float64], choice


BRANCHES: dict[str, Any] = {
    "lora": lorac.LoRA(r=2, targets=["q_proj", "v_proj"]),
    "meteora": lorac.MeteoRA(r=2, experts=3, top_k=2, targets=["q_proj", "down_proj"]),
    "flylora": lorac.FlyLoRA(r=8, top_k=2, targets=["v_proj", "q_proj"]),
    "block": lorac.AdapterTune(r=2, targets="model.layers.[0-9]+"),
}


@pytest.mark.medium("terms", cases=["slots"])
@pytest.mark.parametrize("grad", [False, True], ids=["slots", "terms"])
def test_branches_that_read_their_own_input_alone(grad: bool) -> None:
    compiled = _compile(SMALL_LLAMA.fresh(torch.float64), dict(BRANCHES))
    choices = ["lora", "meteora", None, "block", {"flylora": 0.5, "lora": 0.5}, "flylora"]
    with torch.set_grad_enabled(grad):
        with _forwards(compiled) as forwards:
            y = compiled(input_ids=IDS, adapters=choices).logits
        assert forwards == [6]
        for row, choice in enumerate(choices):
            error = y[row] - compiled(input_ids=IDS[row : row + 1], adapters=choice).logits[0]
            assert float(error.detach().abs().max() / y[row].detach().abs().max()) < ROWS[torch.float64], choice
    asked = lorac.compile(SMALL_LLAMA.fresh(torch.float64), dict(BRANCHES), active=None, aux=["chosen"])
    with torch.no_grad(), _forwards(asked) as forwards:
        asked(input_ids=IDS[:3], adapters=["lora", "flylora", "flylora"])
    assert sorted(forwards) == [1, 2], "extra outputs belong to the rows of a choice"


@torch.no_grad()
@pytest.mark.parametrize("model", ["tiny_llama", "plain_conv"])
def test_merged_weights_and_convolutions_run_part_by_part(llama: Any, model: str) -> None:
    if model == "tiny_llama":
        compiled, inputs = llama, {"input_ids": IDS}
    else:
        kinds = {"lora": lorac.LoRA(r=3, targets="all-conv"), "dense": lorac.SHiRA(r=1, targets=["stem"])}
        compiled = _compile(ZOO[model].fresh(torch.float64), kinds)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in ZOO[model].inputs(batch=6).items()}
    choices = ["dense", "lora", None, "dense", "dense", {"lora": 0.5, "dense": 2.0}]
    with _forwards(compiled) as forwards:
        y = compiled(**inputs, adapters=choices)
    assert forwards == [6]
    for row, choice in enumerate(choices):
        alone = compiled(**{name: value[row : row + 1] for name, value in inputs.items()}, adapters=choice)
        assert_close(*(one if isinstance(one, Tensor) else one.logits for one in (_row(y, row), alone)))


def _row(output: Any, row: int) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found[row : row + 1]


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_gradients_are_those_of_each_adapters_rows(llama: Any) -> None:
    """One forward, one loss over all rows: each adapter learns from its own rows alone."""
    names = ["lora", "dora", "lora", None, "oft", "hydra"]

    def gradients(rows: list[int], adapters: list[Any]) -> dict[str, Tensor]:
        llama.zero_grad()
        logits = llama(input_ids=IDS[rows], adapters=adapters).logits
        (logits.square().sum() / 100).backward()
        found = {name: tensor.grad for name, tensor in llama.named_parameters() if tensor.grad is not None}
        return {name: grad.clone() for name, grad in found.items()}

    with _forwards(llama) as forwards:
        together = gradients(list(range(6)), names)
    assert forwards == [6]
    for name in ("lora", "dora", "oft", "hydra"):
        rows = [row for row, own in enumerate(names) if own == name]
        alone = gradients(rows, [name] * len(rows))
        assert alone
        for path, grad in alone.items():
            assert_close(together[path], grad)


def test_a_loss_of_all_rows(llama: Any) -> None:
    """A loss over all rows, which separate calls could not compute."""
    with torch.no_grad():
        y = llama(input_ids=IDS, labels=IDS, adapters=CHOICES)
        losses = [
            llama(input_ids=IDS[i : i + 1], labels=IDS[i : i + 1], adapters=c).loss for i, c in enumerate(CHOICES)
        ]
    assert_close(y.loss, torch.stack(losses).mean())


def test_a_training_step_of_many_adapters_with_dropout() -> None:
    compiled = _compile(
        SMALL_LLAMA.fresh(torch.float64),
        {"a": lorac.LoRA(r=2, dropout=0.5, targets=["q_proj"]), "b": lorac.LoRA(r=2, targets=["q_proj"])},
    )
    compiled.train()
    torch.manual_seed(0)
    first = compiled(input_ids=IDS[:4], adapters=["a", "b", "a", None]).logits
    second = compiled(input_ids=IDS[:4], adapters=["a", "b", "a", None]).logits
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[3], second[3])


# ── Generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=repr)
def test_generated_rows_are_each_rows_own(llama: Any, options: dict[str, Any]) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with _forwards(llama) as forwards:
        together = llama.generate(IDS, attention_mask=mask, adapters=CHOICES, **told)
    assert len(forwards) == 4, "one forward a step"
    for row, choice in enumerate(CHOICES):
        at = slice(row, row + 1)
        alone = llama.generate(IDS[at], attention_mask=mask[at], adapters=choice, **told)
        assert torch.equal(together[row], alone[0]), choice


# ── The layout of a batch ────────────────────────────────────────────────────────────────────────────────────────────
class Laid(nn.Module):
    """Two layers, the first on rows and the second on what ``lay`` makes of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def lay(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.lay(torch.tanh(self.first(x))))


class LengthFirst(Laid):
    """As torch's transformer layers are by default."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)

    def lay(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Doubled(Laid):
    """As with guidance: conditioned rows, then unconditioned ones."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = super().forward(x).chunk(2)
        return one + 2 * other

    def lay(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x])


class Selecting(Laid):
    """As an expert: the tokens that a value decides on."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        chosen = y[..., 0] > 0
        out = y.new_zeros(*y.shape[:-1], 5)
        out[chosen] = self.second(y[chosen])
        return out


NOT_ROWS = "with it, since at 'second', the rows of its input are not those of the batch"
WHY = {
    LengthFirst: NOT_ROWS,
    Doubled: NOT_ROWS,
    Selecting: "with it, since at 'first', its model cannot be followed without values: Dynamic",
}
X = torch.randn(4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("model", [LengthFirst, Doubled, Selecting], ids=lambda cls: cls.__name__)
def test_a_site_with_other_rows_takes_a_call_for_each_choice(model: type[Laid]) -> None:
    """Also where the length is the number of rows, which no size tells apart."""
    both = {name: lorac.LoRA(r=2, targets=["first", "second"]) for name in "ab"}
    compiled = _compile(model().double(), {**both, "own": lorac.LoRA(r=2, targets=["first"])})
    choices = ["a", "b", None, "a"]
    with torch.no_grad():
        for _ in range(2):
            with _forwards(compiled) as forwards:
                y = compiled(X, adapters=choices)
            assert sorted(forwards) == [1, 1, 2]
            for row, choice in enumerate(choices):
                assert_close(y[row : row + 1], compiled(X[row : row + 1], adapters=choice))
    assert WHY[model] in str(compiled.explain())


@torch.no_grad()
def test_layers_on_rows_share_a_forward_with_those_that_are_not() -> None:
    compiled = _compile(
        LengthFirst().double(), {"a": lorac.LoRA(r=2, targets=["first"]), "b": lorac.LoRA(r=2, targets=["second"])}
    )
    for _ in range(2):
        with _forwards(compiled) as forwards:
            y = compiled(X, adapters=["a", "b", None, "a"])
        assert sorted(forwards) == [1, 3]
        assert_close(y[1:2], compiled(X[1:2], adapters="b"))


@torch.no_grad()
def test_flat_and_biased_layers() -> None:
    compiled = _compile(Laid().double(), {name: lorac.LoRA(r=2, lora_bias=True, targets=["second"]) for name in "ab"})
    for x in (X, X[:, 0], X[:, None]):
        with _forwards(compiled) as forwards:
            y = compiled(x, adapters=["a", None, "b", None])
        assert forwards == [4]
        for row, choice in enumerate(["a", None, "b", None]):
            assert_close(y[row : row + 1], compiled(x[row : row + 1], adapters=choice))
