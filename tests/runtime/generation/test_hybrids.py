"""Hybrids over ONNX Runtime's caches: states of convolutions and recurrences beside keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxruntime import InferenceSession, OrtValue
from torch import Tensor

import lorac
from lorac.backends.onnx.export.exporter import export
from lorac.backends.onnx.export.translations import TRANSLATIONS
from lorac.backends.onnx.kv_cache import BufferedCache, CacheLayout, run_decode_step
from lorac.target.kv_cache import CacheSpec, DecodeStep
from lorac.testing import assert_close
from tests.decoders import HYBRIDS
from tests.refusing import refuses
from tests.runtime.generation.texts import padded, prompts

LENGTHS = (21, 4, 35, 1)
"""Of prompts: some are longer than a chunk of a recurrence, and than a window."""
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
ADAPTED = {
    "in_proj",
    "in_proj_qkvz",
    "in_proj_ba",
    "x_proj",
    "linear_x",
    "linear_out",
    "a_proj",
    "b_proj",
    "q_proj",
    "v_proj",
}
"""Names of projections of mixers; PEFT adapts none behind a scan, and those of convolutions have no effect there."""
NEAR = 1e-3
"""Of the spread of logits."""


_EACH_OP = ["lfm2-lora", "olmo_hybrid-dora", "recurrent_gemma-lora", "bamba-dora", "jamba-lora"]


def _adapted(family: str, *, dora: bool) -> Any:
    import peft

    host = HYBRIDS[family]().float()
    found = {path.rpartition(".")[2] for path, _ in host.named_modules()} & ADAPTED
    torch.manual_seed(1)
    told = peft.LoraConfig(r=3, target_modules=sorted(found), init_lora_weights=False, use_dora=dora)
    return peft.get_peft_model(host, told).eval()


def _keeps_states(peft: Any) -> bool:
    """Whether transformers' states are a call's; RecurrentGemma's are modules', and stay behind beams and calls."""
    return bool(peft.config.model_type != "recurrent_gemma")


def _logits(model: Any, rows: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    answer = model.generate(**rows, **GREEDY, return_dict_in_generate=True, output_logits=True, **options)
    return answer.sequences[:, rows["input_ids"].shape[1] :], torch.stack(answer.logits, 1)


def _assert_alone(made: tuple[Tensor, Tensor], peft: Any, rows: list[Tensor]) -> None:
    """Tokens and logits are those that PEFT gives each row alone, without padding."""
    for tokens, logits, row in zip(*made, rows, strict=True):
        expected, scores = _logits(peft, padded([row], "left"), use_cache=_keeps_states(peft))
        assert torch.equal(tokens, expected[0])
        assert (logits - scores[0]).abs().max() <= NEAR * (scores.max() - scores.min())


def _cache(rows: int, capacity: int = 4) -> BufferedCache[Any]:
    """A cache with keys of a layer and a state, which holds the number of its row."""
    shapes = {"past_key_values.0.key": ((None, 1, None, 2), torch.float32)}
    shapes |= {"past_key_values.0.state": ((None, 3, 2), torch.float32)}
    spec = CacheSpec(limit=None, vocabulary=7)
    layout = CacheLayout(shapes, spec, ("logits", torch.float32), True, "input_ids", {})
    made = BufferedCache[Any](layout, rows, capacity)
    made.buffers["past_key_values.0.state"][:] = torch.arange(1.0, rows + 1)[:, None, None]
    made.lengths = (2,) * rows
    return made


def _states(cache: BufferedCache[Any]) -> list[float]:
    return cache.buffers["past_key_values.0.state"][:, 0, 0].tolist()


def test_moves_states_with_their_rows() -> None:
    cache = _cache(3)
    assert cache.nbytes == 3 * 4 * (4 * 2 + 3 * 2)
    cache.select([2, 0, 0])
    assert _states(cache) == [3, 1, 1]
    cache.join(_cache(1))
    assert _states(cache) == [3, 1, 1, 1]
    cache.grow(40, 9)
    assert _states(cache) == [3, 1, 1, 1]
    assert _states(cache.copy([1, 0])) == [1, 3]
    cache.remove([0])
    assert _states(cache) == [1, 1, 1]
    cache.join(_cache(1).copy([]))
    fresh = BufferedCache[Any](cache.layout, 1, 4)
    cache.join(fresh)  # in the place of a row that left
    assert _states(cache) == [1, 1, 1, 0]


def test_a_row_that_loses_tokens_begins_anew() -> None:
    cache = _cache(2)
    cache.crop([2, 1])
    assert (cache.lengths, _states(cache)) == ((2, 0), [1, 0])
    cache.hold_prefix(None)
    cache.lengths = (1, 0)
    with refuses("unavailable", match="cannot be set back"):
        cache.crop([0, 0])


class _Engine:
    """An engine that has no budget, as the cache of prompts asks."""

    memory_budget = None


def test_rows_begin_anew_after_a_call_that_fails() -> None:
    cache, ids = _cache(2, 8), torch.ones(2, 1, dtype=torch.int64)
    step = DecodeStep(ids=ids, counts=[1, 0], wanted=ids * 0)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run_decode_step(cache, step, fail)
    assert (cache.lengths, _states(cache)) == ((0, 0), [0, 0])


def test_prompts_continue_from_the_end_of_a_state() -> None:
    prompts, key = lorac.PromptCache(), ("main", (), ())
    engine: Any = _Engine()
    prompts.add(engine, key, [torch.tensor([5, 6])], _cache(1))
    found = prompts.find(engine, key, [torch.tensor([5, 6, 7])])
    assert found is not None and found.lengths == (2,)
    assert prompts.find(engine, key, [torch.tensor([5, 7, 7])]) is None


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("form", ["plain", "rate", "beta", "repeated"])
def test_a_scan_computes_the_op(form: str, length: int) -> None:
    """In two parts, of which the second begins with the state of the first; repeated tokens round worst."""
    torch.manual_seed(0)
    batch, heads, size, width, middle = 2, 3, 4, 6, length // 2
    q, k = torch.randn(2, batch, length, heads, size)
    decay = -torch.rand(batch, length, heads, 1, width if form == "rate" else 1)
    rate = torch.rand(heads, size, width) if form == "rate" else None
    beta = torch.rand(batch, length, heads) if form == "beta" else None
    if form == "repeated":
        decay, beta = torch.zeros_like(decay), torch.ones(batch, length, heads)
    k = torch.nn.functional.normalize(k, dim=-1)
    k[:, middle:] = k[:, middle:][:, :1]  # of a token that comes again and again
    given = q, k, torch.randn(batch, length, heads, width), decay, rate, beta

    class Part(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor) -> Any:
            return torch.ops.lorac.recurrence(q, k, v, decay, rate, beta, state)

    def cut(begin: int, end: int) -> list[Any]:
        return [None if x is None else x[:, begin:end].contiguous() for x in (*given[:4], beta)]

    state = torch.zeros(batch, heads, size, width)
    named = dict(zip(("q", "k", "v", "decay", "beta"), cut(0, middle), strict=True), state=state)
    tokens = {1: torch.export.Dim("tokens")}
    shapes = {name: None if value is None or name == "state" else tokens for name, value in named.items()}
    program = torch.export.export(Part(), (), named, dynamic_shapes=shapes)
    session = InferenceSession(ir.to_proto(export(program, TRANSLATIONS)).SerializeToString())
    outputs = []
    for begin, end in ((0, middle), (middle, length)):
        fed = dict(zip(named, [*cut(begin, end), state], strict=True))
        y, behind = session.run(None, {name: value.numpy() for name, value in fed.items() if value is not None})
        state = torch.from_numpy(behind)
        outputs.append(torch.from_numpy(y))
    expected = torch.ops.lorac.recurrence(*given, None)
    assert_close(torch.cat(outputs, 1), expected[0])
    assert_close(state, expected[1])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 16, 40])
def test_a_scan_may_write_its_state_in_the_place_of_the_old_one(length: int) -> None:
    torch.manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, length, 3, 4), dim=-1)
    given = {"q": q, "k": k, "v": torch.randn(1, length, 3, 6), "decay": -torch.rand(1, length, 3, 1, 1)}
    given |= {"beta": torch.rand(1, length, 3), "state": torch.randn(1, 3, 4, 6)}

    class Part(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
            return torch.ops.lorac.recurrence(q, k, v, decay, None, beta, state)

    tokens = {1: torch.export.Dim("tokens")}
    wide = {name: torch.cat([value] * 3, 1) if name != "state" else value for name, value in given.items()}
    shapes = {name: None if name == "state" else tokens for name in given}
    program = torch.export.export(Part(), (), wide, dynamic_shapes=shapes)
    session = InferenceSession(ir.to_proto(export(program, TRANSLATIONS)).SerializeToString())
    binding = session.io_binding()
    values = {name: OrtValue.ortvalue_from_numpy(value.numpy().copy()) for name, value in given.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    first, second = (output.name for output in session.get_outputs())
    binding.bind_output(first)
    binding.bind_ortvalue_output(second, values["state"])
    session.run_with_iobinding(binding)
    expected = torch.ops.lorac.recurrence(
        *(given[name] for name in ("q", "k", "v", "decay")), None, given["beta"], given["state"]
    )
    assert_close(torch.from_numpy(binding.get_outputs()[0].numpy()), expected[0])
    assert_close(torch.from_numpy(values["state"].numpy()), expected[1])


@pytest.mark.medium("test_cache_attention.py and the tests above", cases=_EACH_OP)
@pytest.mark.slow("a family of each op", keep=_EACH_OP)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_generates_as_peft_does_for_each_row_alone(family: str, method: str, tmp_path: Path) -> None:
    peft, rows = _adapted(family, dora=method == "dora"), prompts(lengths=LENGTHS)
    batch = padded(rows, "left")
    made = lorac.compile(peft, target="onnxruntime", cache=True, self_test=False)
    whole = _logits(made, batch)
    _assert_alone(whole, peft, rows)
    right = _logits(made, padded(rows, "right"))
    assert torch.equal(right[0], whole[0])
    for size in (1, 3, 16):  # shorter and longer than a convolution, than a chunk of a recurrence
        chunks, in_chunks = _logits(made, batch, prefill_chunk_size=size)
        assert torch.equal(chunks, whole[0])
        assert (in_chunks - whole[1]).abs().max() <= NEAR * (whole[1].max() - whole[1].min())
    with peft.disable_adapter():
        _assert_alone(_logits(made, padded(rows[:2], "left"), adapters=None), peft, rows[:2])
    mixed, logits = _logits(made, batch, adapters=["default", None, "default", None])
    assert torch.equal(mixed[::2], whole[0][::2])
    assert (logits - whole[1])[1::2].abs().max() > NEAR
    beams = {**padded(rows[:1], "left"), **GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(made.generate(**beams), peft.generate(**beams, use_cache=_keeps_states(peft)))
    cache = lorac.PromptCache()
    for _ in range(2):
        assert torch.equal(_logits(made, batch, prompt_cache=cache)[0], whole[0])
    assert torch.equal(made.generate(**batch, **GREEDY, draft=None)[:, max(LENGTHS) :], whole[0])
    with lorac.Scheduler(made, rows=2) as scheduler:
        streams = [scheduler.submit(lorac.TextRequest(row, options=GREEDY)) for row in rows]
        assert [[token.id for token in stream] for stream in streams] == whole[0].tolist()
    made.save(tmp_path / "text")
    assert torch.equal(_logits(lorac.load(tmp_path / "text"), batch)[0], whole[0])
