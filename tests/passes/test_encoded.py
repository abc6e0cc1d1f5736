"""A graph split in two: encoder outputs are computed once, and the decoder's sequence may come in parts."""

import functools

import pytest
import torch
from torch import nn

import lorac
from lorac import Unavailable
from lorac.frontend.capture.encoder_decoder import CheckAttention, split_encoder_decoder
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.host import Host
from lorac.frontend.site_discovery import find_sites
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph.attention_ops import NEW_LENGTHS, PAST_LENGTHS, is_encoder_output, present_name
from lorac.ir.graph.feeds import cache_input_shapes
from lorac.ir.graph.interpreter import run_graph
from lorac.ir.graph.passes import run_pipeline
from lorac.passes.pipelines import lowering_passes
from lorac.testing import assert_close
from tests.captured import graph_of
from tests.encoder_decoders import VOCABULARY, batches, made
from tests.passes.test_cache_attention import COUNTS, parts

TEXT = torch.arange(20).reshape(2, 10) * 7 % (VOCABULARY - 3) + 3


@functools.cache
def _halves(family):
    model = made(family).double()
    graph = capture_graph("main", Host.of(model), None, None, sites=find_sites(model), plans={}, grows=True)
    halves = split_encoder_decoder(graph, "main.encoder")
    for half in halves:
        run_pipeline(half, lowering_passes())
    return halves


def _encoded(encoder, inputs):
    answered = dict(zip(encoder.interface.outputs, run_graph(encoder, inputs), strict=True))
    return {name: value for name, value in answered.items() if is_encoder_output(name)}


@pytest.mark.medium("runtime/generation/test_encoder_decoder_driver.py generates over both halves")
@pytest.mark.slow("a T5", cases=["bart"])
@pytest.mark.parametrize("family", ["bart", "t5", "pegasus_x"])
@torch.no_grad()
def test_parts_of_a_sequence_match_the_whole(family):
    """Rows with padding on the left and on the right, and with ragged parts of the sequence."""
    model = made(family).double()  # t5 does not scale its scores: float32 rounds them by more than a few units
    decoder, encoder = _halves(family)
    left, right = batches(family)
    for batch in (left, right):
        inputs = {name: value[1:3] for name, value in batch.items()}
        whole = model(**inputs, decoder_input_ids=TEXT).logits
        memory = _encoded(encoder, inputs)
        caches = {
            n: torch.zeros(2, heads, 12, size).double()
            for n, ((_, heads, _, size), _) in cache_input_shapes(decoder).items()
        }
        past = torch.zeros(2, dtype=torch.int32)
        for counts in COUNTS:
            given = {
                "decoder_input_ids": parts(TEXT, past, counts),
                PAST_LENGTHS: past,
                NEW_LENGTHS: torch.tensor(counts).int(),
            }
            logits, *presents = run_graph(decoder, {**given, **caches, **memory})
            named = dict(zip(decoder.interface.extra_outputs, presents, strict=True))
            caches = {name: named[present_name(name)] for name in caches}
            for row, count in enumerate(counts):
                assert_close(logits[row, :count], whole[row, past[row] : past[row] + count]) if count else None
            past = past + torch.tensor(counts)


@pytest.mark.medium("runtime/generation/test_encoder_decoder_driver.py generates over both halves")
def test_each_half_has_its_own_inputs_and_sites():
    decoder, encoder = _halves("bart")
    assert encoder.interface.inputs == ("input_ids", "attention_mask")
    assert decoder.interface.inputs == ("decoder_input_ids",)
    assert "model.decoder.layers.0.encoder_attn.k_proj" in encoder.sites
    assert "model.decoder.layers.0.encoder_attn.q_proj" in decoder.sites
    assert not encoder.sites.keys() & {"model.decoder.layers.0.encoder_attn.q_proj"}
    assert not list(decoder.find(attending.ATTENTION)) + list(encoder.find(attending.ATTENTION))


def _bert():
    """A decoder that cuts its positions from a list, by which it looks up the kinds of its tokens too."""
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), decoder)
    return EncoderDecoderModel(config).eval()


@pytest.mark.slow
@torch.no_grad()
def test_positions_cut_from_a_list():
    model = _bert()
    ids = TEXT[:, :5].contiguous()  # torch guards against the size that a view was cut from
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.clone()}
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    compiled = lorac.compile(model, target="onnxruntime", cache=True, example_inputs=example)
    assert compiled.engine.cache_spec("main").limit == 64
    options = {**batches("bart")[1], "max_new_tokens": 8, "num_beams": 2}
    assert torch.equal(compiled.generate(**options), model.generate(**options))


class _Mixing(nn.Module):
    """A model whose decoder attends to both sequences at once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids, decoder_input_ids):
        both = self.table(torch.cat([input_ids, decoder_input_ids], 1))[:, None]
        q = self.table(decoder_input_ids)[:, None]
        return torch.ops.lorac.attention(q, both, both, None, None, None, None, 1.0, True, 0, 0.0, "decoder.attn")


def test_rejects_attention_to_both_at_once_by_name():
    program = torch.export.export(_Mixing(), (TEXT[:, :4], TEXT[:, :6]))
    with pytest.raises(Unavailable, match=r"'decoder\.attn' attends to the text and to what was encoded at once"):
        CheckAttention("Mixing").apply(graph_of("main", program, {}, {}))
