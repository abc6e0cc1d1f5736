"""The cache pass: a sequence in parts, different for each row, gets the answer of the whole sequence."""

import functools

import pytest
import torch

import lorac
from lorac import Unavailable
from lorac.frontend.capture.attention_interface import AttentionInterface
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.host import Host
from lorac.frontend.site_discovery import find_sites
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph.attention_ops import IDS, LOGITS_TO_KEEP, NEW_LENGTHS, PAST_LENGTHS, present_name
from lorac.ir.graph.feeds import cache_input_shapes, make_empty_cache
from lorac.ir.graph.interpreter import run_graph
from lorac.ir.graph.passes import run_pipeline
from lorac.passes.cache_attention import CacheAttention
from lorac.passes.pipelines import lowering_passes
from lorac.testing import assert_close
from tests.decoders import DECODERS, VOCABULARY
from tests.refusing import refuses

COUNTS = ([4, 2], [1, 3], [0, 4], [4, 0], [1, 1])
"""How many tokens each of two rows brings, call by call: ragged, idle, one at a time."""


def grown(model):
    graph = capture_graph("main", Host.of(model), None, None, sites=find_sites(model), plans={}, grows=True)
    run_pipeline(graph, lowering_passes())
    return graph


def room(graph, rows):
    """An empty cache, and the lengths of rows whose tokens fill it."""
    return make_empty_cache(cache_input_shapes(graph), torch.zeros(rows, 12))


@functools.cache
def grown_llama():
    return grown(DECODERS["llama"]())


def parts(ids, past, counts):
    """The next tokens of each row, padded on the right with other ids."""
    part = torch.full((len(counts), max(counts)), 5)
    for row, count in enumerate(counts):
        part[row, :count] = ids[row, past[row] : past[row] + count]
    return part


@pytest.mark.medium("a Llama's and a short convolution's", cases=["deepseek_v3", "recurrent_gemma", "bamba", "jamba"])
@pytest.mark.slow(
    "plain, windows, compressed keys, own masks, each form of a recurrence",
    keep=[
        "llama",
        "deepseek_v3",
        "gpt_neo",
        "openai_gpt",
        "doge",
        "lfm2",
        "olmo_hybrid",
        "recurrent_gemma",
        "bamba",
        "jamba",
    ],
)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_parts_of_a_sequence_match_the_whole(name):
    model = DECODERS[name]()
    graph = grown(model)
    ids = torch.randint(3, VOCABULARY, (2, 10))
    whole = model(ids).logits
    caches = {n: tensor for n, tensor in room(graph, 2).items() if attending.is_past_input(n)}
    past = torch.zeros(2, dtype=torch.int32)
    for counts in COUNTS:
        new = torch.tensor(counts, dtype=torch.int32)
        places = torch.tensor([[max(count - 1, 0), 0] for count in counts])
        given = {IDS: parts(ids, past, counts), LOGITS_TO_KEEP: places, PAST_LENGTHS: past, NEW_LENGTHS: new, **caches}
        logits, *presents = run_graph(graph, given)
        named = dict(zip(graph.interface.extra_outputs, presents, strict=True))
        caches = {name: named[present_name(name)] for name in caches}
        for row, count in enumerate(counts):
            if count:
                assert_close(logits[row], whole[row, past[row] + places[row]])
        past = past + new


def test_looks_up_values_that_depend_only_on_positions():
    graph = grown_llama()
    angles = set(graph.find(torch.ops.aten.cos.default, torch.ops.aten.sin.default))
    assert not angles & graph.reaching_outputs()
    assert graph.longest == 64


@pytest.mark.medium("cached generation of five decoders")
def test_a_table_of_the_models_own_bounds_the_text():
    assert grown(DECODERS["opt"]()).longest == 64
    assert grown(DECODERS["mpt"]()).longest == 48


@pytest.mark.medium("test_looks_up_values_that_depend_only_on_positions")
@torch.no_grad()
def test_dynamic_angles_are_those_of_texts_as_long_as_the_model_was_made_for():
    """The model may have read a longer sequence before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kinds = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=12, rope_parameters=kinds,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (1, 12))
    whole = model(ids).logits
    model(torch.randint(3, VOCABULARY, (1, 40)))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    graph = grown(model)
    assert graph.longest == 12
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    logits = run_graph(graph, {IDS: ids, LOGITS_TO_KEEP: torch.arange(12)[None], **room(graph, 1)})[0]
    assert_close(logits, whole)


@pytest.mark.medium("test_pipelines.py: each pass is idempotent where it stands")
def test_the_pass_is_idempotent():
    graph = grown_llama()
    assert not CacheAttention().apply(graph).changed
    assert not list(graph.find(attending.ATTENTION))


def test_notes_a_mask_that_no_cache_knows():
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    packed = and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 3)))
    interface = AttentionInterface({})
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3, "dtype": torch.float32, "device": "cpu"}
    for function in (causal_mask_function, packed):
        interface.mask(mask_function=function, attention_mask=None, **sizes)
    assert interface.problems == ["its attention hides more than later tokens and tokens outside a window"]


@pytest.mark.parametrize("window", [0, 3, -4])
def test_a_token_sees_a_window_or_a_chunk(window):
    """Within chunks of four, the fifth token sees itself alone."""
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    places = torch.arange(9)
    seen = places[None] <= places[:, None]
    if window > 0:
        seen &= places[None] > places[:, None] - window
    if window < 0:
        seen &= places[None] // 4 == places[:, None] // 4
    y = torch.ops.lorac.attention(q, k, v, None, None, None, None, 0.5, True, window, 0.0, "")
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.5)
    assert_close(y, right.transpose(1, 2))


@pytest.mark.parametrize("columns", [2, 1], ids=["whole blocks", "later tokens"])
def test_a_token_sees_its_block(columns):
    """Tokens 1 to 4 see each other; within a window of two tokens, the first of a block stays visible in its form."""
    q, k, v = torch.randn(3, 1, 2, 7, 8).unbind()
    blocks = torch.tensor([[[0, 0], *[[1, 4]] * 4, [5, 5], [6, 6]]])
    places = torch.arange(7)
    ahead = places[None] - places[:, None]
    inside = (places > 0) & (places < 5)
    seen = ((ahead <= 0) & (ahead > -2)) | (inside & inside[:, None] & ((ahead >= 0) | (columns == 2)))
    y = torch.ops.lorac.attention(q, k, v, None, None, None, blocks[..., -columns:], 0.5, True, 2, 0.0, "")
    assert_close(y, torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.5).transpose(1, 2))


class Averaging(torch.nn.Module):
    """Mixes all tokens up to each, in a way that is no op with a state."""

    def forward(self, x):
        return x.cumsum(1)


def test_rejects_a_model_that_mixes_tokens_elsewhere():
    model = DECODERS["llama"]()
    model.model.layers[0].mlp = Averaging()
    with refuses("capture_differs", match="in parts"):
        lorac.compile(model, target="onnxruntime", cache=True)


def test_rejects_a_cache_for_other_models():
    with pytest.raises(Unavailable, match="not a language model"):
        lorac.compile(torch.nn.Linear(3, 4), target="onnxruntime", cache=True, example_inputs=(torch.ones(2, 3),))
