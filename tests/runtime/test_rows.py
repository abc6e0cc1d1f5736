"""Rows of a batch with adapters of their own, in one call of the program."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.ir.slots.places import choose_places, cut_segments, join_segments, stack_places, write_place
from tests.limits import LEAST_DIFFERENCE, ROWS
from tests.program_calls import note_calls
from tests.runtime.switching import raw
from tests.zoo import SMALL_LLAMA

VARIANTS: dict[str, Any] = {
    "lora": lorac.LoRA(r=3, targets=["q_proj", "v_proj", "down_proj"]),
    "wide": lorac.LoRA(r=5, targets=["q_proj", "o_proj", "embed_tokens"]),
    "dora": lorac.DoRA(r=2, targets=["k_proj", "up_proj"]),
    "ia3": lorac.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
    "vera": lorac.VeRA(r=4, targets=["q_proj", "gate_proj"]),
    "hydra": lorac.Hydra(r=2, targets=["v_proj"]),
    "oft": lorac.OFT(block_size=4, targets=["o_proj"]),
    "short": lorac.DyLoRA(r=4, targets=["q_proj", "v_proj"]),
}
CHOICES: tuple[Any, ...] = (
    None,
    *VARIANTS,
    {"lora": 0.6, "wide": -0.4, "dora": 0.3},
    {"short": lorac.Active(1.0, rank=1)},
    {"hydra": 0.5, "vera": 0.5},
)
ROOM = lorac.Reserve(targets=["q_proj", "v_proj"], rank=4, adapters=2)
IDS = torch.randint(0, 90, (6, 5), generator=torch.Generator().manual_seed(0))


def _scatter(adapters: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(adapters):
            for tensor in adapters[name].parameters():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def _compile(target: str, **options: Any) -> Any:
    made = lorac.compile(SMALL_LLAMA.model(), dict(VARIANTS), target=target, active=None, **options)
    _scatter(made.adapters)
    return made


@pytest.fixture(scope="module")
def growing() -> Any:
    """A program with a cache, which answers plain calls too."""
    return _compile("onnxruntime", cache=True, reserve=ROOM)


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def compiled(request: pytest.FixtureRequest) -> Any:
    return _compile("eager", reserve=ROOM) if request.param == "eager" else request.getfixturevalue("growing")


@pytest.fixture
def runs(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that the engine runs."""
    seen: list[str] = []
    note_calls(monkeypatch, compiled.switch.state.bound, "run", lambda graph, _: seen.append(graph))
    yield seen


@torch.no_grad()
def _logits(compiled: Any, ids: Tensor, adapters: Any) -> Tensor:
    logits: Tensor = compiled(input_ids=ids, adapters=adapters).logits
    return logits


def _error(y: Tensor, ref: Tensor) -> float:
    return float((y - ref).abs().max() / ref.abs().max())


def _assert_same(compiled: Any, y: Tensor, ref: Tensor) -> None:
    """Compare bits; in eager mode numbers, since torch's kernels round by a row's place in the batch."""
    if compiled.engine.target == "eager":
        assert _error(y, ref) < ROWS[y.dtype]
    else:
        assert raw(y) == raw(ref)


# ── Places and segments ──────────────────────────────────────────────────────────────────────────────────────────────
def test_places_are_as_few_as_neighbours_allow() -> None:
    assert choose_places("aaaa") == ("a",)
    assert choose_places("aabb") == ("a", "b")
    assert choose_places("aaaabb") == ("a", "a", "b")
    assert choose_places("aab") == ("a", "a", "b")
    assert choose_places("abab") == ("a", "b", "a", "b")


def test_a_batch_is_cut_into_segments_and_joined_again() -> None:
    x = torch.arange(24.0).view(4, 2, 3)
    segments = cut_segments(x, 2, 1)
    assert segments.shape == (2, 4, 3)
    assert torch.equal(segments[1], x[2:].reshape(4, 3))
    assert torch.equal(join_segments(segments, x, 1), x)
    ids = x[..., 0]
    assert cut_segments(ids, 4, 0).shape == (4, 2)
    assert join_segments(torch.zeros(4, 2, 7), ids, 0).shape == (4, 2, 7)


def test_a_smaller_rank_overwrites_a_larger_one() -> None:
    small, large = torch.ones(1, 3, 2), torch.full((1, 3, 4), 2.0)
    stacked = stack_places([small, large])
    assert stacked.shape == (2, 3, 4)
    assert not stacked[0, :, 2:].any()
    write_place(stacked[1], small)
    assert torch.equal(stacked[1], stacked[0])


# ── Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_each_row_matches_a_single_run(compiled: Any, runs: list[str]) -> None:
    for start in range(0, len(CHOICES), 6):
        choices = [CHOICES[(start + i) % len(CHOICES)] for i in range(6)]
        runs.clear()
        y = _logits(compiled, IDS, choices)
        assert runs == ["main"], "one run for all rows"
        for row, choice in enumerate(choices):
            alone = _logits(compiled, IDS[row : row + 1], choice)
            assert _error(y[row : row + 1], alone) < ROWS[y.dtype], choice
            base = _logits(compiled, IDS[row : row + 1], None)
            assert choice is None or _error(alone, base) > LEAST_DIFFERENCE, "it acts"


def test_rows_without_adapters_are_the_bases(compiled: Any) -> None:
    base = _logits(compiled, IDS, None)
    y = _logits(compiled, IDS, ["lora", None, "oft", None, "vera", None])
    assert torch.equal(y[1::2], base[1::2])


def test_adjacent_rows_share_a_place(compiled: Any, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ["lora", "lora", "dora", "dora", None, None]
    places: list[int] = []
    bind = compiled.engine.bind_rows
    monkeypatch.setattr(compiled.engine, "bind_rows", lambda given: (places.append(len(given)), bind(given))[1])
    y = _logits(compiled, IDS, choices)
    assert (runs, places) == (["main"], [3])
    _logits(compiled, IDS.flip(0), choices)
    assert places == [3], "what is bound serves again"
    for row, choice in enumerate(choices):
        assert _error(y[row : row + 1], _logits(compiled, IDS[row : row + 1], choice)) < ROWS[torch.float32]


def test_permuted_rows_are_the_same_bits(compiled: Any) -> None:
    choices = ["lora", "dora", None, "oft", {"lora": 0.5, "vera": 0.5}, "ia3"]
    y = _logits(compiled, IDS, choices)
    order = [3, 0, 5, 1, 4, 2]
    _assert_same(compiled, _logits(compiled, IDS[order], [choices[row] for row in order]), y[order])


def test_no_row_sees_another_rows_adapter(compiled: Any) -> None:
    y = _logits(compiled, IDS, ["lora", "dora", "short", "oft", None, "ia3"])
    for other in ("wide", None, "vera", {"short": lorac.Active(1.0, rank=1)}):
        changed = _logits(compiled, IDS, ["lora", "dora", other, "oft", None, "ia3"])
        keep = [0, 1, 3, 4, 5]
        _assert_same(compiled, changed[keep], y[keep])


def test_a_row_that_overflows_is_its_own(compiled: Any) -> None:
    y = _logits(compiled, IDS, ["lora", "dora", "short", "oft", None, "ia3"])
    (tensor, *_) = compiled.adapters["wide"].parameters()
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.fill_(3e38)  # NaN itself is refused
        poisoned = _logits(compiled, IDS, ["lora", "dora", "wide", "oft", None, "ia3"])
        tensor.copy_(kept)
    keep = [0, 1, 3, 4, 5]
    assert not poisoned[2].isfinite().all()
    _assert_same(compiled, poisoned[keep], y[keep])


def test_training_an_adapter_updates_its_place(compiled: Any) -> None:
    before = _logits(compiled, IDS, ["lora", "dora", "lora", "dora", "lora", "dora"])
    (tensor, *_) = compiled.adapters["dora"].parameters()
    with torch.no_grad():
        tensor.add_(0.5)
    after = _logits(compiled, IDS, ["lora", "dora", "lora", "dora", "lora", "dora"])
    assert raw(after[::2]) == raw(before[::2])
    assert _error(after[1::2], before[1::2]) > LEAST_DIFFERENCE
    assert _error(after[1:2], _logits(compiled, IDS[1:2], "dora")) < ROWS[torch.float32]
    with torch.no_grad():
        tensor.sub_(0.5)


def test_accepts_held_choices_for_rows(compiled: Any) -> None:
    with compiled.hold("lora") as held:
        y = _logits(compiled, IDS, [held, "dora", held, None, held, "ia3"])
    assert raw(y) == raw(_logits(compiled, IDS, ["lora", "dora", "lora", None, "lora", "ia3"]))


@pytest.mark.medium("test_each_row_matches_a_single_run", cases=["onnxruntime-30"])
@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_batches(compiled: Any, count: int) -> None:
    drawn = random.Random(0)
    single = {repr(choice): _logits(compiled, IDS, choice) for choice in CHOICES}
    for _ in range(count):
        rows = [drawn.randrange(6) for _ in range(drawn.randint(1, 9))]
        choices = [drawn.choice(CHOICES) for _ in rows]
        y = _logits(compiled, IDS[rows], choices)
        expected = torch.stack([single[repr(choice)][row] for row, choice in zip(rows, choices, strict=True)])
        assert _error(y, expected) < ROWS[y.dtype], (rows, choices)


def test_rows_are_those_of_the_first_input(compiled: Any) -> None:
    by_target = {"eager": "no row per input row", "onnxruntime": "2 choices of adapters for 6 rows"}
    with torch.no_grad(), pytest.raises(lorac.LoracError, match=by_target[compiled.engine.target]):
        compiled(attention_mask=torch.ones(2, 5), input_ids=IDS, adapters=["lora", None])


# ── Generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
ROW_CHOICES: list[Any] = [
    "lora",
    None,
    "dora",
    {"lora": 0.6, "wide": -0.4, "dora": 0.3},
    "vera",
    {"short": lorac.Active(1.0, rank=1)},
]
MASK = torch.ones_like(IDS)
MASK[0, :2] = MASK[3, :1] = 0


@pytest.fixture(scope="module", params=[None, "int4"], ids=["float", "int4"])
def cached(request: pytest.FixtureRequest) -> Any:
    if request.param is None:
        return request.getfixturevalue("growing")
    return _compile("onnxruntime", cache=True, weights=request.param, block_size=16)


def _generate(compiled: Any, rows: list[int], adapters: Any, **options: Any) -> Tensor:
    tokens: Tensor = compiled.generate(
        IDS[rows],
        attention_mask=MASK[rows],
        adapters=adapters,
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
        **{"do_sample": False, **options},
    )
    return tokens


@pytest.mark.medium("greedy and drawn rows; backends/eager/test_rows.py has beams", cases=["float-{'num_beams': 2}"])
@pytest.mark.slow("rows over float weights; test_quantised.py compares int4", cases=["int4-*"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "seed": [3, 1, 4, 1, 5, 9]}], ids=repr)
def test_generated_rows_are_each_rows_own(
    cached: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = []
    for row, choice in enumerate(ROW_CHOICES):
        own = {**options, **({"seed": options["seed"][row]} if "seed" in options else {})}
        alone.append(_generate(cached, [row], choice, **own)[0])
    steps: list[int] = []
    note_calls(monkeypatch, cached.switch.state.bound, "decode", lambda *_: steps.append(1))
    together = _generate(cached, list(range(6)), ROW_CHOICES, **options)
    assert len(steps) <= 7, "one run of the engine a step"
    assert torch.equal(together[:, -6:], torch.stack(alone)[:, -6:])
    assert len({tuple(row[-6:].tolist()) for row in together}) > 3


@pytest.mark.medium(
    "greedy rows; generation/test_cached_generation.py has beams over prompts",
    cases=["int4*", "float-{'num_beams': 2}"],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=repr)
def test_rows_of_several_choices_share_a_prompt_cache(
    cached: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, moved, known = list(range(6)), [*ROW_CHOICES[1:], ROW_CHOICES[0]], lorac.PromptCache()
    options = {**options, **({"seed": 3} if "do_sample" in options else {})}
    expected = [_generate(cached, rows, choices, **options) for choices in (ROW_CHOICES, moved)]
    fed: list[int] = []
    note_calls(
        monkeypatch, cached.switch.state.bound, "decode", lambda graph, cache, step: fed.append(max(step.counts))
    )
    for choices, y, first in ((ROW_CHOICES, expected[0], 5), (ROW_CHOICES, expected[0], 1), (moved, expected[1], 5)):
        fed.clear()
        assert torch.equal(_generate(cached, rows, choices, prompt_cache=known, **options), y)
        assert fed == [first, *[1] * 5], "one run of the engine a step, and nothing is computed twice"


@pytest.mark.medium("generation/test_generate.py: a draft changes no token")
def test_a_draft_changes_no_row_of_any_choice(cached: Any) -> None:
    rows = list(range(6))
    together = _generate(cached, rows, ROW_CHOICES)
    for draft in (None, "lora"):
        assert torch.equal(_generate(cached, rows, ROW_CHOICES, draft=draft), together)


@pytest.mark.medium("float weights, and end_to_end/test_quantised.py swaps adapters next to codes", cases=["int4*"])
def test_a_streamer_sees_all_rows(cached: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens)

        def end(self) -> None:
            self.seen.append(torch.tensor([]))

    streamer = Streamer()
    together = _generate(cached, list(range(6)), ROW_CHOICES, streamer=streamer)
    assert torch.equal(torch.stack(streamer.seen[1:-1], 1), together[:, -6:])


@pytest.mark.medium("float weights, and end_to_end/test_quantised.py swaps adapters next to codes", cases=["int4*"])
def test_a_plain_call_of_a_program_with_a_cache(cached: Any) -> None:
    y = _logits(cached, IDS, ROW_CHOICES)
    for row, choice in enumerate(ROW_CHOICES):
        alone = _logits(cached, IDS[row : row + 1], choice)
        assert torch.equal(y[row].argmax(-1), alone[0].argmax(-1))
