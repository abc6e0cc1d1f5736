"""Images on the command line: generate, with what the model's processor makes, is the oracle."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lorac
from lorac.cli import main
from tests.image_models import FEATURES, batch, made, make_processor

TOLD = ("--adapters", "one", "--json", "--temperature", "0", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model with its processor, with one that has no turns, and pictures."""
    place = tmp_path_factory.mktemp("images")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "forward reads 'image_grid_thw' as numbers", lorac.LoracWarning)
        whole = lorac.compile(
            made("qwen2_5_vl"), target="onnxruntime", active=None, cache=True, self_test=False,
            example_inputs=batch("qwen2_5_vl", (3, 3), seed=7),
        )  # fmt: skip
    processor = make_processor()
    whole.save(place / "seen", tokenizer=processor)
    processor.chat_template = None
    whole.save(place / "plain", tokenizer=processor)
    for name, turned in (("one.png", 1), ("two.jpg", 6)):
        exif = Image.Exif()
        exif[0x0112] = turned
        picture = Image.frombytes("RGB", (16, 16), bytes(turned * (37 + 11 * i) % 256 for i in range(768)))
        picture.save(place / name, exif=exif)
    picture.save(place / "moving.gif", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    Image.new("1", (5000, 4000)).save(place / "large.png")
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nIHDR")
    (place / "heavy.png").write_bytes(bytes(5 << 20))
    return place


def _run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str) -> tuple[int, str, str]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lorac", "run", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def _expect(compiled: Any, given: Any) -> str:
    tokens = compiled.generate(**given, adapters="one", max_new_tokens=8, do_sample=False)
    text: str = compiled.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.medium("test_text.py, and serving/test_images.py")
def test_a_prompt_about_images_is_answered_as_generate_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    compiled, answers = lorac.load(folder / "seen"), set()
    for names in (["one.png"], ["two.jpg"], ["one.png", "two.jpg"]):
        words = [word for name in names for word in ("--image", name)]
        code, out, err = _run(folder, monkeypatch, capsys, "seen", *words, "-p", "say it", *TOLD)
        assert code == 0, err
        parts = [{"type": "image", "path": str(folder / name)} for name in names]  # as transformers reads files
        given = compiled.processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": "say it"}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        assert given["input_ids"].shape[1] > FEATURES * len(names)
        answers.add(json.loads(out)["text"])
        assert json.loads(out)["text"] == _expect(compiled, given)
    assert len(answers) > 1


@pytest.mark.medium("test_text.py, and serving/test_images.py")
def test_a_processor_without_turns_gets_the_prompt_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    compiled, text = lorac.load(folder / "plain"), "<|vision_start|><|image_pad|><|vision_end|>say"
    code, out, err = _run(folder, monkeypatch, capsys, "plain", "--image", "one.png", "-p", text, *TOLD)
    assert code == 0, err
    given = compiled.processor(images=[Image.open(folder / "one.png")], text=text, return_tensors="pt")
    assert json.loads(out)["text"] == _expect(compiled, given)
    code, _, err = _run(folder, monkeypatch, capsys, "plain", "--image", "one.png", "-p", "say", *TOLD)
    assert (code, "processor fails" in err and "its token for each image" in err) == (1, True), err


@pytest.mark.medium("test_text.py")
def test_rejects_images_that_a_prompt_cannot_have(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for names, text in (
        (["broken.png"], "'broken.png' is not a whole GIF or JPEG or PNG or WEBP file"),
        (["missing.png"], "'missing.png' cannot be read"),
        (["moving.gif"], "'moving.gif' is animated"),
        (["large.png"], "'large.png' has 5000 x 4000 pixels, and all images of a request together may have 16777216"),
        (["heavy.png"], "--image gives 1 files of 5242880 bytes in all, and a prompt takes at most 8 files"),
        (["one.png"] * 9, "--image gives 9 files"),
    ):
        words = [word for name in names for word in ("--image", name)]
        code, _, err = _run(folder, monkeypatch, capsys, "seen", *words, "-p", "x")
        assert (code, text in err) == (1, True), err
    code, _, err = _run(folder, monkeypatch, capsys, "seen", "--image", "one.png")
    assert (code, "--image goes with a --prompt" in err) == (2, True), err
