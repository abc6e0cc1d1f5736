"""The rows and the small model of the recipes in examples/recipes, written into .cache once.

    python -m examples.recipe_data
    lorac train examples/recipes/docs.yaml
    lorac train examples/recipes/pairs.yaml
    lorac train examples/recipes/digits.yaml

The digits are scikit-learn's, read out of its wheel; the pairs are questions on Python's documentation, each with the
beginning of its own page and that of another one.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from examples.models import CACHE

DIGITS, PAIRS = CACHE / "digits", CACHE / "pairs.jsonl"
WHEEL, TABLE = "scikit-learn==1.7.2", "sklearn/datasets/data/digits.csv.gz"
QUESTION, LONGEST = "What does Python's documentation say on '{}'?", 240


def main() -> None:
    """Write everything that is not there yet."""
    if not (DIGITS / "model").is_dir():
        write_digits()
        write_vit(DIGITS / "model")
    if not PAIRS.is_file():
        write_pairs()


def write_digits() -> None:
    """Write 1 797 handwritten digits of 8 x 8 pixels, in a folder for each."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        text = gzip.decompress(zipfile.ZipFile(wheel).read(TABLE)).decode()
    for index, row in enumerate(csv.reader(text.splitlines())):
        *pixels, digit = (int(float(value)) for value in row)
        place = DIGITS / "images" / f"{digit}" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.array(pixels).reshape(8, 8) * 15.9).astype(np.uint8)).save(place)


def write_vit(folder: Path) -> None:
    """Write a small vision transformer that has learnt nothing, with its image processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def write_pairs() -> None:
    """Write a question on each page of Python's documentation, an answer that is chosen and one that is rejected."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    pages = [" ".join(re.sub(r"[*=\-^~]{3,}", "", topics[name]).split())[:LONGEST] for name in names]
    turns = (
        {
            "prompt": [{"role": "user", "content": QUESTION.format(name)}],
            "chosen": [{"role": "assistant", "content": pages[index]}],
            "rejected": [{"role": "assistant", "content": pages[index - 7]}],
        }
        for index, name in enumerate(names)
    )
    PAIRS.parent.mkdir(parents=True, exist_ok=True)
    PAIRS.write_text("\n".join(map(json.dumps, turns)))


if __name__ == "__main__":
    main()
