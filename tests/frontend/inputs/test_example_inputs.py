"""Example inputs that are made for models that see moving images or hear: forward takes them."""

import pytest
import torch
import transformers

import lorac
import lorac.errors
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import make_dynamic_shapes
from tests.refusing import refuses

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MOVING = {**SMALL, "image_size": 8, "num_frames": 4}
MODELS = {
    "timesformer": lambda: transformers.TimesformerModel(transformers.TimesformerConfig(**MOVING, patch_size=4)),
    "videomae": lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(**MOVING, patch_size=4)),
    "vivit": lambda: transformers.VivitModel(transformers.VivitConfig(**MOVING, tubelet_size=[2, 4, 4])),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            **SMALL, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embedding_groups=2
        )
    ),
    "spectrogram": lambda: transformers.ASTModel(
        transformers.ASTConfig(**SMALL, max_length=32, num_mel_bins=16, patch_size=8)
    ),
    "whisper": lambda: transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=8,
            max_source_positions=6,
            vocab_size=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_forward_accepts_the_example_inputs(name):
    model = MODELS[name]().eval()
    output = model(**Host.of(model).example_inputs())
    assert output[0].shape[0] == 2
    assert torch.isfinite(output[0]).all()


def _seeing(**text):
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**SMALL, vocab_size=50),
        image_token_index=45,
        **text,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_text_has_as_many_placeholders_as_the_model_makes_pieces_of_an_image():
    model = _seeing()
    inputs = Host.of(model).example_inputs()
    assert (inputs["input_ids"] == 45).sum(1).tolist() == [4, 4]
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    assert torch.isfinite(model(**inputs).logits).all()


def test_asks_for_inputs_with_the_processors_code():
    model = _seeing()
    model.config.name_or_path = "somebody/llava"
    model.config.vision_config.image_size = None
    with pytest.raises(
        lorac.errors.ExampleInputsNeeded, match=r"AutoProcessor.from_pretrained\('somebody/llava'\)\(images="
    ):
        Host.of(model).example_inputs()
    with pytest.raises(lorac.errors.ExampleInputsNeeded, match=r"example_inputs=\{'input': torch.randn\(2, \.\.\.\)\}"):
        Host.of(torch.nn.Linear(2, 3)).example_inputs()


def test_integers_per_token_are_as_long_as_the_text():
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50))
    ids = torch.ones(2, 7, dtype=torch.int64)
    boxes, kinds = ids[..., None].expand(2, 7, 4), ids.expand(3, 2, 7)
    beside = {"bbox": boxes, "position_ids": kinds, "pixel_values": torch.ones(2, 7, 4), "pair": [ids, None]}
    shapes = make_dynamic_shapes(Host.of(bert), {"input_ids": ids, **beside})
    names = {name: {axis: dim.__name__ for axis, dim in shapes[name].items()} for name in ("bbox", "position_ids")}
    assert names == {"bbox": {0: "batch", 1: "length"}, "position_ids": {1: "batch", 2: "length"}}
    assert shapes["pixel_values"].keys() == {0}
    assert [axes and set(axes) for axes in shapes["pair"]] == [{0, 1}, None]


def test_a_sound_may_be_longer():
    shapes = make_dynamic_shapes(Host.of(MODELS["wav2vec2"]()), {"input_values": torch.zeros(2, 900)})
    assert shapes["input_values"][1] == torch.export.Dim.AUTO


def test_rows_are_those_of_the_text_where_pieces_of_images_come_first():
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50))
    ids = torch.ones(2, 7, dtype=torch.int64)
    shapes = make_dynamic_shapes(
        Host.of(bert), {"pixel_values": torch.ones(32, 9), "input_ids": ids, "table": torch.ones(5, 9)}
    )
    assert shapes["pixel_values"] == {0: torch.export.Dim.AUTO}
    assert shapes["input_ids"][0].__name__ == "batch"
    assert shapes["table"] == {}


@pytest.mark.parametrize("given", [None, (torch.ones(2, 6), torch.ones(2, 6)), {"parts": (torch.ones(2, 6),)}])
def test_says_that_inputs_without_names_need_some(given):
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)

        def forward(self, *parts):
            return self.layer(torch.stack(parts).sum(0))

    with refuses("example_inputs_needed", match=r"\*parts have none: compile a module around it"):
        lorac.compile(Sum(), {"a": lorac.LoRA(r=2, targets=["layer"])}, "onnxruntime", given)
