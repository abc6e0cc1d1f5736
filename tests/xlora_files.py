"""A mixture by X-LoRA, PEFT's model of it, and its folders as PEFT and the authors lay them out."""

import copy
import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import lorac

_DRAWN = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 61, (2, 9), generator=_DRAWN)
OTHER = torch.randint(0, 61, (3, 5), generator=_DRAWN)
FIELDS = {"layerwise_scalings": True, "softmax_temperature": 0.7, "top_k_lora": 2, "global_scaling_weight": 1.5}
PREFIX = "base_model.internal_xlora_classifier."


def tiny(kind: str = "Llama", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "initializer_range": 0.1, **fields})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{kind}{head}")(config).eval()


@functools.cache
def model() -> nn.Module:
    return tiny(num_key_value_heads=2)


@functools.cache
def folder() -> Path:
    """Three LoRAs of unequal ranks and targets, PEFT's XLORA of them, and what that answers."""
    here, host = Path(tempfile.mkdtemp()), model()
    torch.manual_seed(0)
    targets = [["q_proj", "v_proj", "down_proj"], ["q_proj", "down_proj"], ["q_proj", "v_proj", "down_proj"]]
    for i, rank in enumerate((4, 2, 3)):
        made = peft.get_peft_model(
            copy.deepcopy(host), peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets[i])
        )
        with torch.no_grad():
            for name, tensor in made.named_parameters():
                if "lora_B" in name:
                    tensor.copy_(0.06 * torch.randn_like(tensor))
        made.save_pretrained(here / str(i))
    return here


@functools.cache
def of_peft(**fields: Any) -> Any:
    """PEFT's, with other settings than ``FIELDS`` where they are given; its files lie in ``mixed()``."""
    host = copy.deepcopy(model())
    host.config.use_cache = False
    paths = {str(i): str(folder() / str(i)) for i in range(3)}
    torch.manual_seed(0)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters=paths, xlora_depth=2, xlora_size=16, **(fields or FIELDS)
    )
    made = peft.get_peft_model(host, config).eval()
    with torch.no_grad():
        for tensor in made.base_model.internal_xlora_classifier.parameters():
            tensor.mul_(8)
    made.save_pretrained(mixed(**fields))
    return made


def mixed(**fields: Any) -> Path:
    return folder() / "-".join(["mixed", *map(str, fields.values())])


def classifier(**fields: Any) -> dict[str, torch.Tensor]:
    made = of_peft(**fields).base_model.internal_xlora_classifier
    return {key: tensor.detach().clone() for key, tensor in made.state_dict().items()}


def with_experts(here: Path) -> Path:
    """A folder with the three LoRAs in it."""
    for i in range(3):
        shutil.copytree(folder() / str(i), here / str(i), dirs_exist_ok=True)
    return here


def complete(here: Path, made: dict[str, Any] | None = None, **changed: Any) -> Path:
    """PEFT's file, of what it made with such settings, with the tensors that PEFT drops, next to its experts."""
    tensors = {PREFIX + key: tensor for key, tensor in classifier(**(made or {})).items()}
    config = json.loads((mixed(**(made or {})) / "adapter_config.json").read_text())
    with_experts(here)
    (here / "adapter_config.json").write_text(json.dumps(config | changed))
    save_file(tensors, here / "adapter_model.safetensors")
    return here


@functools.cache
def adapter() -> lorac.Adapter:
    return lorac.load_adapter(complete(folder() / "whole"), model(), "x")


def authors(here: Path, **changed: Any) -> Path:
    """Write the same mixture as X-LoRA's authors do, with a list of the experts' names."""
    tensors = classifier()
    layers = {"inner.0": "layers.0", "last": "layers.3"}
    written = {
        f"{own}.{kind}": tensors[f"{name}.{kind}"] for own, name in layers.items() for kind in ("weight", "bias")
    }
    config = {
        "hidden_size": 32,
        "base_model_id": "tiny",
        "adapters": ["0", "1", "2"],
        "xlora_depth": 2,
        "xlora_size": 16,
    }
    config |= {"enable_relu_and_dropout": True, "use_bias": True, **FIELDS, **changed}
    (with_experts(here) / "xlora_config.json").write_text(json.dumps(config))
    save_file(written, here / "xlora_classifier.safetensors")
    return here


def turned_round(given: lorac.Adapter) -> lorac.Adapter:
    """The same mixture, the classifier's layers in the opposite order."""
    targets, held = given.variant.targets, {path: dict(given.tensors[path]) for path in reversed(given.variant.targets)}
    for key in ("classifier_1_weight", "classifier_1_bias"):
        last = given.tensors[targets[0]][key].unflatten(0, (len(targets), -1)).flip(0).flatten(0, 1)
        held = {path: {**own, key: last} for path, own in held.items()}
    return lorac.Adapter("x", replace(given.variant, targets=targets[::-1]), held)
