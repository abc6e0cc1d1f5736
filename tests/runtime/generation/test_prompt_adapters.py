"""PEFT's prompts before the rows of a call: virtual tokens at the embedding, or keys and values at each layer."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorac
from lorac.testing import assert_close
from tests.peft_files import configure, quiet
from tests.refusing import refuses
from tests.runtime.generation.prompted import CONFIGS, KEYS_VALUES, NEW, continued, gpt2, llama, logits, save_prompt

GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 33, 71, 8], [60, 14, 3, 27, 90]])
ROWS = [None, "PREFIX_TUNING", "LORA", "PROMPT_TUNING", "P_TUNING", "CARTRIDGE", "LORA", "CPT"]
TARGETS = {"eager": {}, "cached": {"target": "onnxruntime", "cache": True}, "plain": {"target": "onnxruntime"}}
FAMILIES = {"llama": llama, "gpt2": gpt2}
SLOW = pytest.mark.medium("another family and no cache: the same code")
CASES = [("llama", "eager"), ("llama", "cached"), pytest.param("gpt2", "cached", marks=SLOW)]


class Prompted:
    """A family with an adapter of each type, and PEFT's model for each."""

    def __init__(self, family: str, root: Path) -> None:
        self.model = FAMILIES[family]()
        configs: dict[str, Any] = {name: make() for name, make in CONFIGS.items()}
        layer = "q_proj" if family == "llama" else "c_attn"
        configs["LORA"] = peft.LoraConfig(
            target_modules=[layer], fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"
        )
        self.peft = {name: save_prompt(self.model, config, root / name) for name, config in configs.items()}
        self.folders = {name: root / name for name in configs}

    def compile(self, way: str, **options: Any) -> Any:
        return lorac.compile(copy.deepcopy(self.model), self.folders, **TARGETS[way], self_test=False, **options)


_MADE: dict[str, Prompted] = {}
_COMPILED: dict[tuple[str, str], Any] = {}


@pytest.fixture(scope="module", autouse=True)
def forgets() -> Iterator[None]:
    yield
    _MADE.clear()
    _COMPILED.clear()


def prompted(family: str, factory: pytest.TempPathFactory) -> Prompted:
    if family not in _MADE:
        _MADE[family] = Prompted(family, factory.mktemp(family))
    return _MADE[family]


def made(family: str, way: str, factory: pytest.TempPathFactory) -> tuple[Prompted, Any]:
    known = prompted(family, factory)
    if (family, way) not in _COMPILED:
        _COMPILED[family, way] = known.compile(way)
    return known, _COMPILED[family, way]


@pytest.mark.parametrize(("family", "way"), [*CASES, ("llama", "plain"), pytest.param("gpt2", "eager", marks=SLOW)])
def test_answers_as_peft_and_off_as_the_base(family: str, way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    known, compiled = made(family, way, tmp_path_factory)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        base = compiled(input_ids=IDS, attention_mask=mask).logits
        for name in CONFIGS:
            if way == "plain" and name in KEYS_VALUES:
                with refuses("unavailable", match="keep"):
                    compiled(input_ids=IDS, attention_mask=mask, adapters=name)
                continue
            expected = logits(known.peft[name], IDS)
            found = compiled(input_ids=IDS, attention_mask=mask, adapters=name).logits
            assert found.shape == expected.shape
            assert_close(found, expected)
            compiled.swap(name)
            assert torch.equal(compiled(input_ids=IDS, attention_mask=mask).logits, found)
            compiled.swap(None)
            assert torch.equal(compiled(input_ids=IDS, attention_mask=mask).logits, base)
    assert_close(base, logits(known.model, IDS))


@pytest.mark.parametrize(("family", "way"), CASES)
def test_eight_rows_of_prompts_and_loras_generate_pefts_tokens(
    family: str, way: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known, compiled = made(family, way, tmp_path_factory)
    ids = IDS[[0, 1] * 4]
    expected = [
        continued(known.peft.get(str(name), known.model), row[None])[0] for name, row in zip(ROWS, ids, strict=True)
    ]
    assert len({tuple(row[-NEW:].tolist()) for row in expected}) > 4
    found = compiled.generate(ids, **GREEDY, adapters=ROWS)
    assert [*map(torch.equal, found, expected)] == [True] * 8
    for name in dict.fromkeys(ROWS):
        assert torch.equal(
            compiled.generate(IDS[:1], **GREEDY, adapters=name)[0],
            continued(known.peft.get(str(name), known.model), IDS[:1])[0],
        )


def test_a_task_of_several_is_an_adapter(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tasks of one file in rows of their own, as PEFT has them by task_ids; back through PEFT the file has them all."""
    model = prompted("llama", tmp_path_factory).model
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2)
    oracle = save_prompt(model, config, tmp_path / "both")
    adapter = lorac.load_adapter(tmp_path / "both", model)
    with pytest.raises(lorac.AdapterError, match=r"2 tasks, and the adapter takes task=None(.|\n)*by_task"):
        lorac.compile(copy.deepcopy(model), [adapter])
    tasks = lorac.MultitaskPromptTuning.by_task(adapter)
    for options in (TARGETS["eager"], TARGETS["cached"]):
        compiled = lorac.compile(copy.deepcopy(model), tasks, **options)
        expected = continued(oracle, IDS, task_ids=torch.tensor([1, 0]))
        assert torch.equal(compiled.generate(IDS, **GREEDY, adapters=["both-1", "both-0"]), expected)
    lorac.save_adapter(adapter, tmp_path / "back", model=model)
    with quiet():
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back").eval()
    given = {"task_ids": torch.tensor([1, 0])}
    assert torch.equal(logits(back, IDS, **given), logits(oracle, IDS, **given))


@torch.no_grad()
def test_an_embedding_that_scales_its_rows_leaves_prompts_as_they_are(tmp_path: Path) -> None:
    """Gemma 3's: of PEFT's file, and of lorac's own that PEFT loads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "sliding_window": 6}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**sizes, eos_token_id=None, pad_token_id=0, initializer_range=0.15)
    model: Any = transformers.Gemma3ForCausalLM(config).eval()
    oracle = save_prompt(model, CONFIGS["PROMPT_TUNING"](), tmp_path / "a")
    fresh = lorac.PromptTuning(targets=["embed_tokens"], num_virtual_tokens=3)
    compiled = lorac.compile(copy.deepcopy(model), {"a": tmp_path / "a", "fresh": fresh}, active=None)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert_close(compiled(**given, adapters="a").logits, logits(oracle, IDS))
    lorac.save_adapter(compiled.adapters["fresh"], tmp_path / "fresh", model=model)
    with quiet():
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "fresh").eval()
    assert_close(compiled(**given, adapters="fresh").logits, logits(back, IDS))


@pytest.mark.parametrize("name", CONFIGS)
def test_files_go_back_through_peft(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Once as the type that it was read as, and once from lorac's own file, which has no configuration of PEFT's."""
    known = prompted("llama", tmp_path_factory)
    adapter = lorac.load_adapter(known.folders[name], known.model)
    lorac.save_adapter(adapter, tmp_path / "own.safetensors", "native", model=known.model)
    own = lorac.load_adapter(tmp_path / "own.safetensors", known.model)
    for number, each in enumerate((adapter, dataclasses.replace(own, provenance={}))):
        lorac.save_adapter(each, tmp_path / str(number), model=known.model)
        with quiet():
            back = peft.PeftModel.from_pretrained(copy.deepcopy(known.model), tmp_path / str(number)).eval()
        assert torch.equal(logits(back, IDS), logits(known.peft[name], IDS))
        assert number or back.peft_config["default"].peft_type == name


def test_prompt_caches_and_beams_stand_behind_the_virtual_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    known, compiled = made("llama", "cached", tmp_path_factory)
    cache, padded = lorac.PromptCache(), torch.tensor([[0, 0, *IDS[0].tolist()], [4, 7, *IDS[1].tolist()]])
    mask = padded.ne(0).long()
    first = compiled.generate(padded, attention_mask=mask, **GREEDY, adapters=["PREFIX_TUNING", "P_TUNING"])
    assert torch.equal(first[0, 2:], continued(known.peft["PREFIX_TUNING"], IDS[:1])[0])
    assert torch.equal(first[1], continued(known.peft["P_TUNING"], padded[1:])[0])
    for _ in range(2):
        again = compiled.generate(
            padded, attention_mask=mask, **GREEDY, adapters=["PREFIX_TUNING", "P_TUNING"], prompt_cache=cache
        )
        assert torch.equal(again, first)
    eager = made("llama", "eager", tmp_path_factory)[1]
    for name in ("CPT", "CARTRIDGE"):
        beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3}
        assert torch.equal(compiled.generate(IDS, **beams, adapters=name), eager.generate(IDS, **beams, adapters=name))


def test_a_scheduler_admits_rows_with_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    known, compiled = made("llama", "cached", tmp_path_factory)
    ids = IDS[[0, 1] * 4]
    with lorac.Scheduler(compiled, rows=8, chunk=4) as scheduler:
        for _ in range(2):  # the second time from its cache
            streams = scheduler.submit_all(
                [lorac.TextRequest(row, name, options=GREEDY) for row, name in zip(ids, ROWS, strict=True)]
            )
            for row, name, stream in zip(ids, ROWS, streams, strict=True):
                expected = continued(known.peft.get(str(name), known.model), row[None])[0, len(row) :]
                assert [token.id for token in stream] == expected.tolist(), name
        long = {**GREEDY, "max_new_tokens": 57}
        with pytest.raises(lorac.InputMismatch, match="5 virtual tokens and 62 others are more"):
            [*scheduler.submit(lorac.TextRequest(ids[0], "CARTRIDGE", options=long))]
    with pytest.raises(lorac.InputMismatch, match="more than the model has positions for: 59"):
        compiled.generate(IDS, **long, adapters="CARTRIDGE")


def test_an_artifact_keeps_prompts_and_admits_others(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    known, compiled = made("llama", "cached", tmp_path_factory)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled.save(tmp_path / "artifact")
    alone = {str(one.message).split("'")[1] for one in said if "saved for lorac alone" in str(one.message)}
    assert alone == {*CONFIGS}
    loaded = lorac.load(tmp_path / "artifact")
    for name in ("PROMPT_TUNING", "PREFIX_TUNING"):
        expected = continued(known.peft[name], IDS)
        assert torch.equal(loaded.generate(IDS, **GREEDY, adapters=name), expected)
        loaded.add_adapter(known.folders[name], name=f"{name} again")
        assert torch.equal(loaded.generate(IDS, **GREEDY, adapters=f"{name} again"), expected)


@pytest.mark.medium("an encoder: ids before ids, as for a decoder", keep=["eager"])
@pytest.mark.parametrize("way", ["eager", "plain"])
def test_a_classifier_has_virtual_tokens_and_its_own_head(way: str, tmp_path: Path) -> None:
    """An encoder without a cache, by row next to the base; the classifier that was trained with the prompt is its."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=97, num_labels=3, initializer_range=0.3, **sizes)
    model: Any = transformers.BertForSequenceClassification(config).eval()
    oracle = save_prompt(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), tmp_path / "a")
    compiled = lorac.compile(copy.deepcopy(model), {"a": tmp_path / "a"}, **TARGETS[way], self_test=False)
    given = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])}
    with torch.no_grad():
        found, rows = compiled(**given, adapters="a"), compiled(**given, adapters=["a", None])
        expected, base = oracle(**given).logits, model(**given).logits
    assert_close(found.logits, expected)
    assert_close(rows.logits, torch.stack([expected[0], base[1]]))
    with pytest.raises(lorac.InputMismatch, match=r"virtual tokens precede input_ids|has shape \[2, 1, 5, 5\]"):
        compiled(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5), adapters="a")


def test_rejects_prompts_that_have_no_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    known, compiled = made("llama", "cached", tmp_path_factory)
    with pytest.raises(lorac.ChoiceError, match=r"one prompt, at strength 1(.|\n)*'CPT' \(strength 0.5\)"):
        compiled.generate(IDS, adapters={"CPT": 0.5})
    with pytest.raises(lorac.ChoiceError, match=r"'CPT' .*'P_TUNING'"):
        compiled.generate(IDS, adapters={"CPT": 1.0, "P_TUNING": 1.0})
    with pytest.raises(lorac.CompileError, match="virtual tokens, which no weight holds"):
        lorac.merge_into(copy.deepcopy(known.model), known.folders["CPT"])
    other = llama(num_attention_heads=2)
    for options in ({}, TARGETS["cached"]):
        wide = lorac.compile(copy.deepcopy(other), {"a": known.folders["PREFIX_TUNING"]}, **options)
        with refuses("shape_mismatch", match="2 layers, 2 heads and 8 values each, and the model 2, 2 and 16"):
            wide.generate(IDS, adapters="a", **GREEDY)
    with pytest.raises(lorac.SiteError, match="virtual tokens have no place in Linear"):
        lorac.compile(torch.nn.Linear(4, 4), {"a": known.folders["CPT"]})
    with refuses("unavailable", match="neither weights nor slot files hold"):
        compiled.save_choice(tmp_path / "choice.onnx_adapter", "CARTRIDGE")
    fused = known.compile("eager", mode="fused")
    with refuses("unavailable", match="neither weights nor slot files hold"):
        fused.swap("CPT")
    bare = lorac.compile(
        copy.deepcopy(known.model), {"LORA": known.folders["LORA"]}, **TARGETS["cached"], self_test=False
    )
    with pytest.raises(lorac.NeedsRecompile, match=r"embed_tokens' has no slot(.|\n)*virtual_tokens=3"):
        bare.add_adapter(known.folders["CPT"], name="CPT")
    bare.add_adapter(known.folders["PREFIX_TUNING"], name="PREFIX_TUNING")
    expected = continued(known.peft["PREFIX_TUNING"], IDS)
    assert torch.equal(bare.generate(IDS, **GREEDY, adapters="PREFIX_TUNING"), expected)


def test_rejects_heads_that_do_not_divide_the_width(tmp_path: Path) -> None:
    save_prompt(llama(), CONFIGS["PREFIX_TUNING"](), tmp_path)
    configure(tmp_path, num_attention_heads=5)
    with pytest.raises(lorac.FormatError, match="num_attention_heads=5 does not divide token_dim=16"):
        lorac.load_adapter(tmp_path, llama())


def test_trains_as_peft(tmp_path: Path) -> None:
    model = llama()
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(model), CONFIGS["PROMPT_TUNING"]())
        wrapped.save_pretrained(tmp_path)
    compiled = lorac.compile(model, {"a": tmp_path}).train()
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    wanted, found = wrapped(**call).loss, compiled(**call).loss
    wanted.backward()
    found.backward()
    [theirs] = [one.grad for one in wrapped.parameters() if one.requires_grad]
    [ours] = [one.grad for one in compiled.adapters["a"].parameters()]
    assert_close(found, wanted)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_reports_that_no_weight_holds_a_prompt(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    known = prompted("llama", tmp_path_factory)
    adapter = lorac.load_adapter(known.folders[name], known.model)
    assert [one.form for one in lorac.inspect(adapter, known.model).sites.values()] == ["prompt"]
    checked = lorac.check(known.folders[name], known.model, for_="vllm")
    assert checked.fits and "no LoRA is its equal" in checked.objections[-1]
    assert "lorac convert" not in checked.repairs[0]
    for convert in (
        lambda: lorac.to_lora(adapter, known.model, rank=2),
        lambda: lorac.convert(adapter, for_="vllm", model=known.model),
        lambda: lorac.diff(adapter, adapter, known.model),
    ):
        with refuses("not_mergeable", match="does not edit the weight of"):
            convert()
