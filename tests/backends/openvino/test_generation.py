"""Generation over caches in OpenVINO: the tokens of PEFT, rows that come and go, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.target.kv_cache import DecodeStep
from lorac.testing import assert_close
from tests import encoder_decoders, limits
from tests.decoders import DECODERS, HYBRIDS, VOCABULARY, adapt_llama
from tests.refusing import refuses
from tests.runtime.generation.test_hybrids import _adapted, _assert_alone, _keeps_states, _logits
from tests.runtime.generation.test_onnxruntime import GREEDY, _reference, check_generates_as_peft
from tests.runtime.generation.texts import padded, prompts

openvino = pytest.importorskip("openvino")
ABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
ROOT = Path(__file__).parents[3]
_PLAIN = [family for family in DECODERS if family not in HYBRIDS]
_SOME = ["mistral", "gpt_oss", "bloom", "llama4"]
"""Windows; sinks and experts; slopes; chunks."""
_MIXERS = ["lfm2", "olmo_hybrid", "jamba"]
"""Convolutions; a recurrence in chunks, and one whose features decay apart."""


def made(model: Any, mode: str = "live", **options: Any) -> Any:
    return lorac.compile(model, target="openvino", mode=mode, cache=True, **{"self_test": False, **options})


@pytest.fixture(scope="module")
def llama() -> Any:
    return made(_reference("llama"), self_test=True)


def test_generates_as_peft(llama: Any, tmp_path: Path) -> None:
    check_generates_as_peft(llama, _reference("llama"), tmp_path)


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_generates_with_merged_weights(mode: str) -> None:
    peft, batch = _reference("llama"), padded(prompts(), "left")
    assert torch.equal(made(peft, mode).generate(**batch, **GREEDY), peft.generate(**batch, **GREEDY))


@pytest.mark.skipif("BF16" not in ABILITIES, reason="this processor has no bf16")
def test_keeps_a_cache_in_bf16(tmp_path: Path) -> None:
    """Prompts in chunks, each row with its choice: no farther from float32 than torch's own bfloat16 is."""
    one, two = adapt_llama(DECODERS["llama"]())
    adapters, rows = {"one": one, "two": two}, ["one", None, "two", {"one": 0.5, "two": 0.5}]
    wide, half = (made(DECODERS["llama"](), adapters=adapters, precision=one) for one in ("f32", "bf16"))
    torchs = lorac.compile(DECODERS["llama"]().bfloat16(), adapters)

    def logits(model: Any, **options: Any) -> Any:
        told = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(**padded(prompts(), "left"), adapters=rows, **told, **options).logits[0].float()

    wanted, found = logits(wide), logits(half, prefill_chunk_size=3)
    away = [(each - wanted).norm() for each in (found, logits(torchs))]
    assert 0 < away[0] <= limits.BFLOAT16 * away[1]
    cache, ids = half.engine.new_cache("main", 1, 9), torch.full((1, 3), 5)
    half.switch.state.bound.decode("main", cache, DecodeStep(ids=ids, counts=[3], wanted=torch.tensor([[2]])))
    assert {buffer.dtype for buffer in cache.buffers.values()} == {torch.bfloat16}
    half.save(tmp_path / "saved")
    assert torch.equal(logits(lorac.load(tmp_path / "saved"), prefill_chunk_size=3), found)
    assert torch.equal(logits(lorac.load(tmp_path / "saved", precision="f32")), wanted)


@pytest.mark.medium("a family of each form of attention", keep=_SOME)
@pytest.mark.parametrize("family", _PLAIN)
def test_computes_every_form_of_attention(family: str) -> None:
    """The logits of ONNX Runtime's caches, which are compared with PEFT's."""
    host, batch = DECODERS[family]().float(), padded(prompts(), "left")
    settings = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    one = made(host).generate(**batch, **settings)
    other = lorac.compile(host, target="onnxruntime", cache=True, self_test=False).generate(**batch, **settings)
    assert torch.equal(one.sequences, other.sequences)
    assert_close(torch.stack(one.logits), torch.stack(other.logits))


@pytest.mark.medium("a family of each mixer", keep=_MIXERS)
@pytest.mark.parametrize("family", HYBRIDS)
def test_generates_with_states(family: str, tmp_path: Path) -> None:
    peft, rows = _adapted(family, dora=False), prompts(lengths=(21, 4, 35, 1))
    hybrid, batch = made(peft), padded(rows, "left")
    whole = _logits(hybrid, batch)
    _assert_alone(whole, peft, rows)
    assert torch.equal(_logits(hybrid, batch, prefill_chunk_size=3)[0], whole[0])
    hybrid.save(tmp_path / "saved")
    assert torch.equal(_logits(lorac.load(tmp_path / "saved"), batch)[1], whole[1])
    beams = {**padded(rows[:1], "left"), **GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(hybrid.generate(**beams), peft.generate(**beams, use_cache=_keeps_states(peft)))


@pytest.mark.medium("a T5 and a Whisper", keep=["t5", "whisper"])
@pytest.mark.parametrize("family", encoder_decoders.FAMILIES)
def test_generates_behind_an_encoder(family: str, tmp_path: Path) -> None:
    peft = encoder_decoders.adapted(family)
    compiled = made(peft, example_inputs=encoder_decoders.example(peft))
    for batch in encoder_decoders.batches(family):
        for options in ({}, {"num_beams": 3}):
            told = {**batch, **GREEDY, **options}
            assert torch.equal(compiled.generate(**told), peft.generate(**told))
    compiled.save(tmp_path / "saved")
    assert torch.equal(lorac.load(tmp_path / "saved").generate(**told), peft.generate(**told))


def test_rows_join_and_leave_while_others_are_written(llama: Any) -> None:
    rows = prompts()
    alone = [llama.generate(row[None], **GREEDY, eos_token_id=None)[0, len(row) :].tolist() for row in rows]
    with lorac.Scheduler(llama, rows=2) as scheduler:
        options = {**GREEDY, "eos_token_id": None}
        streams = [scheduler.submit(lorac.TextRequest(row, options=options)) for row in rows]
        assert [[token.id for token in stream] for stream in streams] == alone


def test_a_row_that_left_with_numbers_that_are_none_changes_no_other(llama: Any) -> None:
    program = llama.switch.state.bound
    ids = torch.arange(3, 9).reshape(2, 3)
    step = DecodeStep(ids=ids, counts=[3, 3], wanted=torch.tensor([[2], [2]]))
    wanted = program.decode("main", program.engine.new_cache("main", 2, 9), step)
    cache = program.engine.new_cache("main", 2, 9)
    long = DecodeStep(ids=ids.repeat(1, 2), counts=[6, 6], wanted=torch.tensor([[5], [5]]))
    program.decode("main", cache, long)
    for buffer in cache.buffers.values():
        buffer[:, :, :6] = torch.nan
    cache.crop([0, 0])
    cache.select([1, 0])
    assert torch.equal(program.decode("main", cache, step), wanted)
    cache.remove([1])
    cache.join(program.engine.new_cache("main", 1, 9))
    assert cache.lengths == (3, 0)
    more = DecodeStep(ids=ids, counts=[0, 3], wanted=torch.tensor([[0], [2]]))
    assert_close(program.decode("main", cache, more)[1], wanted[1])


def test_counts_a_cache_s_capacity_and_makes_buffers_as_rows_need_them(llama: Any) -> None:
    program = llama.switch.state.bound
    cache = program.engine.new_cache("main", 1, 500)
    counted = cache.charge.blocks[0][1]
    assert cache.nbytes == 0 < counted
    ids = torch.full((1, 70), 5)
    program.decode("main", cache, DecodeStep(ids=ids, counts=[70], wanted=torch.tensor([[69]])))
    assert 70 / 500 < cache.nbytes / counted < 0.3
    assert cache.charge.blocks[0][1] == counted
    cache.grow(1000)
    assert cache.charge.blocks[0][1] == 2 * counted


def test_answers_whole_sequences_as_the_model_does(llama: Any) -> None:
    peft, batch = _reference("llama"), padded(prompts(), "right")
    with torch.no_grad():
        wanted = peft(**batch).logits
    seen = batch["attention_mask"].bool()
    assert_close(llama(**batch).logits[seen], wanted[seen])


def test_generates_in_a_process_without_transformers(llama: Any, tmp_path: Path) -> None:
    row = prompts()[0][None]
    llama.save(tmp_path / "text")
    torch.save((row, llama.generate(row, **GREEDY)), tmp_path / "answer.pt")
    script = """
import sys, torch, lorac
row, wanted = torch.load("answer.pt")
assert torch.equal(lorac.load("text").generate(row, max_new_tokens=10, do_sample=False), wanted)
assert not {"onnxruntime", "onnxscript", "onnx_ir"} & {*sys.modules}, "heavy"
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    )


def test_rejects_generation_without_a_cache_and_longer_texts_than_positions() -> None:
    host = DECODERS["gpt2"]()
    plain = lorac.compile(
        host, target="openvino", self_test=False, example_inputs={"input_ids": torch.ones(2, 5).long()}
    )
    with refuses("unavailable", match="compile with cache=True"):
        plain.engine.new_cache("main", 1, 4)
    with refuses("input_mismatch", match="65 tokens are more than the model has positions for: 64"):
        made(host)(input_ids=torch.full((1, 65), 5))
    assert made(host)(input_ids=[[3, 4]]).logits.shape == (1, 2, VOCABULARY)
