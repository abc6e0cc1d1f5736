"""Adaption prompts against PEFT's own forward: logits, tokens over a cache, rows next to LoRAs, gradients, files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorac
from lorac import AdaptionPrompt, Site, SiteKind
from lorac.ir.algebra.reduction import Params
from lorac.ir.slots.execution import FormulaContext
from lorac.testing import assert_close
from tests.oracles import adaption_prompt as oracle
from tests.peft_files import load_peft, quiet
from tests.refusing import refuses
from tests.runtime.generation.prompted import NEW, VOCABULARY, gpt2, llama, logits

GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 33, 71, 8], [60, 14, 3, 27, 90]])
CACHED = {"target": "onnxruntime", "cache": True}


def mistral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, eos_token_id=None)).eval()


def biased() -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 2.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = llama(attention_bias=True, rope_parameters=rope)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if name.endswith("_proj.bias") else None
    return model


FAMILIES = {"llama": llama, "gpt2": gpt2, "mistral": mistral, "biased": biased}
_MADE: dict[str, tuple[Any, Any, Path]] = {}


def made(family: str, factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A model, PEFT's with a prompt in its two upper attentions, and the folder that PEFT saved."""
    if family not in _MADE:
        model, folder = FAMILIES[family](), factory.mktemp(family) / "a"
        config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
        with quiet(), torch.no_grad():
            wrapped = peft.get_peft_model(copy.deepcopy(model), config)
            torch.manual_seed(1)
            for name, tensor in wrapped.named_parameters():
                if "adaption_" in name:
                    tensor.normal_(0, 2.0 if "gate" in name else 1.0)
            wrapped.save_pretrained(str(folder))
        _MADE[family] = model, load_peft(model, folder), folder
    return _MADE[family]


def continued(model: Any, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_as_peft_and_off_as_the_base(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, wrapped, folder = made(family, tmp_path_factory)
    compiled = lorac.compile(copy.deepcopy(model), {"a": folder})
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    base, expected = model(**given).logits, wrapped(**given).logits
    assert (expected - base).norm() > 0.05 * base.norm()
    assert_close(compiled(**given, adapters="a").logits, expected)
    assert torch.equal(compiled(**given, adapters=None).logits, base)
    shifted = {**given, "position_ids": torch.arange(5)[None] + 7}
    assert_close(compiled(**shifted, adapters="a").logits, wrapped(**shifted).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", CACHED),
        pytest.param("gpt2", CACHED, marks=pytest.mark.medium("another family: the same code")),
        pytest.param("biased", CACHED, marks=pytest.mark.medium("another family: the same code")),
        ("llama", {"target": "eager"}),
    ],
)
def test_rows_of_prompts_and_loras_generate_pefts_tokens(
    family: str, options: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, wrapped, folder = made(family, tmp_path_factory)
    layer = "c_attn" if family == "gpt2" else "q_proj"
    config = peft.LoraConfig(target_modules=[layer], fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    with quiet():
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(str(tmp_path / "lora"))
    lora = load_peft(model, tmp_path / "lora")
    compiled = lorac.compile(copy.deepcopy(model), {"a": folder, "lora": tmp_path / "lora"}, self_test=False, **options)
    rows = [("a", wrapped), (None, model), ("lora", lora), ("a", wrapped)]
    ids = IDS[[0, 1, 0, 1]]
    expected = [continued(of, row[None])[0] for (_, of), row in zip(rows, ids, strict=True)]
    found = compiled.generate(ids, **GREEDY, adapters=[name for name, _ in rows])
    assert [*map(torch.equal, found, expected)] == [True] * 4
    assert not torch.equal(logits(wrapped, expected[0][None]), logits(model, expected[0][None]))


@torch.no_grad()
def test_a_plain_program_answers_as_peft(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, wrapped, folder = made("mistral", tmp_path_factory)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    compiled = lorac.compile(
        copy.deepcopy(model), {"a": folder}, target="onnxruntime", example_inputs=given, self_test=False
    )
    assert_close(compiled(**given, adapters="a").logits, wrapped(**given).logits)
    rows = compiled(**given, adapters=["a", None]).logits
    assert_close(rows[:1], wrapped(input_ids=IDS[:1]).logits)
    assert_close(rows[1:], model(input_ids=IDS[1:]).logits)


@pytest.mark.parametrize("path", ["self_attn.o_proj", "attn.c_proj"])
def test_the_change_is_that_of_the_equation(path: str) -> None:
    """Of queries and projections of any values, with and without positions; 4 heads, 2 of keys and values in Llama."""
    of_gpt2, draw = path == "attn.c_proj", torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    variant = AdaptionPrompt(targets=(path,), num_attention_heads=4, rotary="" if of_gpt2 else "rotary")
    width, inner = (8, 8) if of_gpt2 else (10, 4)
    site = Site(path, SiteKind.LINEAR, width, 8, torch.float64, f"{path}.weight", f"{path}.bias")
    key, value, output = ((normal(*size), normal(size[0])) for size in ((inner, width), (inner, width), (10, 8)))
    layers = {"k_proj": key, "v_proj": value, "o_proj": output}
    if of_gpt2:
        weight, bias = (torch.cat([normal(8, *k.shape[1:]), k, v]) for k, v in zip(key, value, strict=True))
        layers = {"c_attn": (weight, bias)}
    owner, queries = path.partition(".")[0], normal(1, 5, 24 if of_gpt2 else 8)
    values = {f"weight:{owner}.{name}": pair[0] for name, pair in layers.items()}
    values |= {f"param:{owner}.{name}.bias": pair[1] for name, pair in layers.items()}
    tables = {"rotary": normal(1, 5, 2), "rotary[1]": normal(1, 5, 2)}
    values |= {f"{owner}.{'c_attn' if of_gpt2 else 'q_proj'}": queries, **tables}
    prompt, gate, y = normal(1, 3, width), normal(1), normal(1, 5, width)
    ctx = FormulaContext(site, values=values).within(torch.float64)
    found = variant.branch(normal(1, 5, 8), y, Params(adaption_prompt=prompt, adaption_gate=gate), ctx) - y
    pairs = [(weight.numpy(), bias.numpy()) for weight, bias in (key, value)]
    positions = [] if of_gpt2 else [table[0].numpy() for table in tables.values()]
    change = oracle.attend(queries[0, :, :8].numpy(), prompt[0].numpy(), gate.item(), *pairs, 4, *positions)
    change = change if of_gpt2 else change @ output[0].numpy().T + output[1].numpy()
    assert_close(found[0], torch.from_numpy(change))


def test_trains_with_pefts_gradients(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, _, folder = made("llama", tmp_path_factory)
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True).train()
    compiled = lorac.compile(copy.deepcopy(model), {"a": folder}).train()
    compiled.swap("a")
    for each in (wrapped, compiled):
        each(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {name: p.grad for name, p in wrapped.named_parameters() if "adaption_" in name}
    for path, tensors in compiled.adapters["a"].tensors.items():
        for name, tensor in tensors.items():
            [expected] = [grad for key, grad in theirs.items() if key.endswith(f"{path.rpartition('.')[0]}.{name}")]
            assert_close(tensor.grad, expected.reshape(tensor.shape))


@torch.no_grad()
def test_starts_as_the_base_and_reads_its_fields_from_the_model() -> None:
    model = llama()
    variant = AdaptionPrompt.of(model, adapter_len=4)
    assert variant.targets == ("model.layers.1.self_attn.o_proj",)
    assert (variant.num_attention_heads, variant.rotary) == (4, "model.rotary_emb")
    compiled = lorac.compile(copy.deepcopy(model), {"a": variant})
    assert torch.equal(compiled(input_ids=IDS, adapters="a").logits, model(input_ids=IDS).logits)
    with refuses("site_unsupported", match="BertModel has 0 places for adaption prompts, and adapter_layers=1"):
        AdaptionPrompt.of(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)))
    with refuses("site_unsupported", match="LlamaForCausalLM has 2 places for adaption prompts, and adapter_layers=3"):
        AdaptionPrompt.of(model, adapter_layers=3)
    with refuses("site_unsupported", match=r"q_proj' is not the output projection"):
        lorac.compile(copy.deepcopy(model), {"a": dataclasses.replace(variant, targets=("q_proj",))})


@torch.no_grad()
def test_files_go_back_through_peft(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, wrapped, folder = made("gpt2", tmp_path_factory)
    adapter = lorac.load_adapter(folder, model)
    lorac.save_adapter(adapter, tmp_path / "own.safetensors", "native", model=model)
    own = lorac.load_adapter(tmp_path / "own.safetensors", model)
    for number, each in enumerate((adapter, dataclasses.replace(own, provenance={}))):
        lorac.save_adapter(each, tmp_path / str(number), model=model)
        assert torch.equal(logits(load_peft(model, tmp_path / str(number)), IDS), logits(wrapped, IDS))
    with refuses("base_needed", match="ADAPTION_PROMPT. does not tell where"):
        lorac.load_adapter(folder)
    with refuses("unused_tensors", match=r"ADAPTION_PROMPT has .*h\.3\.attn\.adaption_gate"):
        lorac.load_adapter(
            folder, transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4))
        )
