"""LLMFew: a patch-wise temporal convolution encoder in front of a pretrained causal language model, and a head behind.

"Large Language Models are Few-shot Multivariate Time Series Classifiers", arXiv 2502.00059. Each patch of a series
becomes one embedding, the language model's trunk reads the embeddings as it reads tokens, and a head classifies. For
lorac all of it is the host: encoder and head are trained whole (``modules_to_save``), the trunk by LoRA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

KERNEL, NEGATIVE_SLOPE = 3, 0.01


class CausalConv(nn.Module):
    """A weight-normed convolution that sees no later sample, and LeakyReLU: (n, in, time) -> (n, out, time).

    Direction and length of a filter are plain parameters of their own, so that an adapter trains the two as the paper
    does: of torch's ``weight_norm`` it would train the weight that comes of them.
    """

    def __init__(self, channels_in: int, channels_out: int, dilation: int) -> None:
        super().__init__()
        drawn = nn.Conv1d(channels_in, channels_out, KERNEL)
        self.dilation, self.earlier = dilation, (KERNEL - 1) * dilation
        self.weight_v, self.bias = drawn.weight, drawn.bias
        self.weight_g = nn.Parameter(_lengths(drawn.weight.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_g * self.weight_v / _lengths(self.weight_v)
        convolved = F.conv1d(F.pad(x, (self.earlier, 0)), weight, self.bias, dilation=self.dilation)
        return F.leaky_relu(convolved, NEGATIVE_SLOPE)


def _lengths(filters: torch.Tensor) -> torch.Tensor:
    return filters.norm(dim=(1, 2), keepdim=True)


class Block(nn.Module):
    """Two causal convolutions and what goes past them."""

    def __init__(self, channels_in: int, channels_out: int, dilation: int) -> None:
        super().__init__()
        self.first = CausalConv(channels_in, channels_out, dilation)
        self.second = CausalConv(channels_out, channels_out, dilation)
        self.past = nn.Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.past(x)


class PatchEncoder(nn.Module):
    """Series (rows, channels, length) to embeddings (rows, patches, width), each patch by itself.

    Args:
        channels: of the series, M.
        width: of an embedding, d.
        patch, stride: samples of a patch and between two, P and S.
        hidden: channels of the blocks, c.
        depth: blocks before the last, D; the j-th is dilated by 2^j.
        reduced: channels of the last block, e.
        dropout: on the embeddings, in training.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        patch: int = 32,
        stride: int = 16,
        hidden: int = 256,
        depth: int = 3,
        reduced: int = 320,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        widths = [channels, *[hidden] * depth]
        blocks = [Block(widths[j], hidden, 2**j) for j in range(depth)]
        self.blocks = nn.Sequential(*blocks, Block(hidden, reduced, 2**depth))
        self.proj = nn.Linear(reduced, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        patches = patched(series, self.patch, self.stride)
        rows, count = patches.shape[:2]
        features: torch.Tensor = self.blocks(patches.flatten(0, 1)).amax(-1)
        embeddings: torch.Tensor = self.dropout(self.proj(features))
        return embeddings.reshape(rows, count, -1)


class LinearPatches(nn.Module):
    """A baseline for the encoder: one linear map of a patch's samples."""

    def __init__(self, channels: int, width: int, patch: int, stride: int) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.proj = nn.Linear(channels * patch, width)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.proj(patched(series, self.patch, self.stride).flatten(2))
        return embeddings


class Head(nn.Module):
    """LeakyReLU of the trunk's states and the embeddings together, LayerNorm over all of them, a linear layer.

    (rows, patches, width) twice to (rows, classes). The paper's code ends in Softmax; logits are what its loss takes.
    """

    def __init__(self, patches: int, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(patches * width)
        self.linear = nn.Linear(patches * width, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        both = F.leaky_relu(states + embeddings, NEGATIVE_SLOPE).flatten(1)
        logits: torch.Tensor = self.dropout(self.linear(self.layer_norm(both)))
        return logits


class LLMFew(nn.Module):
    """Encoder, trunk and head: ``series`` (rows, channels, length) to logits (rows, classes).

    Args:
        encoder: makes embeddings of the series.
        trunk: a causal language model without its head, such as transformers' ``LlamaModel``; None goes without.
        head: reads the trunk's states and the embeddings.
    """

    def __init__(self, encoder: nn.Module, trunk: nn.Module | None, head: Head) -> None:
        super().__init__()
        self.encoder, self.trunk, self.head = encoder, trunk, head

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        embeddings = self.encoder(series)
        logits: torch.Tensor = self.head(self.states(embeddings), embeddings)
        return logits

    def states(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the trunk's last hidden states of the embeddings, in order; nothing without a trunk."""
        if self.trunk is None:
            return torch.zeros_like(embeddings)
        states: torch.Tensor = self.trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states


def patched(series: torch.Tensor, patch: int, stride: int) -> torch.Tensor:
    """(rows, channels, length) to (rows, patches, channels, patch); the last sample is repeated to fill one more."""
    more = series[..., -1:].expand(-1, -1, stride)
    return torch.cat([series, more], -1).unfold(-1, patch, stride).transpose(1, 2)


def patches(length: int, patch: int, stride: int) -> int:
    """How many patches a series has."""
    return (length - patch) // stride + 2
