"""Branches that attend, in growing sequences: their keys and values are cached, in eager and over a cache."""

import copy
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import lorac
from lorac import Site, SiteKind
from lorac.testing import assert_close
from tests.emitted import read_emitted
from tests.limits import assert_apart
from tests.variants.test_qst import IDS, away, masked, method, model

ASKED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@functools.cache
def growing(target: str, **options: Any) -> Any:
    return lorac.compile(model(), [away(), masked()], target=target, active=None, **options)


@functools.cache
@torch.no_grad()
def alone(choice: str | None, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row's new tokens and their logits, each from a pass over the whole sequence."""
    ids, found = IDS[row : row + 1, :5][LEFT[row : row + 1].bool()][None], []
    for _ in range(ASKED["max_new_tokens"]):
        told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        found.append(growing("eager")(**told, adapters=choice).logits[0, -1])
        ids = torch.cat([ids, found[-1].argmax()[None, None]], 1)
    return ids[0, -len(found) :], torch.stack(found)


@pytest.mark.medium("eager", cases=["onnxruntime-*"])
@pytest.mark.parametrize("choice", ["masked", None, ["masked", None]], ids=str)
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_cached_rows_match_uncached_generation(target: str, choice: Any) -> None:
    compiled = growing("eager") if target == "eager" else growing(target, cache=True)
    told = {**ASKED, "attention_mask": LEFT, "output_logits": True, "return_dict_in_generate": True}
    found = compiled.generate(IDS[:, :5], adapters=choice, **told)
    for row in (0, 1):
        tokens, logits = alone(choice[row] if isinstance(choice, list) else choice, row)
        assert torch.equal(found.sequences[row, 5:], tokens)
        assert_close(torch.stack([step[row] for step in found.logits]), logits)


@torch.no_grad()
def test_passes_a_mask_of_ones_to_the_side_network() -> None:
    """transformers leaves such a mask out of its calls."""
    told = {**ASKED, "output_logits": True, "return_dict_in_generate": True}
    found = growing("eager").generate(IDS[1:, :5], adapters="masked", **told)
    tokens, logits = alone("masked", 1)
    assert torch.equal(found.sequences[0, 5:], tokens)
    assert_close(torch.cat(found.logits), logits)
    assert not growing("eager").get_submodule("host")._forward_pre_hooks


LATE = pytest.mark.slow
NARROW = [
    ("eager", torch.float16, None),
    pytest.param("onnxruntime", torch.float16, "int4", marks=LATE),
    pytest.param("onnxruntime", torch.float16, None, marks=LATE),
    pytest.param("onnxruntime", torch.float32, "int4", marks=LATE),
]


@pytest.mark.parametrize(("target", "dtype", "weights"), NARROW, ids=str)
@pytest.mark.filterwarnings("ignore:onnxruntime has no kernels for float16:lorac.LoracWarning")
@torch.no_grad()
def test_half_precision_and_quantised_models_match_uncached_generation(
    target: str, dtype: torch.dtype, weights: str | None
) -> None:
    host, options = copy.deepcopy(model()).to(dtype), {"cache": True} if target == "onnxruntime" else {}
    options |= {} if weights is None else {"weights": weights}
    compiled = lorac.compile(host, [masked()], target=target, **options)
    told = {**ASKED, "attention_mask": LEFT, "output_logits": True, "return_dict_in_generate": True}
    found = compiled.generate(IDS[:, :5], **told)
    computes = dtype if target == "eager" else torch.float32
    for row in (0, 1):
        ids = IDS[row, :5][LEFT[row].bool()]
        whole = torch.cat([ids, found.sequences[row, 5:-1]])[None]
        again = compiled(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, len(ids) - 1 :]
        assert_close(torch.stack([step[row] for step in found.logits]).to(computes), again.to(computes))
    off = compiled.generate(IDS[:, :5], adapters=None, **told)
    assert_apart(torch.stack(off.logits), torch.stack(found.logits))


@torch.no_grad()
def test_eager_computes_the_side_network_of_new_tokens_alone() -> None:
    lengths, compiled = [], growing("eager")
    layer = compiled.get_submodule("host.model.layers.0")
    held = layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    compiled.generate(IDS[:1, :5], adapters="adapter", **ASKED)
    held.remove()
    assert lengths == [5, 1, 1, 1, 1, 1]


@torch.no_grad()
def test_beams_prefixes_and_drafts_have_the_side_networks_keys_follow() -> None:
    compiled, eager, row = growing("onnxruntime", cache=True), growing("eager"), IDS[1:, :5]
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"draft": None}, {"prefill_chunk_size": 2}):
        found = compiled.generate(row, adapters="adapter", **ASKED, **more)
        assert torch.equal(found, eager.generate(row, adapters="adapter", **ASKED, **more))
    cache = lorac.PromptCache()
    for name, length in (("adapter", 4), ("adapter", 5), ("masked", 5)):
        found = compiled.generate(IDS[1:, :length], adapters=name, prompt_cache=cache, **ASKED)
        assert torch.equal(found, compiled.generate(IDS[1:, :length], adapters=name, **ASKED))


def test_a_side_network_that_is_off_neither_runs_nor_writes_into_its_cache() -> None:
    graph = read_emitted(growing("onnxruntime", cache=True))[0].graph
    gated = [branch.g for node in graph.node if node.op_type == "If" for branch in node.attribute]
    counts = [sum(node.op_type == "GroupQueryAttention" for node in inner.node) for inner in (graph, *gated)]
    assert sorted(counts) == [0, 0, 2, 2, 2], "those of the host's layers, and where they are on those of two networks"


@torch.no_grad()
def test_rejects_a_cache_that_knows_nothing_of_the_side_network() -> None:
    compiled, row = growing("eager"), IDS[:1, :5]
    filled = compiled(input_ids=row, use_cache=True, adapters=None).cache
    with pytest.raises(lorac.Unavailable, match=r"has 5 tokens, and the branch at 'model.norm:0' has 0"):
        compiled(input_ids=row, cache=filled, adapters="adapter")
    with pytest.raises(lorac.Unavailable, match="StaticCache cannot hold"):
        compiled.generate(row, adapters="adapter", cache_implementation="static", **ASKED)


@pytest.mark.medium("test_rejects_a_cache_for_a_branch_that_mixes_tokens")
@torch.no_grad()
def test_rejects_a_cache_for_a_branch_that_reads_later_tokens() -> None:
    both = lorac.Adapter("both", method(causal=False), away().tensors)
    compiled, row = lorac.compile(model(), [both]), IDS[:1, :4]
    told = compiled.generate(row, output_logits=True, return_dict_in_generate=True, **ASKED)
    for n, logits in enumerate(told.logits):
        whole = compiled(input_ids=told.sequences[:, : 4 + n], use_cache=False).logits[:, -1]
        assert_close(logits, whole)
    with pytest.raises(lorac.Unavailable, match=r"'model\.norm:0' is not causal"):
        lorac.compile(model(), [both], target="onnxruntime", cache=True)


def test_rejects_a_cache_for_a_branch_that_mixes_tokens() -> None:
    with pytest.raises(lorac.Unavailable, match=r"meanders at 'model\.norm' mixes tokens by itself"):
        lorac.compile(model(), {"m": Meanders(targets=["model.norm"])}, target="onnxruntime", cache=True)


@dataclass(frozen=True, kw_only=True)
class Meanders(lorac.BranchVariant):
    """Adds to every token a part of the one before it."""

    name: ClassVar[str] = "meanders"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.BLOCK})
    mixes_tokens: ClassVar[bool] = True

    def params(self, site: Site) -> dict[str, lorac.ParamSpec]:
        return {"u": lorac.ParamSpec((site.out_features,), lambda context: torch.zeros(context.shape))}

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Any, ctx: Any) -> torch.Tensor:
        return y + y.cumsum(-2) * p.u
