"""What the README's examples speak of: a model and its inputs, folders of PEFT's, parts of a chain, components."""

import os

import diffusers
import numpy
import torch
import transformers

import lorac
from tests.letters import CHAT, letters

torch.manual_seed(0)
_config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
model = transformers.LlamaForCausalLM(_config).eval()
model.save_pretrained("MODEL")
letters(CHAT).save_pretrained("MODEL")
inputs = {"input_ids": torch.randint(0, 128, (2, 5))}
numpy.savez("inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})

_trained = lorac.compile(
    model, {"first": lorac.LoRA(r=4, targets=["q_proj"]), "second": lorac.LoRA(r=2, targets=["q_proj"])}
)
first, second = _trained.adapters.values()
os.mkdir("path")
for _folder, _adapter in (("peft_dir", first), ("other", second)):
    lorac.save_adapter(_adapter, f"path/to/{_folder}", model=model)

unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    norm_num_groups=4,
    attention_head_dim=4,
).eval()
text_encoder = transformers.CLIPTextModel(
    transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
).eval()
adapters = {"style": lorac.LoRA(r=2, targets=["to_q", "to_v", "q_proj"])}
sample, timestep, encoder_hidden_states = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 16)
