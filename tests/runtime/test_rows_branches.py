"""Rows of a batch with branches of their own, in one call of the program."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.limits import LEAST_DIFFERENCE, ROWS, assert_apart
from tests.program_calls import note_calls
from tests.runtime.switching import raw
from tests.zoo import SMALL_LLAMA

HIDDEN = 64
MIXED: dict[str, Any] = {"hidden": "model.norm", "hidden_size": HIDDEN, "experts": 3, "r": 2, "size": 8}
SHARED = {"targets": ["q_proj", "up_proj"], "r": 2, "experts": 3, "top_k": 2}
IDS = torch.randint(0, 90, (6, 5), generator=torch.Generator().manual_seed(0))


def _variants(host: Any) -> dict[str, Any]:
    return {
        "lora": lorac.LoRA(r=3, targets=["q_proj", "v_proj"]),
        "routed": lorac.MeteoRA(**SHARED),
        "other": lorac.MeteoRA(**SHARED),
        "fly": lorac.FlyLoRA(r=6, top_k=2, targets=["o_proj"]),
        "remix": lorac.ReMix(r=2, experts=3, top_k=1, targets=["v_proj"]),
        "mixed": lorac.XLoRA(targets=["k_proj"], **MIXED),
        "mixed_too": lorac.XLoRA(targets=["k_proj"], **MIXED),
        "scaled": lorac.XLoRA(targets=["down_proj"], scaling_pass_value=0.5, **MIXED),
        "blocks": lorac.AdapterTune(r=2, init="small"),
        "bottleneck": lorac.Bottleneck(reduction_factor=4.0),
        "side": lorac.QST.of(host, r=8, heads=2),
    }


CHOICES: tuple[Any, ...] = (
    None,
    "lora",
    "routed",
    "other",
    "fly",
    "remix",
    "mixed",
    "mixed_too",
    "scaled",
    "blocks",
    "bottleneck",
    "side",
    {"routed": 0.6, "other": -0.4, "lora": 0.3},
    {"mixed": 0.5, "fly": 0.5},
)
AS_EACH_ROW: dict[str, Any] = {"input_ids": IDS[:2]}


def _scatter(adapters: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(adapters):
            for tensor in adapters[name].parameters():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def compiled() -> Any:
    host = SMALL_LLAMA.model()
    made = lorac.compile(
        host,
        _variants(host),
        target="onnxruntime",
        active=None,
        example_inputs=AS_EACH_ROW,
        aux=["router"],
        branch_rows=True,
    )
    _scatter(made.adapters)
    return made


@pytest.fixture
def runs(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that the engine runs."""
    seen: list[str] = []
    note_calls(monkeypatch, compiled.switch.state.bound, "run_graph", lambda graph, _: seen.append(graph))
    yield seen


def _logits(compiled: Any, ids: Tensor, adapters: Any) -> Tensor:
    logits: Tensor = compiled(input_ids=ids, adapters=adapters).logits
    return logits


def _error(y: Tensor, ref: Tensor) -> float:
    return float((y - ref).abs().max() / ref.abs().max())


@pytest.mark.slow("test_generates_rows_with_branches_in_one_run_per_step, with two routers, a mixture and a LoRA")
def test_each_row_matches_a_single_run(compiled: Any, runs: list[str]) -> None:
    for start in range(0, len(CHOICES), 6):
        choices = [CHOICES[(start + i) % len(CHOICES)] for i in range(6)]
        runs.clear()
        y = _logits(compiled, IDS, choices)
        assert runs == ["main"], "one run for all rows"
        for row, choice in enumerate(choices):
            alone = _logits(compiled, IDS[row : row + 1], choice)
            base = _logits(compiled, IDS[row : row + 1], None)
            assert _error(y[row : row + 1], alone) < ROWS[y.dtype], choice
            assert choice is None or _error(alone, base) > LEAST_DIFFERENCE, "it acts"


@pytest.mark.slow("the same, whose rows without adapters write the base's text")
def test_rows_without_branches_are_the_bases(compiled: Any) -> None:
    base = _logits(compiled, IDS, None)
    y = _logits(compiled, IDS, ["routed", None, "mixed", None, "bottleneck", None])
    assert torch.equal(y[1::2], base[1::2])


@pytest.mark.slow("test_rows.py, where neighbours share places of pairs")
def test_adjacent_rows_share_a_place_of_a_branch(compiled: Any) -> None:
    choices = ["routed", "routed", "other", "other", "mixed", "mixed"]
    y = _logits(compiled, IDS, choices)
    for row, choice in enumerate(choices):
        assert _error(y[row : row + 1], _logits(compiled, IDS[row : row + 1], choice)) < ROWS[y.dtype], choice


@pytest.mark.slow("the same, each row of which is held against itself alone")
def test_no_row_sees_another_rows_branch(compiled: Any) -> None:
    y = _logits(compiled, IDS, ["routed", "mixed", "other", "blocks", None, "fly"])
    (tensor, *_) = compiled.adapters["mixed_too"].parameters()
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.fill_(3e38)  # NaN itself is refused
        poisoned = _logits(compiled, IDS, ["routed", "mixed", "mixed_too", "blocks", None, "fly"])
        tensor.copy_(kept)
    keep = [0, 1, 3, 4, 5]
    assert not poisoned[2].isfinite().all()
    assert raw(poisoned[keep]) == raw(y[keep])


@pytest.mark.slow("backends/eager/test_rows.py joins extra outputs")
def test_extra_outputs_of_rows_with_another_branch_are_blank(compiled: Any) -> None:
    _logits(compiled, IDS, ["routed", None, "routed", "lora", "mixed", "routed"])
    router = compiled.aux["router"]["model.layers.0.self_attn.q_proj"]
    assert router.isnan().all((1, 2)).tolist() == [False, True, False, True, True, False]
    mixed = compiled.aux["router"]["model.layers.0.self_attn.k_proj"]
    assert_close(mixed[4].sum(-1), torch.ones_like(mixed[4, :, 0]))


@pytest.mark.slow
def test_random_batches(compiled: Any) -> None:
    drawn = random.Random(0)
    single = {repr(choice): _logits(compiled, IDS, choice) for choice in CHOICES}
    for _ in range(1_000):
        rows = [drawn.randrange(6) for _ in range(drawn.randint(1, 9))]
        choices = [drawn.choice(CHOICES) for _ in rows]
        y = _logits(compiled, IDS[rows], choices)
        expected = torch.stack([single[repr(choice)][row] for row, choice in zip(rows, choices, strict=True)])
        assert _error(y, expected) < ROWS[y.dtype], (rows, choices)


# ── What rows share ──────────────────────────────────────────────────────────────────────────────────────────────────
class CentredRows(lorac.BranchVariant):
    """y' = y + s∘(x − the mean of all rows), which is not a row's own."""

    name = "centred_rows"

    def params(self, site: lorac.Site) -> dict[str, lorac.ParamSpec]:
        return {"scale": lorac.ParamSpec((1,), lambda context: torch.ones(context.shape))}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.scale * (x.mean(-1, keepdim=True) - x.mean((0, -1), keepdim=True))


def test_a_branch_that_reads_other_rows_has_a_call_of_its_own() -> None:
    host, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).eval(), torch.randn(6, 5, 8)
    adapters = {"lora": lorac.LoRA(r=2, targets=["2"]), "centred": CentredRows(targets=["0"])}
    made: Any = lorac.compile(host, adapters, "onnxruntime", (x[:2],), active=None, branch_rows=True)
    assert "a branch computes the rows of a batch together" in str(made.explain())
    y = made(x, adapters=["centred", "lora", None, "centred", "lora", None])
    assert torch.equal(y[[0, 3]], made(x[[0, 3]], adapters="centred"))
    assert_apart(y[[0, 3]], host(x)[[0, 3]])


@pytest.mark.medium("passes/test_branch_traces.py compiles both")
def test_branches_have_one_place_by_default() -> None:
    adapters = {
        "lora": lorac.LoRA(r=2, targets=["v_proj"]),
        "routed": lorac.MeteoRA(r=2, experts=2, targets=["q_proj"]),
    }
    made: Any = lorac.compile(
        SMALL_LLAMA.model(), adapters, target="onnxruntime", active=None, example_inputs=AS_EACH_ROW
    )
    _scatter(made.adapters)
    assert "its branches have one place without branch_rows=True" in str(made.explain())
    y = _logits(made, IDS[:3], ["routed", "lora", None])
    assert torch.equal(y[:1], _logits(made, IDS[:1], "routed"))


# ── Generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.medium("test_a_branch_that_reads_other_rows_has_a_call_of_its_own, and generation/test_branches.py")
def test_generates_rows_with_branches_in_one_run_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SMALL_LLAMA.model()
    names = ("lora", "routed", "other", "mixed")
    variants = {name: variant for name, variant in _variants(host).items() if name in names}
    made: Any = lorac.compile(host, variants, target="onnxruntime", active=None, cache=True, branch_rows=True)
    _scatter(made.adapters)

    def write(rows: list[int], adapters: Any) -> Tensor:
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens: Tensor = made.generate(IDS[rows], adapters=adapters, **options)
        return tokens[:, -5:]

    choices = ["routed", None, "mixed", "lora", {"other": 0.5, "lora": 0.5}, "other"]
    alone = torch.cat([write([row], choice) for row, choice in enumerate(choices)])
    steps: list[int] = []
    note_calls(monkeypatch, made.switch.state.bound, "decode", lambda *_: steps.append(1))
    assert torch.equal(write(list(range(6)), choices), alone)
    assert len(steps) <= 6, "one run of the engine a step"
