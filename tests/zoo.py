"""The models the tests run on: every kind of site, tiny where size proves nothing.

`ZOO[name].model()` is built once per session and must not be changed, `.fresh()` is a copy to do
anything with. Layers are non-square, vectors are away from their init and BatchNorm statistics are
not 0 and 1, so that a transposed, dropped or swapped tensor shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from examples import models

Inputs = dict[str, Tensor]
built: dict[str, nn.Module] = {}
tokenizers: dict[str, Any] = {}


@dataclass(frozen=True)
class Entry:
    """A model, its example inputs and what an adapter of it would target."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    """`inputs(seed=0, batch=2, length=5, dtype=torch.float32)`; dtype is that of images."""
    targets: tuple[str, ...]
    """Target modules for LoRA, as PEFT takes them."""
    outputs: tuple[str, ...]
    """The outputs that adapters on these targets change."""
    real: bool = False
    """True where the weights are trained ones, and large."""

    def model(self) -> nn.Module:
        """The session's model, in eval mode; read-only."""
        if self.name not in built:
            built[self.name] = self.build().eval()
        return built[self.name]

    def fresh(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of its own, in another dtype if one is given."""
        model = copy.deepcopy(self.model())
        return model if dtype is None else model.to(dtype)


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Changes when weights are written in place or replaced, or flags, mode or hooks change."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        tuple((name, id(t), t._version, t.dtype, t.requires_grad) for name, t in tensors),
        tuple((id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()),
    )


# Plain modules


class PlainMLP(nn.Module):
    """An embedding and linears, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 6, bias=False)
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.embed(tokens)))
        return cast(Tensor, self.head(torch.tanh(self.down(hidden))))


class PlainConv(nn.Module):
    """Strided, grouped, dilated and one-dimensional convolutions, then a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(10, 8, (3, 1), padding=(1, 0), groups=2)
        self.dilated = nn.Conv2d(8, 7, 3, padding=2, dilation=2, bias=False)
        self.line = nn.Conv1d(7, 5, 3, padding=1)
        self.head = nn.Linear(5, 9)

    def forward(self, image: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.stem(image))
        hidden = self.dilated(nn.functional.gelu(self.grouped(hidden)))
        hidden = self.line(hidden.flatten(2))
        return cast(Tensor, self.head(hidden.mean(-1)))


def plain_mlp() -> nn.Module:
    return _seeded(PlainMLP)


def plain_conv() -> nn.Module:
    return _seeded(PlainConv)


def resnet18() -> nn.Module:
    """torchvision's ResNet-18, its BatchNorm statistics taken from noise and then shaken."""
    import torchvision  # type: ignore[import-untyped]

    model = _seeded(lambda: torchvision.models.resnet18(num_classes=10))
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 40, 32, generator=generator))
        for norm in norms:
            norm.momentum = 0.1
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None
            mean += 0.2 * var.sqrt() * torch.randn(mean.shape, generator=generator)
            var *= 0.7 + 0.7 * torch.rand(var.shape, generator=generator)
    return model.eval()


# Transformers


def tiny_llama(layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=24,  # makes q_proj and o_proj non-square
                max_position_embeddings=128,
                initializer_range=0.15,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    )


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _seeded(
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=128,
                n_positions=64,
                n_embd=48,
                n_layer=2,
                n_head=4,
                n_inner=80,
                initializer_range=0.15,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    )


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _seeded(
        lambda: BertForSequenceClassification(
            BertConfig(
                vocab_size=128,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                initializer_range=0.15,
                num_labels=5,
            )
        )
    )


def tiny_albert() -> nn.Module:
    """One layer called three times: the sites are shared, not the calls."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return _seeded(
        lambda: AlbertForSequenceClassification(
            AlbertConfig(
                vocab_size=128,
                embedding_size=24,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=3,
                num_hidden_groups=1,
                num_attention_heads=4,
                max_position_embeddings=64,
                initializer_range=0.15,
                num_labels=5,
            )
        )
    )


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return _seeded(
        lambda: ViTForImageClassification(
            ViTConfig(
                image_size=(24, 16),
                patch_size=8,
                num_channels=3,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                initializer_range=0.15,
                num_labels=5,
            )
        )
    )


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return _seeded(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=128,
                d_model=64,
                d_kv=12,  # 4 heads of 12: q, k, v and o are non-square
                d_ff=96,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=4,
                relative_attention_num_buckets=8,
                decoder_start_token_id=0,
            )
        )
    )


def smollm2() -> nn.Module:
    model, tokenizers["smollm2"] = models.smollm2()
    return model


def minilm() -> nn.Module:
    model, tokenizers["minilm"] = models.minilm()
    return model


def tokenizer(name: str) -> Any:
    """The tokenizer of a real model."""
    ZOO[name].model()
    return tokenizers[name]


# Inputs


def _text(vocabulary: int, *, decoder: bool = False) -> Callable[..., Inputs]:
    """Token ids with a mask; the last of several rows ends in padding."""

    def inputs(seed: int = 0, batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if batch > 1 and length > 2:
            mask[-1, -max(1, length // 4) :] = 0
        made = {"input_ids": ids, "attention_mask": mask}
        if decoder:
            shape = (batch, max(2, length - 1))
            made["decoder_input_ids"] = torch.randint(3, vocabulary, shape, generator=generator)
        return made

    return inputs


def _tokens(seed: int = 0, batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(0, 23, (batch, length), generator=generator)}


def _image(name: str, *shape: int) -> Callable[..., Inputs]:
    def inputs(seed: int = 0, batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(batch, *shape, generator=generator).to(dtype)}

    return inputs


def _seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build from a seed, without touching the caller's; then move every vector off its init."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "key", "value", "dense")
_VIT = (*_ATTENTION, "fc1", "fc2")

ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("plain_mlp", plain_mlp, _tokens, ("embed", "up", "down", "head"), ("output",)),
        Entry(
            "plain_conv",
            plain_conv,
            _image("image", 6, 11, 9),
            ("stem", "grouped", "line", "head"),  # PEFT's LoRA ignores the dilation and fails
            ("output",),
        ),
        Entry("tiny_llama", tiny_llama, _text(128), _LLAMA, ("logits",)),
        Entry("tiny_bert", tiny_bert, _text(128), _BERT, ("logits",)),
        Entry("tiny_gpt2", tiny_gpt2, _text(128), ("c_attn", "c_proj", "c_fc"), ("logits",)),
        Entry("tiny_vit", tiny_vit, _image("pixel_values", 3, 24, 16), _VIT, ("logits",)),
        Entry(
            "tiny_t5",
            tiny_t5,
            _text(128, decoder=True),
            ("q", "k", "v", "o", "wi", "wo"),
            ("logits", "encoder_last_hidden_state"),
        ),
        Entry(
            "tiny_albert",
            tiny_albert,
            _text(128),
            ("embedding_hidden_mapping_in", "query", "value", "ffn", "ffn_output"),
            ("logits",),
        ),
        Entry("resnet18", resnet18, _image("x", 3, 40, 32), ("conv1", "conv2", "fc"), ("output",)),
        Entry("smollm2", smollm2, _text(49152), _LLAMA, ("logits",), real=True),
        Entry(
            "minilm",
            minilm,
            _text(30522),
            _BERT,
            ("last_hidden_state", "pooler_output"),
            real=True,
        ),
    )
}

SMALL_LLAMA = replace(ZOO["tiny_llama"], name="small_llama", build=lambda: tiny_llama(layers=2))
"""For programs whose layers need not be more than two."""
