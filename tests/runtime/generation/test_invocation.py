"""LoRAs with invocation tokens (PEFT's aLoRA) act from their last occurrence in a prompt on, as PEFT's do."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.invocation import find_start
from lorac.target.kv_cache import DecodeStep
from lorac.testing import assert_close
from tests.peft_files import quiet
from tests.refusing import refuses
from tests.runtime.generation.texts import FAMILIES, SIZES, padded, prompts
from tests.zoo import ZOO

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
TOKENS = [7, 8]
WIDTH = 14
TARGETS = ("eager", "onnxruntime")
MEDIUM = pytest.mark.medium("a third family")


def wrapped(family: str, tokens: Any = TOKENS, **settings: Any) -> Any:
    """Return PEFT's model with an aLoRA away from its start."""
    import peft
    import transformers

    name, sizes, targets = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    told = {"r": 4, "target_modules": targets, "fan_in_fan_out": name == "GPT2", "init_lora_weights": False}
    told |= {"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(model, peft.LoraConfig(**{**told, **settings})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return made


@functools.cache
def model(family: str) -> Any:
    return wrapped(family)


@functools.cache
def base_model() -> Any:
    """Return llama without an adapter; tests leave it unchanged."""
    return wrapped("llama", None).unload()


def rows() -> list[Tensor]:
    """Return prompts with the tokens twice, once, at the beginning, and nowhere."""
    made = [row.clamp(min=10) for row in prompts(4, (WIDTH, 9, 12, 11))]
    for row, places in zip(made, ((4, 9), (5,), (0,), ()), strict=True):
        for place in places:
            row[place : place + 2] = torch.tensor(TOKENS)
    return made


@functools.cache
def expected(family: str) -> Tensor:
    """Return PEFT's tokens, which differ from the base's where the adapter acts."""
    peft, batch = model(family), padded(rows(), "left")
    found = peft.generate(**batch, **GREEDY)
    with peft.disable_adapter():
        base = peft.generate(**batch, **GREEDY)
    assert [torch.equal(*pair) for pair in zip(found, base, strict=True)] == [False, False, False, True]
    return found[:, WIDTH:]


@functools.cache
def compiled(family: str, target: str) -> Any:
    options: dict[str, Any] = {"cache": True, "self_test": False} if target == "onnxruntime" else {}
    return lorac.compile(copy.deepcopy(model(family)), target=target, **options)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of tokens of rows that calls of the engine compute."""
    counts: list[int] = []
    decode = OrtProgram.decode

    def record(self: OrtProgram, graph: str, cache: Any, step: Any) -> Tensor:
        counts.append(max(step.counts))
        return decode(self, graph, cache, step)

    monkeypatch.setattr(OrtProgram, "decode", record)
    return counts


def test_finds_the_last_occurrence_as_peft_does() -> None:
    from peft import LoraConfig
    from peft.tuners.lora.variants import calculate_alora_offsets

    for row in ([0, 1, 2, 3], [0, 4, 5, 6], [1, 2, 1, 2], [1, 2, 1], [1, 1, 2], [2]):
        for tokens in ([1, 2], [1], [1, 1], [1, 2, 1, 2]):
            config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
            (offset,) = calculate_alora_offsets({"a": config}, "a", torch.tensor([row]))
            assert find_start(torch.tensor(row), tokens) == (None if offset is None else len(row) - offset)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("mistral", marks=MEDIUM)])
def test_generates_as_peft(family: str, target: str) -> None:
    made, wanted = compiled(family, target), expected(family)
    for side in ("left", "right"):
        assert torch.equal(made.generate(**padded(rows(), side), **GREEDY)[:, WIDTH:], wanted)
    alone = [made.generate(row[None], **GREEDY)[0, len(row) :] for row in rows()]
    assert torch.equal(torch.stack(alone), wanted)
    for options in ({"prefill_chunk_size": 3}, {"draft": None}):
        assert torch.equal(made.generate(**padded(rows(), "left"), **GREEDY, **options)[:, WIDTH:], wanted), options
    base = made.generate(**padded(rows(), "left"), **GREEDY, adapters=None)[:, WIDTH:]
    assert not torch.equal(base, wanted)


def test_beams_and_draws_have_the_tokens_of_their_row() -> None:
    """PEFT refuses beams with an aLoRA, so that targets are compared with each other."""
    batch = padded(rows(), "left")
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        found = [compiled("llama", one).generate(**batch, **{**GREEDY, **options}, seed=3) for one in TARGETS]
        assert torch.equal(*found), options
        assert found[0].shape[0] == 8
        assert not torch.equal(found[0], compiled("llama", "eager").generate(**batch, **GREEDY, adapters=None))


def test_computes_whole_sequences_as_peft() -> None:
    peft, made, batch = model("llama"), compiled("llama", "eager"), padded(rows(), "left")
    with torch.no_grad():
        assert torch.equal(made(**batch).logits, peft(**batch).logits)
        right = padded(rows(), "right")
        for row, count in zip(made(**right).logits, right["attention_mask"].sum(1), strict=True):
            assert not row[:count].isnan().any()
        assert torch.equal(made(**right).logits, peft(**right).logits)


def test_trains_as_peft() -> None:
    """Gradients, and random numbers of dropout, which PEFT draws for the tokens alone on which the adapter acts."""
    peft = wrapped("llama", lora_dropout=0.3)
    made = lorac.compile(copy.deepcopy(peft)).train()
    peft.train()
    batch = padded(rows(), "right")
    grads = []
    for one in (peft, made):
        torch.manual_seed(1)
        one(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for n, p in one.named_parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert any(grad.any() for grad in grads[0])


@functools.cache
def eight(target: str) -> tuple[Any, list[Tensor]]:
    """Return a model with eight aLoRAs and a LoRA, and a prompt for each of these with its own tokens elsewhere."""
    from lorac.testing import adapter_away
    from tests.decoders import DECODERS, IDS

    host = DECODERS["llama"]()
    variants = {f"a{i}": lorac.LoRA(r=2 + i % 2, targets=["q_proj", "down_proj"]) for i in range(9)}
    made = [adapter_away(variant, host, IDS, name=name, seed=i) for i, (name, variant) in enumerate(variants.items())]
    for i, one in enumerate(made[:8]):
        one.variant = lorac.LoRA(r=2 + i % 2, targets=["q_proj", "down_proj"], invocation_tokens=[3 + i, 11])
    texts = [torch.arange(12, 24) % 32 for _ in range(9)]
    for i, row in enumerate(texts[:8]):
        row[i + 1 : i + 3] = torch.tensor([3 + i, 11])
    options: dict[str, Any] = {"cache": True, "self_test": False} if target == "onnxruntime" else {}
    return lorac.compile(host, made, target=target, **options), texts


@functools.cache
def eight_alone(target: str) -> list[Tensor]:
    """Return what each of these writes by itself."""
    made, texts = eight(target)
    return [
        made.generate(row[None], **GREEDY, adapters=name)[0] for row, name in zip(texts, made.adapters, strict=True)
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_eight_rows_have_eight_adapters_in_one_call(target: str, fed: list[int]) -> None:
    made, texts = eight(target)
    alone = eight_alone(target)
    assert len({tuple(row[12:].tolist()) for row in alone}) > 5
    fed.clear()
    assert torch.equal(made.generate(torch.stack(texts), **GREEDY, adapters=[*made.adapters]), torch.stack(alone))
    if target == "onnxruntime":  # the tokens of all rows before their invocations, those behind them, and nine steps
        assert len(fed) == 2 + 9 and fed[2:] == [1] * 9


def test_a_scheduler_runs_eight_rows_with_eight_adapters_in_one_call(fed: list[int]) -> None:
    made, texts = eight("onnxruntime")
    wanted = [row[12:].tolist() for row in eight_alone("onnxruntime")]
    fed.clear()
    with lorac.Scheduler(made, rows=9) as scheduler:
        requests = [
            lorac.TextRequest(row, name, options=GREEDY) for row, name in zip(texts, made.adapters, strict=True)
        ]
        streams = scheduler.submit_all(requests)
        assert [[token.id for token in stream] for stream in streams] == wanted
    assert fed[-9:] == [1] * 9  # all rows together
    assert len(fed) < 8 * 9  # the steps of one request at a time


def test_mixes_loras_with_and_without_tokens_in_one_row() -> None:
    mixture = {"a8": 0.5, "a0": 1.0, "a3": 0.7}
    row = torch.arange(12, 24) % 32
    row[2:4], row[7:9] = torch.tensor([6, 11]), torch.tensor([3, 11])
    found = [eight(target)[0].generate(row[None], **GREEDY, adapters=mixture) for target in TARGETS]
    assert torch.equal(*found)
    assert not torch.equal(found[0], eight("eager")[0].generate(row[None], **GREEDY, adapters="a8"))


def test_reuses_the_prompt_of_the_base(fed: list[int]) -> None:
    made, wanted = compiled("llama", "onnxruntime"), expected("llama")
    row, cache = rows()[0], lorac.PromptCache()
    made.generate(row[None, :8], **{**GREEDY, "max_new_tokens": 1}, adapters=None, prompt_cache=cache)
    fed.clear()
    for _ in range(2):
        found = made.generate(row[None], **GREEDY, prompt_cache=cache)
        assert torch.equal(found[0, WIDTH:], wanted[0])
    # The base read 8 of the 9 tokens before the invocation; then all 9 are known.
    assert [count for count in fed if count > 1] == [WIDTH - 9, WIDTH - 9]
    assert len(fed) == 1 + 2 * 10
    with_base = made.generate(row[None], **GREEDY, adapters=None)
    assert torch.equal(made.generate(row[None], **GREEDY, adapters=None, prompt_cache=cache), with_base)
    # The base has read the invocation, too, whose keys and values are not the adapter's.
    assert torch.equal(made.generate(row[None], **GREEDY, prompt_cache=cache)[0, WIDTH:], wanted[0])


def test_one_step_gives_the_logits_of_tokens_on_both_sides_of_the_invocation() -> None:
    made, row = compiled("llama", "onnxruntime"), rows()[0][None]
    cache, every = made.engine.new_cache(MAIN_GRAPH, 1, WIDTH), torch.arange(WIDTH)[None]
    step = DecodeStep(ids=row, counts=[WIDTH], wanted=every)
    found = made.switch.with_choice(
        "default", lambda bound, _: bound.for_prompts(row, None).decode(MAIN_GRAPH, cache, step)
    )
    with torch.no_grad():
        assert_close(found, compiled("llama", "eager")(input_ids=row).logits)


def test_later_prompts_find_the_tokens_of_earlier_ones_before_their_last_invocation() -> None:
    made, cache = compiled("llama", "onnxruntime"), lorac.PromptCache()
    turn = rows()[0]
    for _ in range(3):
        answer = made.generate(turn[None], **GREEDY, prompt_cache=cache)
        assert torch.equal(answer, made.generate(turn[None], **GREEDY))
        turn = torch.cat([answer[0], torch.tensor([20, 7, 8, 21])])


def test_a_scheduler_reads_the_bases_prompt_once(fed: list[int]) -> None:
    made, wanted = compiled("llama", "onnxruntime"), expected("llama")
    with lorac.Scheduler(made, rows=3, chunk=4) as scheduler:
        for _ in range(2):
            streams = [scheduler.submit(lorac.TextRequest(row, options=GREEDY)) for row in rows()]
            assert [[token.id for token in stream] for stream in streams] == wanted.tolist()
        whole = [*rows()[0][:9], *range(30, 60)]
        list(scheduler.submit(lorac.TextRequest(torch.tensor(whole), None, options=GREEDY)))
        fed.clear()
        longer = torch.tensor([*whole, *TOKENS])
        found = [token.id for token in scheduler.submit(lorac.TextRequest(longer, options=GREEDY))]
        assert max(fed) == 2
    assert found == made.generate(longer[None], **GREEDY)[0, len(longer) :].tolist()


def test_looks_for_the_tokens_in_the_prompt_of_an_interrupted_request() -> None:
    """A drawn token may complete the invocation tokens, which are those of the prompt alone."""
    made, row = compiled("llama", "onnxruntime"), rows()[1]
    with lorac.Scheduler(made, rows=2) as scheduler:
        text = torch.cat([row, torch.tensor(TOKENS)])
        first = [t.id for t in scheduler.submit(lorac.TextRequest(text, drawn=2, options=GREEDY))]
    whole = made.generate(text[None], **GREEDY)[0, len(text) :]
    assert first != whole[: len(first)].tolist()


def test_rejects_calls_without_the_whole_prompt() -> None:
    made, batch = compiled("llama", "eager"), padded(rows(), "left")
    looks = "acts from its invocation tokens on, and this call does not look for these"
    with torch.no_grad():
        embeds = made.host.get_input_embeddings()(batch["input_ids"])
        with refuses("unavailable", match=looks):
            made(inputs_embeds=embeds)
        out = made(**batch, adapters=None, use_cache=True)
        with refuses("unavailable", match=looks):
            made(input_ids=batch["input_ids"][:, -1:], past_key_values=out.past_key_values)
        with refuses("unavailable", match=looks):
            made.host.model.layers[0].self_attn.q_proj(embeds)
    with refuses("unavailable", match=looks):
        compiled("llama", "onnxruntime")(**batch)


@pytest.mark.parametrize("target", TARGETS)
def test_rejects_decoders_with_an_encoder(target: str) -> None:
    options: dict[str, Any] = {"cache": True, "self_test": False} if target == "onnxruntime" else {}
    made = lorac.compile(
        ZOO["tiny_t5"].fresh(), lorac.LoRA(targets=["q"], invocation_tokens=[5]), target=target, **options
    )
    with refuses("unavailable", match="acts from its invocation tokens on"):
        made.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_fused_and_baked_weights(mode: str) -> None:
    with refuses("not_mergeable", match=f"the weights of mode='{mode}' act on every token"):
        lorac.compile(copy.deepcopy(model("llama")), mode=mode)


def test_rejects_to_merge(tmp_path: Path) -> None:
    made = compiled("llama", "eager")
    adapter = made.adapters["default"]
    other = copy.copy(adapter)
    other.name = "other"
    with refuses("not_mergeable"):
        lorac.merge([adapter, other])
    with refuses("not_mergeable"):
        lorac.merge_into(base_model(), [adapter])
    with refuses("unavailable", match="does not look for these"):
        compiled("llama", "onnxruntime").save_choice(tmp_path / "one.onnx_adapter", "default")
    with refuses("unsupported_field", match="which the format 'mlx' cannot store"):
        lorac.save_adapter(adapter, tmp_path / "mlx", "mlx")
    assert not list(tmp_path.iterdir())
    assert lorac.to_lora(adapter).variant.invocation_tokens == (7, 8)


def test_rejects_replaced_tensors_and_parts_with_tokens() -> None:
    host = base_model()
    with refuses("site_unsupported", match="adapts only linear layers"):
        lorac.compile(host, lorac.LoRA(targets=["embed_tokens"], invocation_tokens=[7]))
    with refuses("unsupported_field", match="and 'lm_head.weight' of it acts on every token"):
        lorac.compile(host, lorac.LoRA(targets=["q_proj"], modules_to_save=["lm_head"], invocation_tokens=[7]))
    chain = lorac.Chain(parts=[lorac.LoRA(invocation_tokens=[7]), lorac.LoRA()], targets=["q_proj"])
    with refuses("unsupported_field", match="and 'chain' of it acts on every token"):
        lorac.compile(host, chain)


def test_files_hold_the_tokens(tmp_path: Path) -> None:
    from peft import PeftModel

    peft, batch = model("llama"), padded(rows(), "left")
    with quiet():
        peft.save_pretrained(tmp_path / "theirs")
    adapter = lorac.load_adapter(tmp_path / "theirs")
    assert adapter.variant.invocation_tokens == (7, 8)
    lorac.save_adapter(adapter, tmp_path / "ours")
    lorac.save_adapter(adapter, tmp_path / "own.safetensors", "native")
    with torch.no_grad(), quiet():
        back = PeftModel.from_pretrained(copy.deepcopy(base_model()), tmp_path / "ours").eval()
        assert torch.equal(back(**batch).logits, peft(**batch).logits)
    assert lorac.load_adapter(tmp_path / "own.safetensors").variant == adapter.variant


def test_a_saved_model_keeps_the_tokens(tmp_path: Path) -> None:
    with pytest.warns(lorac.LoracWarning, match="saved for lorac alone"):
        compiled("llama", "onnxruntime").save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved")
    assert torch.equal(loaded.generate(**padded(rows(), "left"), **GREEDY)[:, WIDTH:], expected("llama"))


def test_registered_adapters_of_one_shape_have_their_own_tokens(tmp_path: Path) -> None:
    made = compiled("llama", "onnxruntime")
    adapter = made.adapters["default"]
    for name, tokens in (("x", (7, 8)), ("y", (9, 8)), ("z", ())):
        other = lorac.Adapter(name, lorac.LoRA(**{**adapter.variant.settings, "invocation_tokens": tokens}))
        other.tensors = adapter.tensors
        lorac.save_adapter(other, tmp_path / name, model=base_model())
    fresh = lorac.compile(copy.deepcopy(model("llama")), target="onnxruntime", cache=True, self_test=False)
    fresh.register(tmp_path)
    batch = padded(rows(), "left")
    outputs = {name: fresh.generate(**batch, **GREEDY, adapters=name)[:, WIDTH:] for name in ("x", "y", "z")}
    assert torch.equal(outputs["x"], expected("llama"))
    assert torch.equal(outputs["y"], fresh.generate(**batch, **GREEDY, adapters=None)[:, WIDTH:])
    assert not torch.equal(outputs["z"], outputs["x"])
