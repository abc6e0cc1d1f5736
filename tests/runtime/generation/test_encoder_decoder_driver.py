"""Behind an encoder, over ONNX Runtime's caches: the tokens of PEFT, whatever the family and the mode."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorac
from lorac.target.kv_cache import DecodeStep, KeyValueCache
from lorac.testing import assert_close
from tests.encoder_decoders import FAMILIES, FEATURES, IMAGE, VOCABULARY, adapted, batches, example, made
from tests.limits import LEAST_DIFFERENCE
from tests.program_calls import note_calls
from tests.refusing import refuses

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True},
    {"repetition_penalty": 1.3},
]
SOON = ("t5", "mvp", "fsmt", "whisper", "m2m_100", "t5gemma2")


def _made(model: Any, mode: str = "live", **options: Any) -> Any:
    options = {"example_inputs": example(model), **options}
    return lorac.compile(model, target="onnxruntime", mode=mode, cache=True, **options)


def _telling(tokens: torch.Tensor) -> bool:
    """Return whether rows differ, and tokens within them: else they would agree whatever was wrong."""
    return len(tokens.unique(dim=0)) > 1 and len(tokens.unique()) > 2


def _same(compiled: Any, peft: Any, family: str, asked: list[dict[str, Any]]) -> bool:
    """Return whether a program gives PEFT's tokens, with the adapter and without."""
    for batch in batches(family):
        for options in asked:
            torch.manual_seed(3)
            expected = peft.generate(**batch, **{**GREEDY, **options})
            assert torch.equal(compiled.generate(**batch, **{**GREEDY, **options}, seed=3), expected), options
        with peft.disable_adapter():
            base = peft.generate(**batch, **GREEDY)
        tokens = peft.generate(**batch, **GREEDY)
        assert not torch.equal(base, tokens)
        assert _telling(tokens)
        if compiled.mode != "baked":
            assert torch.equal(compiled.generate(**batch, **GREEDY, adapters=None), base)
    return True


@pytest.mark.medium("test_tokens_are_those_of_the_host_with_adapters_by_row")
@pytest.mark.slow("a T5, an MVP, an FSMT and a T5Gemma 2", keep=["t5", "mvp", "fsmt", "t5gemma2"])
@pytest.mark.parametrize("family", SOON)
def test_tokens_are_those_of_peft(family: str) -> None:
    """Batches padded on either side; beams."""
    peft = adapted(family)
    assert _same(_made(peft, self_test=False), peft, family, [{}, {"num_beams": 3}])


@pytest.mark.medium("test_tokens_are_those_of_the_host_with_adapters_by_row, with the encoder's convolutions")
def test_an_encoder_with_adapters_on_convolutions_keeps_a_cache(tmp_path: Path) -> None:
    """Their rank is 0 without adapters, which torch does not convolve with."""
    host = made("whisper")
    get_peft_model(host, LoraConfig(r=2, target_modules=["conv1", "q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "peft"
    )
    host, batch = made("whisper"), batches("whisper")[0]
    compiled = _made(host, adapters={"sound": tmp_path / "peft"}, active=None)
    merged = PeftModel.from_pretrained(made("whisper"), tmp_path / "peft").merge_and_unload().eval()
    expected = merged.generate(**batch, **GREEDY)
    base = host.generate(**batch, **GREEDY)
    mixed = compiled.generate(**batch, **GREEDY, adapters=["sound", None, "sound", None])
    assert torch.equal(mixed[::2], expected[::2]) and not torch.equal(expected, base)
    assert torch.equal(mixed[1::2], base[1::2])


@pytest.mark.medium("test_prompt_features.py, in front of a decoder")
def test_rejects_an_example_of_images_without_an_answer() -> None:
    model = made("florence2")
    given = {name: value for name, value in example(model).items() if name != "decoder_input_ids"}
    with refuses("unavailable", match="needs the example input 'decoder_input_ids'"):
        _made(model, example_inputs=given)


@pytest.mark.medium("backends/onnxruntime/test_quantised_products.py: a table of several graphs")
def test_the_table_of_both_graphs_is_quantised_alike() -> None:
    """The self-test compares each graph with the values that the table has in it."""
    compiled = _made(adapted("mvp"), weights="int4")
    codecs = [note for note in str(compiled.explain()).splitlines() if "stored as int8" in note]
    assert codecs, compiled.explain()
    compiled.generate(**batches("mvp")[-1], **GREEDY)


@pytest.fixture(scope="module")
def seeing() -> Any:
    """A Florence-2 with a LoRA and a DoRA in its tower, its connector, its encoder and its decoder; and PEFT's."""
    peft = adapted("florence2")
    peft.add_adapter(
        "dora", LoraConfig(r=2, target_modules=FAMILIES["florence2"][2], use_dora=True, init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".dora" in name:
                parameter.mul_(1.2) if "magnitude" in name else parameter.normal_(0, 0.2)
    return _made(peft), peft.eval()


def _expect(peft: Any, batch: dict[str, torch.Tensor], adapter: str | None, row: int, **options: Any) -> Any:
    """Return PEFT's answer for one row alone, with its padding, as its encoder numbers tokens with it."""
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    told = {**GREEDY, **options, "return_dict_in_generate": True, "output_logits": True}
    if adapter is None:
        with peft.disable_adapter():
            return peft.generate(**alone, **told)
    peft.set_adapter(adapter)
    return peft.generate(**alone, **told)


@pytest.mark.medium("test_prompt_features.py, in front of a decoder")
@pytest.mark.parametrize("adapters", [["dora"] * 4, ["default", "dora", None, "default"]], ids=["together", "by row"])
def test_images_in_front_of_an_encoder_get_the_tokens_and_logits_of_peft(
    adapters: list[str | None], seeing: Any, tmp_path: Path
) -> None:
    compiled, peft = seeing
    choice = adapters[0] if len(set(adapters)) == 1 else adapters
    compiled.save(tmp_path / "saved")
    eager = lorac.compile(peft, active=None)
    for engine, batch in itertools.product((compiled, lorac.load(tmp_path / "saved"), eager), batches("florence2")):
        told = {**batch, **GREEDY, "adapters": choice, "return_dict_in_generate": True, "output_logits": True}
        found = engine.generate(**told)
        assert len(found.sequences.unique(dim=0)) > 1
        for row, adapter in enumerate(adapters):
            expected = _expect(peft, batch, adapter, row)
            tokens = expected.sequences[0]
            assert torch.equal(found.sequences[row, : len(tokens)], tokens)
            for logits, others in zip(found.logits, expected.logits, strict=False):
                assert_close(logits[row], others[0])
    beams = compiled.generate(**batch, **GREEDY, adapters=choice, num_beams=3)
    for row, adapter in enumerate(adapters):
        tokens = _expect(peft, batch, adapter, row, num_beams=3).sequences[0]
        assert torch.equal(beams[row, : len(tokens)], tokens)


@pytest.mark.medium("test_prompt_features.py, in front of a decoder")
def test_images_change_answers_and_must_fit_their_tokens(seeing: Any) -> None:
    compiled, _ = seeing
    batch = {name: value[:1] for name, value in batches("florence2")[1].items()}
    options = {**GREEDY, "adapters": "dora", "return_dict_in_generate": True, "output_logits": True}
    first = compiled.generate(**batch, **options).logits[0]
    other = compiled.generate(**batch | {"pixel_values": -batch["pixel_values"]}, **options).logits[0]
    assert (first - other).abs().max() > LEAST_DIFFERENCE * first.abs().max()
    ids = batch["input_ids"].clone()
    ids[0, FEATURES - 1] = IMAGE - 1
    with refuses("input_mismatch", match="the model checks them at"):
        compiled.generate(**batch | {"input_ids": ids}, **options)
    with refuses("choice_error", match="needs the input 'pixel_values'"):
        compiled.generate(**{name: value for name, value in batch.items() if name != "pixel_values"}, **options)
    with refuses("input_mismatch", match="pixel_values"):
        compiled.generate(**batch | {"pixel_values": batch["pixel_values"][..., :4]}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_as_peft(family: str, tmp_path: Path) -> None:
    """Batches padded on either side, beams and draws; rows of their own; and once loaded."""
    peft = adapted(family)
    compiled, batch = _made(peft), batches(family)[-1]
    assert _same(compiled, peft, family, OPTIONS)
    expected = peft.generate(**batch, **GREEDY)
    mixed = compiled.generate(**batch, **GREEDY, adapters=["default", None, "default", None])
    base = compiled.generate(**batch, **GREEDY, adapters=None)
    for place, row in enumerate(mixed):
        own = (base if place % 2 else expected)[place]
        assert torch.equal(row[: len(own)], own[: len(row)])
    compiled.save(tmp_path / "saved")
    assert torch.equal(lorac.load(tmp_path / "saved").generate(**batch, **GREEDY), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", *SOON])
@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_merged(mode: str, family: str) -> None:
    peft = adapted(family)
    assert _same(_made(peft, mode), peft, family, OPTIONS)


@pytest.fixture(scope="module")
def compiled() -> Any:
    adapters = {name: lorac.LoRA(r=rank, targets=["q_proj", "fc1"]) for name, rank in (("one", 3), ("two", 2))}
    host = made("bart")
    eager = lorac.compile(host, adapters, active=None)
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in eager.adapters.values():
            for tensor in adapter.parameters():
                tensor.normal_(0, 0.3)
    return _made(host, adapters=dict(eager.adapters), active="one"), eager


def test_tokens_are_those_of_the_host_with_adapters_by_row(compiled: Any, tmp_path: Path) -> None:
    program, eager = compiled
    for batch in batches("bart"):
        expected = eager.generate(**batch, **GREEDY, adapters="one")
        assert _telling(expected)
        assert torch.equal(program.generate(**batch, **GREEDY), expected)
    for options in ({"do_sample": True, "seed": [3, 1, 4, 1]}, {"num_beams": 2, "do_sample": False}):
        told = {**batch, "max_new_tokens": 10, **options, "adapters": ["one", None, {"one": 0.5, "two": 0.5}, "two"]}
        assert torch.equal(program.generate(**told), eager.generate(**told)), options
    program.save(tmp_path / "saved")
    assert torch.equal(lorac.load(tmp_path / "saved").generate(**batch, **GREEDY), expected)


def test_both_graphs_are_shown_each_with_its_own(compiled: Any, tmp_path: Path) -> None:
    program, _ = compiled
    assert list(program.graph) == ["main", "main.encoder"]
    own, other = "model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0.encoder_attn.k_proj"
    assert own in program.graph["main"].dump.sites
    assert own not in program.graph["main.encoder"].dump.sites
    assert other in program.graph["main.encoder"].dump.sites
    assert "memory.0.key" in str(program.graph["main"].emitted)
    page = program.graph.to_html(tmp_path / "page.html").read_text()
    assert page.count("<h2>main") == 2
    assert {row.graph for row in program.explain().programs} == {"", "main.encoder"}


def test_a_swap_meanwhile_acts_on_the_next_call(compiled: Any) -> None:
    """On both halves of the program: what is encoded differs with the adapter, too."""
    program, eager = compiled
    batch = {name: value[:1] for name, value in batches("bart")[1].items()}

    class Swapping:
        def put(self, value: torch.Tensor) -> None:
            thread = threading.Thread(target=lambda: program.swap("two"))
            thread.start()
            thread.join()

        def end(self) -> None:
            """Do nothing."""

    try:
        answer = program.generate(**batch, **GREEDY, streamer=Swapping())
        assert torch.equal(answer, eager.generate(**batch, **GREEDY, adapters="one"))
        after = program.generate(**batch, **GREEDY)
        assert torch.equal(after, eager.generate(**batch, **GREEDY, adapters="two"))
        assert not torch.equal(after, answer)
    finally:
        program.swap("one")


def test_runs_the_encoder_once_for_all_beams(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = compiled
    caches: list[Any] = []
    note_calls(monkeypatch, program.switch.state.bound, "encode", lambda graph, cache, inputs: caches.append(cache))
    program.generate(**batches("bart")[1], **GREEDY, num_beams=3)
    (cache,) = caches
    held = dict(cache.encoder_outputs)
    assert {value.shape[0] for value in held.values()} == {12}
    cache.select([1, 0, 2, 3, 5, 5, *range(6, 12)])
    assert all(cache.encoder_outputs[name] is value for name, value in held.items())
    cache.select([3, 0])
    assert torch.equal(cache.encoder_outputs["memory.0.key"], held["memory.0.key"][[3, 0]])


def test_a_prompt_for_the_decoder_and_guesses_ahead(compiled: Any) -> None:
    program, eager = compiled
    batch = batches("bart")[0]
    for prompt in ([2, 5, 6], [9, 5, 6]):  # the second does not begin as every text does, so that it is made to
        told = {**batch, **GREEDY, "decoder_input_ids": torch.tensor([prompt] * 4)}
        assert torch.equal(program.generate(**told), eager.generate(**told, adapters="one"))
    expected = program.generate(**batch, **GREEDY)
    assert torch.equal(program.generate(**batch, **GREEDY, draft=None), expected)
    assert torch.equal(program.generate(**batch, **GREEDY, draft="two"), expected)


@torch.no_grad()
def test_a_plain_call_answers_as_the_host_does(compiled: Any) -> None:
    program, eager = compiled
    told = {**batches("bart")[0], "decoder_input_ids": torch.tensor([[2, 5, 6, 7]] * 4)}
    answer, expected = program(**told), eager(**told, adapters="one", use_cache=False)
    assert type(answer) is type(expected)
    for name in ("logits", "encoder_last_hidden_state"):
        assert_close(answer[name], expected[name])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]] * 2)
    padded = program(**told, decoder_attention_mask=mask).logits
    assert_close(padded[1, :2], expected.logits[1, :2])
    assert not padded[1, 2:].any()


IDS = torch.tensor([[3, 4, 5]])
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing to encode": ({}, lorac.InputMismatch, "gives the encoder no input"),
    "no batch": ({"input_ids": [[3, 4]]}, lorac.errors.WrongType, "input_ids= is not a batch"),
    "no rows": ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, lorac.InputMismatch, "is empty"),
    "an empty row": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, lorac.InputMismatch, "is empty"),
    "no token": ({"input_ids": IDS + VOCABULARY}, lorac.ChoiceError, "holds the id"),
    "too long": ({"input_ids": IDS.repeat(1, 30)}, lorac.InputMismatch, "<= 64"),
    "too much": ({"input_ids": IDS, "max_new_tokens": 90}, lorac.InputMismatch, "positions for: 64"),
    "another mask": ({"input_ids": IDS, "attention_mask": IDS[:, :2]}, lorac.InputMismatch, "inputs that differ"),
    "other rows": ({"input_ids": IDS, "decoder_input_ids": IDS.T}, lorac.InputMismatch, "has 1 rows, and"),
    "no token of the text": (
        {"input_ids": IDS, "decoder_input_ids": IDS + VOCABULARY},
        lorac.InputMismatch,
        "decoder_input_ids holds",
    ),
    "prompt_cache": (
        {"input_ids": IDS, "prompt_cache": lorac.PromptCache()},
        lorac.Unavailable,
        "begins no other",
    ),
    "encoded before": ({"input_ids": IDS, "encoder_outputs": 1}, lorac.errors.OptionError, "encoder_outputs"),
    "choices": ({"input_ids": IDS, "adapters": ["one", None]}, lorac.ChoiceError, "2 choices of adapters for 1 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rejects_wrong_input_and_changes_nothing(name: str, compiled: Any) -> None:
    program, _ = compiled
    told, error, text = WRONG[name]
    before = program.generate(IDS, **GREEDY)
    with pytest.raises(error, match=text):
        program.generate(**{**GREEDY, **told})
    assert program.active == {"one": 1.0}
    assert torch.equal(program.generate(IDS, **GREEDY), before)


def test_rows_that_leave_and_join_match_single_rows(compiled: Any) -> None:
    program, _ = compiled
    batch, bound = batches("bart")[1], program.switch.state.bound

    def fed(rows: list[int]) -> KeyValueCache:
        cache = program.engine.new_cache("main", len(rows), 12)
        bound.encode("main", cache, {name: value[rows] for name, value in batch.items()})
        ids, last = torch.tensor([[2, 5, 6]] * len(rows)), torch.full((len(rows), 1), 2)
        bound.decode("main", cache, DecodeStep(ids=ids, counts=[3] * len(rows), wanted=last))
        return cache

    def step(cache: KeyValueCache) -> torch.Tensor:
        more = torch.full((len(cache.lengths), 1), 7)
        return bound.decode("main", cache.copy(), DecodeStep(ids=more, counts=[1] * len(more), wanted=more * 0))

    cache, alone = fed([0, 1, 2, 3]), [step(fed([row]))[0] for row in range(4)]
    cache.select([3, 1])
    assert_close(step(cache), torch.stack([alone[3], alone[1]]))
    cache.join(fed([0, 2]))
    cache.remove([0])
    assert_close(step(cache), torch.stack([alone[2], alone[1], alone[0]]))
    assert_close(step(cache.copy([2, 0, 2])), torch.stack([alone[0], alone[2], alone[0]]))
    longer = program.engine.new_cache("main", 1, 12)
    bound.encode("main", longer, {name: value[:1, :3] for name, value in batch.items()})
    with refuses("input_mismatch", match="encoder outputs of another length"):
        cache.join(longer)
    assert len(cache.lengths) == 3


@pytest.mark.slow
def test_keeps_the_models_own_generation(tmp_path: Path) -> None:
    """Whisper's: timestamps, sounds longer than it hears at once, temperatures to fall back to; once loaded, too."""
    peft = adapted("whisper")
    compiled = _made(peft)
    compiled.save(tmp_path / "saved")
    generator = torch.Generator().manual_seed(0)
    short, long = torch.randn(4, 8, 40, generator=generator), torch.randn(2, 8, 100, generator=generator)
    for sound, told in (
        (short, {"return_timestamps": True}),
        (long, {"return_timestamps": True, "attention_mask": torch.ones(2, 100, dtype=torch.long)}),
        (short, {"temperature": (0.0, 0.6), "logprob_threshold": -0.1, "return_timestamps": True}),
        (short, {"return_dict_in_generate": True, "num_beams": 2}),
    ):
        torch.manual_seed(3)
        expected = peft.generate(input_features=sound, max_new_tokens=10, **told)
        for made_ in (compiled, lorac.load(tmp_path / "saved")):
            answer = made_.generate(input_features=sound, max_new_tokens=10, seed=3, **told)
            pair = [found if isinstance(found, torch.Tensor) else found["sequences"] for found in (answer, expected)]
            assert torch.equal(*pair), told


def test_ignores_classes_that_an_artifact_names() -> None:
    """Nor is anything imported that it names, unless transformers' own models generate with it."""
    from lorac.runtime.generation.driver import DecodingProgram
    from lorac.runtime.generation.encoder_decoder_driver import driver_class, load_rules_class
    from lorac.runtime.traits import CustomGeneration
    from lorac.target.kv_cache import CacheSpec

    whisper = "transformers.models.whisper.generation_whisper:WhisperGenerationMixin"
    spec = CacheSpec(limit=None, vocabulary=VOCABULARY, encodes=("input_features",))
    program = DecodingProgram(decode=lambda *_: IDS, new_cache=lambda *_: None, cache_spec=spec)  # type: ignore[arg-type, return-value]  # not run
    rules = CustomGeneration(whisper, {"program.decode": 1, "generate.x": 2, "model.conv.stride": [2]})
    made_ = driver_class(rules)(program, {}, {})
    assert made_.program is program
    assert callable(made_.generate)
    assert made_.model.conv.stride == [2]
    for path in ("os:system", "transformers.models.whisper.modeling_whisper:WhisperForConditionalGeneration", "x"):
        with pytest.raises(lorac.Unavailable, match="rules of its own"):
            load_rules_class(CustomGeneration(path, {}))
