"""Twenty mistakes with an adapter's file: the answer names each, and the command in it is run and works."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorac
from lorac.cli import main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def tiny_llama(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**{**sizes, "num_attention_heads": 2, **fields})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models `base`, `wide` and `tuned`, and the adapters `good`, `dora` and `hashed`, with a hash of the base."""
    folder = tmp_path_factory.mktemp("mistakes")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    tiny_llama(hidden_size=32).save_pretrained(folder / "wide")
    for name, dora in (("good", False), ("dora", True)):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, use_dora=dora)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / name)
    lorac.save_adapter(lorac.load_adapter(folder / "good", base), folder / "hashed", model=base)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    base.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return call


def renamed(change: Callable[[str], str]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        shutil.copytree("good", path)
        tensors = load_file(path / WEIGHTS)
        save_file({change(key): tensor for key, tensor in tensors.items()}, path / WEIGHTS)

    return make


def edited(**fields) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        shutil.copytree("good", path)
        (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | fields))

    return make


def replaced(name: str, data: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        shutil.copytree("good", path)
        (path / name).write_bytes(data)

    return make


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in Path("good").iterdir():
            archive.write(file, f"good/{file.name}")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.add("good")


def halved(path: Path) -> None:
    shutil.copytree("good", path)
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) - 64])


def infinite(path: Path) -> None:
    shutil.copytree("good", path)
    tensors = load_file(path / WEIGHTS)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, path / WEIGHTS)


def without_config(path: Path) -> None:
    shutil.copytree("good", path)
    (path / CONFIG).unlink()


def alone(path: Path) -> None:
    torch.save(load_file(Path("good", WEIGHTS)), path)


def nested(path: Path) -> None:
    shutil.copytree("good", path / "inner")


def again(cli, path) -> None:
    """Get the file once more, which is the only step there is."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree("good", path)


def unpack(cli, path) -> None:
    shutil.unpack_archive(path, path.with_name("unpacked"))
    assert cli("check", path.with_name("unpacked") / "good", "--model", "base")[0] == 0


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes:
        make: writes the file.
        words: in the answer, which names the mistake.
        mend: the step where it is not a command of lorac's.
        model: the model that is given.
        options: further options.
    """

    make: Callable[[Path], object]
    words: str
    mend: Callable[[Callable, Path], object] | None = None
    model: str = "base"
    options: tuple[str, ...] = ()


MISTAKES = {
    "module": Mistake(renamed(lambda key: f"module.{key}"), "accounts for 8 tensors"),
    "orig": Mistake(renamed(lambda key: key.replace("model.layers", "_orig_mod.model.layers")), "is not a module"),
    "doubled": Mistake(renamed(lambda key: f"base_model.model.{key}"), "is not a module of the model"),
    "moved": Mistake(renamed(lambda key: key.replace("model.layers", "language_model.model.layers")), "not a module"),
    "state": Mistake(renamed(lambda key: key.replace(".weight", ".default.weight")), "accounts for 8 tensors"),
    "bare": Mistake(renamed(lambda key: key.removeprefix("base_model.model.")), "accounts for 8 tensors"),
    "pointer": Mistake(replaced(WEIGHTS, POINTER), "a pointer of Git LFS(.|\n)*`git lfs pull`", again),
    "page": Mistake(replaced(WEIGHTS, b"<!DOCTYPE html>"), "a web page(.|\n)*/resolve/", again),
    "page-config": Mistake(replaced(CONFIG, b"<html>"), "a web page(.|\n)*/resolve/", again),
    "half": Mistake(halved, "ends 64 bytes early(.|\n)*download the file again", again),
    "a.zip": Mistake(zipped, "an archive(.|\n)*unpack it", unpack),
    "a.tar.gz": Mistake(tarred, "an archive(.|\n)*unpack it", unpack),
    "a.part": Mistake(lambda path: path.write_bytes(b"1"), "an unfinished download", again),
    "alone": Mistake(without_config, "without adapter_config.json(.|\n)*download the whole folder", again),
    "a.pt": Mistake(alone, "without adapter_config.json next to a.pt(.|\n)*download the whole folder", again),
    "inversion.pt": Mistake(
        lambda path: torch.save({"<cat>": torch.ones(3)}, path), "textual inversion(.|\n)*load_textual_inversion", again
    ),
    "model.safetensors": Mistake(
        lambda path: shutil.copyfile("base/model.safetensors", path),
        "the weights of a whole model(.|\n)*`lorac extract TUNED BASE OUT`",
        lambda cli, path: cli("extract", "tuned", "base", "out", "--to", "native")[0] == 0 or pytest.fail("extract"),
    ),
    "nested": Mistake(nested, "did you mean 'nested/inner'", lambda cli, path: shutil.copytree("nested/inner", "deep")),
    "empty": Mistake(lambda path: path.mkdir(), "an empty folder", again),
    "infinite": Mistake(infinite, "holds 32 NaN(.|\n)*earlier checkpoint", again),
    "field": Mistake(edited(rank="8"), "unknown field 'rank'", again),
    "other-model": Mistake(
        lambda path: shutil.copytree("good", path), "has shape .*, expected", lambda cli, path: None, "wide"
    ),
    "other-weights": Mistake(
        lambda path: shutil.copytree("hashed", path), "other base weights", lambda cli, path: None, "tuned"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_names_the_mistake_and_a_step_that_works(cli, folder, name):
    mistake, path = MISTAKES[name], Path(name)
    mistake.make(folder / name)
    code, page = cli("check", path, "--model", mistake.model, *mistake.options)
    assert code == 1
    assert re.search(mistake.words, page), page
    assert "  mend: " in page
    command = re.search(r"mend: `lorac ([^`]*)`", page)
    if mistake.mend is None:
        assert command, page
        words = {"ADAPTER": name, "OUT": f"{name}-mended", "MODEL": "base"}
        code, said = cli(*(words.get(word, word) for word in command[1].split()))
        assert code == 0, said
        path = Path(f"{name}-mended")
    else:
        mistake.mend(cli, folder / name)
    if mistake.mend is again or mistake.mend is None or mistake.model != "base":
        assert cli("check", path, "--model", "base", *mistake.options)[0] == 0


def test_merge_names_the_same_mistakes(cli, folder):
    renamed(lambda key: f"module.{key}")(folder / "wrapped")
    code, said = cli("merge", "base", "-a", "wrapped", "-o", "merged")
    assert code == 1
    assert "`lorac convert ADAPTER OUT --model MODEL --fix-names`" in said
    assert not (folder / "merged").exists()
    code, said = cli("merge", "base", "-a", "nothing.zip", "-o", "merged")
    assert (code, "there is no adapter at" in said) == (1, True)
