"""The screenshots in docs/pictures: pages of `compiled.graph.to_html`, as Chromium shows them.

    python -m docs.make_pictures

Models are tiny and random; what is drawn is their structure.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lorac

FOLDER = Path(__file__).parent / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1500, 1180


def llama() -> lorac.Compiled:
    """Twelve layers, five methods, two adapters active, as ONNX Runtime runs it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 128}
    adapters = {
        "style": lorac.DoRA(r=4, targets=["q_proj", "v_proj"]),
        "task": lorac.LoRA(r=8, targets=["q_proj", "down_proj"]),
        "sparse": lorac.SHiRA(r=1, targets=["o_proj"]),
        "scale": lorac.IA3(targets=["k_proj", "up_proj"]),
        "bottleneck": lorac.AdapterTune(r=4, targets="model.layers.[0-9]+"),
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    return lorac.compile(model, adapters, active={"style": 1.0, "task": 0.5}, target="onnxruntime", self_test=False)


def vit() -> lorac.Compiled:
    """Torchvision's ViT of twelve layers: its attention reads its weights itself, so that they are bound."""
    import torchvision  # type: ignore[import-untyped]  # published without types

    model = torchvision.models.VisionTransformer(32, 8, 12, 4, 48, 96, num_classes=10).eval()
    adapters = {"birds": lorac.LoRA(r=4, targets="all-linear"), "stones": lorac.LoHa(r=2, targets=["mlp.0"])}
    return lorac.compile(model, adapters, active="birds", example_inputs=(torch.randn(2, 3, 32, 32),))


def unet() -> lorac.Compiled:
    """Diffusers' U-Net of two levels with cross-attention."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    adapters = {
        "style": lorac.LoRA(r=4, targets=["to_q", "to_k", "to_v", "to_out.0"]),
        "texture": lorac.LoHa(r=2, targets=["conv1"]),
    }
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 6, 32),
    }
    return lorac.compile(model, adapters, active="style", example_inputs=inputs)


PICTURES: dict[str, tuple[Callable[[], lorac.Compiled], str]] = {
    "llama": (llama, "at=model.layers.0.self_attn.o_proj"),
    "vit": (vit, "at=encoder.layers.encoder_layer_0.self_attention"),
    "unet": (unet, "find=texture"),
}
"""File -> the model, and the page's address: what is chosen or looked for."""


def main(names: list[str]) -> None:
    """Write the pictures named, or all."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is here")
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        made, address = PICTURES[name]
        with tempfile.TemporaryDirectory() as folder:
            page = made().graph.to_html(Path(folder) / "page.html")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
            size = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={FOLDER / name}.png"]
            subprocess.run([browser, *flags, *size, f"{page.as_uri()}#{address}"], check=True, capture_output=True)


if __name__ == "__main__":
    main(sys.argv[1:])
