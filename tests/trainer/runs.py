"""The parts that tests of training share: a tokenizer, rows, arguments for the CPU, and a recipe of a few steps."""

import json

import torch
import transformers

from lorac.trainer import Recipe
from tests.letters import CHAT, letters

LORA = {"method": "lora", "r": 3, "alpha": 6, "targets": ["q_proj", "v_proj"]}
CPU = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}
STEPS = {**CPU, "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 24, "learning_rate": 1e-2}
TEXTS = ("the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "sphinx of quartz")
IMAGE = "<image>"
PAIRS = [{"prompt": f"{a}+1=", "chosen": f"{a + 1}", "rejected": f"{a - 1}"} for a in range(1, 7)]


def tokenizer(chat=CHAT):
    """Characters, with a token that ends a text and one that fills a row."""
    made = letters(chat)
    made.eos_token, made.pad_token = chr(3), chr(0)
    return made


def write_rows(file, rows):
    """Write rows as JSON, one a line, and return the file's path as a recipe names it."""
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def recipe(data, *, adapters=None, arguments=None, plain=False, **fields):
    """Return a recipe of four steps on the CPU, or with ``plain`` of some arguments alone."""
    given = {**({} if plain else STEPS), **(arguments or {})}
    data = data if isinstance(data, list | dict) else str(data)
    return Recipe(adapters=adapters or {"mine": LORA}, data=data, arguments=given, **fields)


def losses(trainer_state):
    """Return the losses that a trainer logged in its training, from the file or its state."""
    history = json.loads(trainer_state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def image_text_model():
    """A tiny model that reads images and characters, and its processor."""
    text = tokenizer(
        "{% for turn in messages %}{% for part in turn.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\x03{% endfor %}"
    )
    text.add_special_tokens({"additional_special_tokens": [IMAGE]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=32),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=len(text)),
        image_token_id=text.convert_tokens_to_ids(IMAGE),
    )
    pictures = transformers.CLIPImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)
    processor = transformers.LlavaProcessor(pictures, text, 4, "default", text.chat_template, IMAGE, 1)
    return transformers.LlavaForConditionalGeneration(config).eval(), processor
