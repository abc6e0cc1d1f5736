"""The parts of an artifact for generation: the configuration, and the tokenizer's files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.runtime.traits import StoredConfig
from lorac.storage.strict_json import parse_object
from tests.runtime.artifacts import assert_same_folders
from tests.runtime.generation.recompute import over
from tests.runtime.generation.texts import adapted, compiled, padded, prompts


def words() -> Any:
    """Return a tokenizer whose words are the model's ids, with a chat template."""
    import tokenizers
    import transformers

    known = {**{f"w{i}": i for i in range(94)}, "abcdef": 94, "?": 95}  # transformers reads stop strings by "abcdef"
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="?", pad_token="w0", bos_token="w1", eos_token="w2"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }} w9 {% endfor %}"
    return made


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a tokenizer."""
    made = tmp_path_factory.mktemp("generation") / "text"
    lorac.load(llama_folder).save(made, tokenizer=words())
    return made


def test_loads_the_tokenizer_on_first_use(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "text"
    shutil.copytree(folder, copied)
    loaded = lorac.load(copied)
    loaded.save(tmp_path / "again")
    assert_same_folders(copied, tmp_path / "again")
    shutil.rmtree(copied)
    assert loaded.tokenizer is loaded.tokenizer
    assert loaded.tokenizer("w3 w4 nothing")["input_ids"] == [3, 4, 95]
    chat = [{"role": "user", "content": "w5 w6"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "w5 w6 w9 "
    loaded.save(tmp_path / "third")
    assert lorac.load(tmp_path / "third").tokenizer("w3")["input_ids"] == [3]


def test_rejects_a_tokenizer_that_was_changed(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "text"
    shutil.copytree(folder, copied)
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(lorac.ArtifactError, match=r"tokenizer\.json"):
        lorac.load(copied)


@pytest.mark.medium("cli/test_text.py loads tokenizers; test_loads_the_tokenizer_on_first_use")
def test_rejects_files_that_are_not_a_tokenizer(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "os.system"}')

    compiled("llama").save(tmp_path / "text", tokenizer=Broken())
    loaded = lorac.load(tmp_path / "text")
    with pytest.raises(lorac.ArtifactError, match="tokenizer cannot be loaded"):
        _ = loaded.tokenizer


@pytest.mark.medium("test_onnxruntime.py generates with a program once it is loaded")
def test_a_loaded_artifact_keeps_the_generation_config(tmp_path: Path) -> None:
    """Over a cache it goes on as the model did; what the manifest says is all that is asked."""
    compiled("llama").save(folder := tmp_path / "eager")
    told = parse_object((folder / "manifest.json").read_text(), AssertionError)["components"]["main"]
    assert told["generation"]["eos_token_id"] == 2
    loaded = lorac.load(folder)
    with pytest.raises(lorac.Unavailable, match="keeps no cache"):
        loaded.generate(prompts()[0][None], max_new_tokens=2)
    served = over(compiled("llama"))
    served.traits = loaded.traits
    batch, options = padded(prompts(), "left"), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(served.generate(**batch, **options), compiled("llama").generate(**batch, **options))


def test_the_program_says_whether_it_has_an_encoder() -> None:
    """An artifact's configuration may be damaged."""
    served, row = over(compiled("llama")), prompts()[0][None]
    expected = served.generate(row, max_new_tokens=3, do_sample=False)
    ((name, traits),) = served.traits.items()
    config = StoredConfig({**traits.settings, "is_encoder_decoder": True})
    served.traits = {name: dataclasses.replace(traits, config=config)}
    assert torch.equal(served.generate(row, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("cached", [False, True], ids=["eager", "cached"])
def test_stop_strings_use_the_models_tokenizer(cached: bool) -> None:
    eager = lorac.compile(adapted("llama"))
    model = over(eager) if cached else eager
    row, options = prompts()[0][None], {"max_new_tokens": 8, "do_sample": False}
    whole = model.generate(row, **options)
    stop = words().decode(whole[0, row.shape[1] + 2 : row.shape[1] + 3])
    model.tokenizer = words()
    own = model.generate(row, **options, stop_strings=[stop])
    given = model.generate(row, **options, stop_strings=[stop], tokenizer=words())
    assert torch.equal(own, whole[:, : own.shape[1]])
    assert torch.equal(own, given)
    assert own.shape[1] == row.shape[1] + 3
