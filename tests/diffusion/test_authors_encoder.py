"""The encoder of AutoLoRA's authors, from a file with their names of tensors, against their forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorac
from lorac.diffusion.authors_encoder import read_authors_encoder
from lorac.testing import assert_close
from tests.limits import assert_apart
from tests.refusing import refuses

WIDTH, HEADS = 768, 12
SITES = {
    **{f"blocks.{n}.{layer}": (5, 7) for n in range(11) for layer in ("attn.a_to_qkv", "ff_b.2")},
    **{f"single_blocks.{n}.{layer}": (4, 6) for n in (0, 1) for layer in ("to_qkv_mlp", "norm.linear")},
}
"""In the order of their encoder's tokens, which is not that of the names: block 2 comes before block 10."""


def their_tensors(probes: int = 1) -> dict[str, Tensor]:
    """Tensors as their training stores them."""
    drawn = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"position_embeds": (1, probes * len(SITES), WIDTH)}
    for path, (takes, gives) in SITES.items():
        sizes[f"embedder.model_dict.{path.replace('.', '___')}.x"] = (1, probes, takes)
        kind = f"embedder.proj_dict.{path.split('.', 2)[2].replace('.', '___')}"
        sizes |= {f"{kind}.weight": (WIDTH, gives), f"{kind}.bias": (WIDTH,)}
    for part, (rows, columns) in {
        **{f"attn.to_{one}": (WIDTH, WIDTH) for one in ("q", "k", "v", "out")},
        "fc1": (4 * WIDTH, WIDTH),
        "fc2": (WIDTH, 4 * WIDTH),
    }.items():
        sizes |= {f"encoders.0.{part}.weight": (rows, columns), f"encoders.0.{part}.bias": (rows,)}
    for norm in ("encoders.0.layer_norm1", "encoders.0.layer_norm2", "final_layer_norm"):
        sizes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    return {name: torch.randn(size, generator=drawn) * size[-1] ** -0.5 for name, size in sizes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "epoch-lora_encoder-19.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in their_tensors().items()}, path)
    return path


def their_forward(tensors: dict[str, Tensor], lora: dict[str, dict[str, Tensor]]) -> Tensor:
    """``LoRAEncoder.forward`` of their `retriever.py`, with DiffSynth's CLIPEncoderLayer."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    tokens = []
    for path, own in lora.items():
        x = tensors[f"embedder.model_dict.{path.replace('.', '___')}.x"]
        kind = f"embedder.proj_dict.{path.split('.', 2)[2].replace('.', '___')}"
        tokens.append(linear(kind, x @ own["lora_A"].T @ own["lora_B"].T))
    hidden = torch.cat(tokens, 1) + tensors["position_embeds"]
    given = norm("encoders.0.layer_norm1", hidden)
    q, k, v = (
        linear(f"encoders.0.attn.to_{one}", given).view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for one in "qkv"
    )
    causal = torch.full((len(SITES), len(SITES)), -torch.inf).triu(1)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=causal).transpose(1, 2).reshape(1, -1, WIDTH)
    hidden = hidden + linear("encoders.0.attn.to_out", attended)
    wide = linear("encoders.0.fc1", norm("encoders.0.layer_norm2", hidden))
    hidden = hidden + linear("encoders.0.fc2", wide * torch.sigmoid(1.702 * wide))
    return norm("final_layer_norm", hidden).mean(1)


@torch.no_grad()
def test_the_vector_is_theirs(file: Path) -> None:
    drawn = torch.Generator().manual_seed(1)
    lora = {
        path: {"lora_A": torch.randn(2, takes, generator=drawn), "lora_B": torch.randn(gives, 2, generator=drawn)}
        for path, (takes, gives) in SITES.items()
    }
    adapter = lorac.Adapter("a", lorac.LoRA(r=2, alpha=2, targets=tuple(lora)), lora)
    encoder = read_authors_encoder(file)
    found = encoder(encoder.stack_pairs([adapter]))
    theirs = {name: tensor.float() for name, tensor in load_file(file).items()}
    assert_close(found, their_forward(theirs, lora))
    swapped = dict(sorted(lora.items()))
    assert_apart(their_forward(theirs, swapped), found)


def test_rejects_files_of_others(file: Path, tmp_path: Path) -> None:
    theirs = load_file(file)
    other = tmp_path / "other.safetensors"
    for wrong in (
        {"embed.weight": torch.ones(2, 2)},
        {name: tensor for name, tensor in theirs.items() if name != "encoders.0.fc1.bias"},
        {name.replace("blocks.0.", "block.0."): tensor for name, tensor in theirs.items() if "fc" not in name},
        their_tensors(probes=2),
    ):
        save_file(wrong, other)
        with refuses("unknown_format", match=r"other\.safetensors' is not an encoder of AutoLoRA's authors"):
            read_authors_encoder(other)
    other.write_bytes(b"none")
    with refuses("unknown_format"):
        read_authors_encoder(other)
    with refuses("unreadable"):
        read_authors_encoder(tmp_path / "nowhere")
