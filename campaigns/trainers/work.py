"""A folder with tiny models and rows, and one run of a feature in it by ``lorac train``."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from typer.testing import CliRunner

import lorac
from campaigns.trainers.features import LORA, Feature
from lorac.cli import app
from tests.hub import Hub, use_hub
from tests.trainer.runs import CPU, PAIRS, TEXTS, image_text_model, tokenizer, write_rows
from tests.zoo import ZOO

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE = {
    **CPU,
    **{"adapters": {"mine": LORA}, "data": "texts.jsonl", "max_steps": 2, "per_device_train_batch_size": 2},
    **{"save_strategy": "no", "learning_rate": 1e-2},
}
"""The recipe that each feature changes."""
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def count_odd(completions: list[Any], **_: Any) -> list[float]:
    """Return a reward: how many characters of each completion, a text or a chat's turns, have an odd number."""
    texts = [told if isinstance(told, str) else "".join(turn["content"] for turn in told) for told in completions]
    return [float(sum(ord(c) % 2 for c in text)) for text in texts]


def make_model(name: str, folder: Path) -> None:
    """Save a tiny model of a kind, with its tokenizer or processor."""
    torch.manual_seed(0)
    text: Any = tokenizer()
    config: Any
    if name == "llava":
        model, processor = image_text_model()
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
        return
    if name == "vit":
        config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        return
    if name == "larger":
        text.add_tokens([f"<{number}>" for number in range(9)])
    if name == "bert":
        made: Any = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=128, **SIZES))
    elif name == "reward":
        config = transformers.LlamaConfig(vocab_size=128, num_labels=1, pad_token_id=0, **SIZES)
        made = transformers.LlamaForSequenceClassification(config)
    else:
        made = ZOO["tiny_t5" if name == "t5" else "tiny_llama"].fresh()
    made.save_pretrained(folder)
    text.save_pretrained(folder)
    if name == "nf4":
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        type(made).from_pretrained(folder, quantization_config=settings).save_pretrained(folder)


def make_rows(folder: Path) -> None:
    """Write rows of every kind that a feature reads."""
    texts = [{"text": text} for text in TEXTS]
    chats: list[Any] = [{"messages": TURNS}] * 2
    written: Mapping[str, list[Any]] = {
        "texts": texts,
        "more": texts[:2],
        "tokens": [{"text": "a<8>"}],
        "chats": chats,
        "tools": [{"messages": TURNS, "tools": [TOOL]}] * 2,
        "shared": [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}] * 2,
        "alpaca": [{"instruction": "add", "input": "1 and 1", "output": "2"}] * 2,
        "answers": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
        "named": [{"question": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS],
        "pairs": PAIRS,
        "judged": [
            {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
            for pair in PAIRS
            for kind in ("chosen", "rejected")
        ],
        "prompts": [{"prompt": pair["prompt"]} for pair in PAIRS],
        "asked": [{"prompt": TURNS[:1]}] * 2,
        "labels": [{"text": f"{'yes' if i % 2 else 'no'} {i}", "label": "ab"[i % 2]} for i in range(4)],
        "seen": [{"images": [f"images/{kind}/0.png"], "messages": TURNS} for kind in ("dark", "light")],
    }
    for name, rows in written.items():
        write_rows(folder / f"{name}.jsonl", rows)
    table = datasets.Dataset.from_list(texts)
    table.to_csv(folder / "rows.csv")
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(str(folder / "saved"))
    (folder / "rows.json").write_text(json.dumps(texts))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    for name in ("texts", "parts", "images/dark", "images/light"):
        (folder / name).mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        (folder / "texts" / f"{index}.txt").write_text(text)
    for split in ("train", "test"):
        write_rows(folder / "parts" / f"{split}.jsonl", texts)
    for index, kind in enumerate(("dark", "light")):
        pixels = np.full((8, 8, 3), 200 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / kind / "0.png")
    (folder / "chat.jinja").write_text(tokenizer().chat_template)


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Enter a folder with the rows, an adapter, and a hub that has rows and takes pushes."""
    make_rows(folder)
    make_model("llama", folder / "llama")
    model = ZOO["tiny_llama"].model()
    begun = lorac.compile(model, {"mine": lorac.LoRA(r=2, targets=["q_proj"])}).adapters["mine"]
    lorac.save_adapter(begun, folder / "begun", model=model)
    rows = (folder / "texts.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch, Hub() as hub, contextlib.chdir(folder):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        hub.add("datasets/me/rows", {"train.jsonl": rows})
        use_hub(hub, folder / "cache", patch)
        patch.setenv("HF_TOKEN", "hf_me")
        yield folder


def run(feature: Feature, number: int, folder: Path) -> str:
    """Run a feature by ``lorac train`` in ``work_folder``'s folder, and return how it ended."""
    if feature.needs is not None and importlib.util.find_spec(feature.needs) is None:
        return f"not run: {feature.needs} is not installed"
    for model in {feature.model, *(["reward"] if "reward/" in str(feature.recipe) else [])}:
        if not (folder / model).exists():
            make_model(model, folder / model)
    place = folder / f"run{number}" / "out"
    place.parent.mkdir()
    said = {"model": str(folder / feature.model), "out": str(place), **BASE, **feature.more, **feature.recipe}
    recipe = place.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(said))))  # without aliases
    code, text = 0, ""
    for options in feature.calls:
        code, text = _call(["train", str(recipe), *options], feature.processes)
        if code:
            break
    if feature.refused is not None:
        return "refused" if code == 1 and feature.refused in " ".join(text.split()) else f"WRONG: {code}, {text}"
    if code:
        return f"WRONG: {code}, {text}"
    if feature.holds is not None and not feature.holds(place):
        return "WRONG: its effect is missing"
    losses = [loss for state in place.rglob("trainer_state.json") for loss in _losses(state)]
    return "ran" if losses and all(map(math.isfinite, losses)) else f"WRONG: its losses are {losses}"


def _losses(state: Path) -> list[float]:
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _call(words: list[str], processes: int) -> tuple[int, str]:
    """Call the command line with words; return its exit code and the end of its output."""
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "lorac"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launch, *words], check=False, timeout=300, env=environment, capture_output=True, text=True
        )
        return done.returncode, (done.stdout + done.stderr)[-2000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, words)
    error = result.exception
    if error is None or isinstance(error, SystemExit):
        return result.exit_code, result.output[-2000:]
    return 1 if isinstance(error, lorac.LoracError) else 3, f"{type(error).__name__}: {error}"
