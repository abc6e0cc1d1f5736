"""Example inputs that are made for models that see moving images or hear: forward takes them."""

import pytest
import torch
import transformers

from lorac.ir.host.example_inputs import default_inputs

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
def test_forward_takes_them(name):
    model = MODELS[name]().eval()
    output = model(**default_inputs(model))
    assert output[0].shape[0] == 2
    assert torch.isfinite(output[0]).all()
