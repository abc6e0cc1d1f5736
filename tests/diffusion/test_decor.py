"""DECOR: its paper's formula by hand, its effect on a text encoder's rows, and its three places on all targets."""

import functools
import types
from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac.diffusion import decor
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, assert_close, conformance
from tests.diffusion.texts import make_tokenizer
from tests.image_files import WIDTH, make_pair
from tests.limits import assert_apart, assert_vanishes, decimals
from tests.oracles import decor as branch_oracle
from tests.oracles import decor_weight as weight_oracle
from tests.parity import assert_parity
from tests.refusing import refuses

_DRAWN = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 64, (2, 9), generator=_DRAWN)
X = torch.randn(2, 9, 16, generator=_DRAWN, dtype=torch.float64)
UNWANTED = torch.randn(3, 16, generator=_DRAWN, dtype=torch.float64)
ALL = torch.ones(9)
"""All rows, so that the paper's equations hold for the first one too."""
LATENTS, TIME = torch.randn(2, 4, 16, 16, generator=_DRAWN), torch.tensor(400)
SPAN = decor.unwanted_span(UNWANTED)
TARGETS = ("eager", pytest.param("onnxruntime", marks=pytest.mark.slow))
"""Branches with buffers, and chains, are emitted for other methods before."""


# ── The formula ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_worked_example():
    x = torch.tensor([[1.0, 1, 0], [0, 2, 1]], dtype=torch.float64)
    span = decor.unwanted_span(torch.tensor([[0.0, 1, 0]], dtype=torch.float64))
    assert decor.project(x, span, rows=torch.ones(2)).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert decor.project(x, span, 0.5, rows=torch.ones(2)).tolist() == [[1, 0.5, 0], [0, 1, 1]]


def test_a_strength_of_zero_leaves_every_bit():
    assert torch.equal(decor.project(X, SPAN, 0.0, rows=ALL), X)


def test_projecting_is_idempotent_and_removes_unwanted_rows():
    projector = SPAN @ SPAN.mT
    assert_close(projector @ projector, projector)
    assert_close(projector, projector.mT)
    assert decimals(projector.trace(), 9) == [3]
    assert_vanishes(decor.project(X, SPAN, rows=ALL) @ UNWANTED.mT, X @ UNWANTED.mT)


def test_twice_is_once_and_half_twice_is_three_quarters():
    once = functools.partial(decor.project, span=SPAN, rows=ALL)
    assert_close(once(once(X)), once(X))
    assert_close(once(once(X, alpha=0.5), alpha=0.5), once(X, alpha=0.75))


def test_only_the_span_of_the_unwanted_rows_counts():
    several = torch.cat([3 * UNWANTED, UNWANTED[:1], UNWANTED[:2] @ torch.eye(16, dtype=torch.float64)])
    assert decor.unwanted_span(several).shape == (16, 3)
    assert_close(decor.project(X, decor.unwanted_span(several)), decor.project(X, SPAN))
    padded = torch.cat([SPAN, torch.zeros(16, 4)], dim=1)
    assert_close(decor.project(X, padded), decor.project(X, SPAN))


def test_keeps_orthogonal_rows_and_removes_spanned_ones():
    free = decor.project(X, SPAN, rows=ALL)
    assert_close(decor.project(free, SPAN, rows=ALL), free)
    own = X[0, :4]
    assert_vanishes(decor.project(own, decor.unwanted_span(own), rows=ALL[:4]), own)


def test_limits_the_rank_of_the_span():
    assert decor.unwanted_span(X, max_rank=4).shape == (16, 4)
    assert decor.unwanted_span(X[:0]).shape == (16, 0)
    with refuses("choice_error", match="alpha=1.5"):
        decor.project(X, SPAN, 1.5)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def pair():
    return make_pair()


def encoded(ids):
    with torch.no_grad():
        return pair()["text_encoder"](input_ids=ids).last_hidden_state


def test_only_later_rows_depend_on_a_word():
    """An unwanted word at place 4 leaves a copy of itself in the rows behind it, unless these are projected too."""
    other = IDS.clone()
    other[:, 4] += 1
    before, after = encoded(IDS), encoded(other)
    assert torch.equal(before[:, 0], after[:, 0])
    trace = (after - before)[0]
    span = decor.unwanted_span(trace[6:])
    words = torch.arange(9) == 4
    kept = decor.project(trace, span, rows=words)
    assert torch.equal(kept[6:], trace[6:]) and bool(trace[6:].any())
    assert_vanishes(decor.project(trace, span)[6:], trace[6:])


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_finds_words_and_padding_by_the_tokenizers_masks(tmp_path, pad):
    rows = decor.find_rows(make_tokenizer(tmp_path, pad=pad, length=8), ["a cat", ""])
    assert rows.words.int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [0] * 8]
    assert rows.padding.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, *[1] * 7]]
    assert rows.select("words+padding")[0].int().tolist() == [0, *[1] * 7]
    with refuses("choice_error", match="no rows 'all'"):
        rows.select("all")


def test_contexts_are_mixed():
    assert torch.equal(decor.mix(X, 3 * X), 2 * X)
    assert decor.mix(X, X, how="concat").shape == (2, 18, 16)
    with refuses("choice_error"):
        decor.mix(X, X, how="sum")


# ── Places ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["formula", "modes", "strength", "rules"])
def test_the_merged_form_conforms(kind):
    """The kit's checks that need no trained tensor pass."""
    checks = conformance(lorac.DECORWeight(r=3), weight_oracle, targets=(), hosts={"linear": HOSTS["linear"]})
    next(check for check in checks if str(check).endswith(kind))()


def test_the_branch_is_the_oracle():
    p = SimpleNamespace(span=SPAN, rows=torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.float64))
    found = lorac.DECOR(r=3, tokens=10).branch(X, X, p, None)
    given = types.SimpleNamespace(span=p.span.numpy(), rows=p.rows.numpy())
    assert_close(found, torch.from_numpy(branch_oracle.branch(X.numpy(), X.numpy(), given, None)))


@functools.cache
def span_of_words():
    """Of embeddings that share no more with the prompts' own than chance has it: CLIP's fresh ones are much alike."""
    return decor.unwanted_span(UNWANTED[:2].float())


@functools.cache
def at_encoder(target):
    adapter = decor.at_text_encoder(pair()["text_encoder"], span_of_words(), capacity=3)
    return lorac.compile(pair()["text_encoder"], {"decor": adapter}, target=target, example_inputs={"input_ids": IDS})


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_at_the_text_encoder(target):
    compiled, base = at_encoder(target), encoded(IDS)
    found = compiled(input_ids=IDS).last_hidden_state
    assert_parity(found, decor.project(base, span_of_words()), base)
    half = compiled(input_ids=IDS, adapters={"decor": 0.5}).last_hidden_state
    assert_parity(half, decor.project(base, span_of_words(), 0.5), base)
    assert torch.equal(compiled(input_ids=IDS, adapters=None).last_hidden_state[:, :1], found[:, :1])
    if target == "eager":
        assert torch.equal(compiled(input_ids=IDS, adapters=None).last_hidden_state, base)


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_another_span_is_written_between_calls(target):
    compiled, base = at_encoder(target), encoded(IDS)[:, :6]
    other, rows = decor.unwanted_span(UNWANTED.float()), torch.tensor([0, 0, 1, 1, 0, 1])
    decor.write(compiled.adapters["decor"], other, 0.7, rows=rows)
    assert_parity(compiled(input_ids=IDS[:, :6]).last_hidden_state, decor.project(base, other, 0.7, rows=rows), base)
    decor.write(compiled.adapters["decor"], span_of_words())
    with refuses("choice_error", match=r"has 4 columns, and 'decor' was made for 3"):
        decor.write(compiled.adapters["decor"], torch.zeros(WIDTH, 4))


@functools.cache
def lora():
    made = lorac.compile(pair()["unet"], {"lora": lorac.LoRA(r=2, targets=["attn2.to_k", "attn2.to_q"])}).adapters[
        "lora"
    ]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return made


@functools.cache
@torch.no_grad()
def projected_outputs():
    """The U-Net with the LoRA, on projected embeddings and on plain ones."""
    alone, context = lorac.compile(pair()["unet"], {"lora": lora()}), encoded(IDS)
    return [
        alone(LATENTS, TIME, given).sample for given in (decor.project(context, span_of_words(), rows=ALL), context)
    ]


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_a_chain_is_the_lora_on_projected_embeddings(target):
    unet, inputs = pair()["unet"], (LATENTS, TIME, encoded(IDS))
    chained = decor.chain_after(lora(), span_of_words(), unet, name="both")
    compiled = lorac.compile(unet, {"both": chained}, target=target, example_inputs=inputs)
    wanted, base = projected_outputs()
    assert_parity(compiled(*inputs).sample, wanted, base)


@torch.no_grad()
def test_a_sum_is_not():
    summed = lorac.compile(
        pair()["unet"], {"lora": lora(), "decor": decor.at_cross_attention(pair()["unet"], span_of_words())}
    )
    summed.swap({"lora": 1.0, "decor": 1.0})
    assert_apart(summed(LATENTS, TIME, encoded(IDS)).sample, projected_outputs()[0])


def test_the_merged_form_is_low_rank():
    found = lorac.factors(decor.at_cross_attention(pair()["unet"], span_of_words(), 0.5), pair()["unet"])
    assert {path.rpartition(".")[2] for path in found} == {"to_k", "to_v"}
    assert all(isinstance(change, LowRank) and change.rank == 2 for change in found.values())


def test_rejects_spans_and_models_that_do_not_fit():
    with refuses("site_not_found", match="names 0 modules of CLIPTextModel"):
        decor.at_text_encoder(pair()["text_encoder"], SPAN, targets=["ln_f"])
    with refuses("site_unsupported", match="reads 16 features, and the span has embeddings of 5"):
        decor.at_cross_attention(pair()["unet"], torch.zeros(5, 1))
    with refuses("choice_error", match="config does not say how long a prompt may be"):
        decor.at_text_encoder(torch.nn.ModuleDict({"final_layer_norm": torch.nn.LayerNorm(16)}), SPAN)
