"""Files that people give in the place of an adapter: the message names the mistake."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorac

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter_config.json", "{}")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(__file__)


def _folder(path: Path) -> None:
    path.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, path / "adapter_model.safetensors")


def _half(path: Path) -> None:
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, path)
    path.write_bytes(path.read_bytes()[:-8])


def _lone(path: Path) -> None:
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)


def _model(path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(4, 3)}
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)


def _config(path: Path) -> None:
    path.mkdir()
    _page(path / "adapter_config.json")
    _lone(path / "adapter_model.safetensors")


def _page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html>\n<html>\n")


def _pointer(path: Path) -> None:
    path.write_bytes(POINTER)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.safetensors": (_pointer, "a pointer of Git LFS(.|\n)*git lfs pull"),
    "a.gguf": (_pointer, "a pointer of Git LFS(.|\n)*git lfs pull"),
    "b.safetensors": (_page, "a web page(.|\n)*/resolve/"),
    "b.bin": (_page, "a web page(.|\n)*/resolve/"),
    "c.zip": (_zip, "an archive\n.*unpack it"),
    "c.tar": (_tar, "an archive\n.*unpack it"),
    "c.tar.gz": (_tar, "an archive\n.*unpack it"),
    "d.safetensors.part": (lambda path: path.write_bytes(b"123"), "an unfinished download"),
    "e.bin": (lambda path: torch.save({"<cat>": torch.ones(3)}, path), "textual inversion"),
    "e.safetensors": (lambda path: save_file({"emb_params": torch.ones(2, 3)}, path), "textual inversion"),
    "f": (_folder, "without adapter_config.json next to adapter_model.safetensors"),
    "g": (os.mkfifo, "neither a file nor a folder"),
    "h.safetensors": (_half, "ends 8 bytes early(.|\n)*download the file again"),
    "i.pt": (_lone, "without adapter_config.json next to i.pt(.|\n)*download the whole folder"),
    "i.safetensors": (_lone, "without adapter_config.json next to i.safetensors"),
    "j.pt": (_model, "the weights of a whole model(.|\n)*lorac extract"),
    "j.safetensors": (_model, "the weights of a whole model(.|\n)*lorac extract"),
    "k": (os.mkdir, "an empty folder"),
    "l": (_config, "adapter_config.json' is a web page"),
}
"""Name -> how it is made, and what the message says."""


@pytest.mark.parametrize("name", MISTAKES)
def test_names_the_mistake(name: str, tmp_path: Path) -> None:
    make, said = MISTAKES[name]
    make(tmp_path / name)
    with pytest.raises(lorac.FormatError, match=said):
        lorac.load_adapter(tmp_path / name)


def test_names_a_pointer_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["x"]}')
    _pointer(tmp_path / "adapter_model.safetensors")
    with pytest.raises(lorac.FormatError, match=r"adapter_model\.safetensors' is a pointer of Git LFS"):
        lorac.load_adapter(tmp_path)
