"""Tiny models, adapters that AdapterHub's library wrote for them, and its answers (``make_adapterhub.py``)."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorac

FILES = Path(__file__).parent / "adapterhub"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "vit": "ViTModel",
}
FOLDERS = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in FILES.glob("*/*/adapter_config.json"))


@functools.cache
def model(name):
    return getattr(transformers, CLASSES[name]).from_pretrained(FILES / name, dtype=torch.float32).eval()


@functools.cache
def expected(name):
    return load_file(FILES / name / "expected.safetensors")


def inputs(name):
    return {key.removeprefix("input."): value for key, value in expected(name).items() if key.startswith("input.")}


def main(output):
    return output.logits if "logits" in output else output.last_hidden_state


def split(folder):
    return folder.split("/")


def changed(folder, **fields):
    """Set fields of a folder's configuration, or around it."""
    file = folder / "adapter_config.json"
    raw = json.loads(file.read_text())
    for name, value in fields.items():
        (raw if name in raw else raw["config"])[name] = value
    file.write_text(json.dumps(raw))


def refused(folder, error, match, name="bert"):
    with pytest.raises(error, match=match):
        lorac.load_adapter(folder, model(name))
