"""The page in a headless Chromium, as its reader uses and sees it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorac
from lorac.web import export_web
from tests.peft_files import make_peft
from tests.serving.browser import CHROMIUM, Tab, open_tab
from tests.web.conftest import IDS
from tests.web.serving import serve
from tests.web.test_module import expected
from tests.zoo import ZOO, tokenizer

pytestmark = [
    pytest.mark.slow("it starts a browser; test_module.py runs the module in Node.js"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here"),
]
READY = "document.getElementById('state')?.textContent.startsWith('ready')"
WITHOUT_GPU = "No available adapters."
"""Chromium's own words about a machine without WebGPU, where the page computes in WebAssembly."""
FAILED = "document.getElementById('failure')?.textContent"
WRITE = """
(async () => {{
  const tokens = [];
  for await (const {{ token }} of model.generate({ids}, {{ maxNewTokens: {new}, eos: [] }})) tokens.push(token);
  return tokens;
}})()
"""
ISOLATED = {"Cross_Origin_Opener_Policy": "same-origin", "Cross_Origin_Embedder_Policy": "require-corp"}


@pytest.fixture(scope="module")
def whole(artifact: Path, node_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with its packages."""
    folder = tmp_path_factory.mktemp("whole") / "page"
    export_web(artifact, folder, modules=node_modules)
    return folder


@pytest.fixture
def tab(whole: Path, tmp_path: Path) -> Iterator[Tab]:
    with serve(whole) as (url, _), open_tab(url, tmp_path) as opened:
        opened.wait_for(READY)
        yield opened


def choose(tab: Tab, name: str, strength: float | None = None) -> None:
    """Check an adapter or uncheck it, and give it a strength."""
    box = f"document.querySelector('input[name={name}]')"
    tab.evaluate(f"{box}.click()")
    if strength is not None:
        number = f"{box}.parentElement.querySelector('[type=number]')"
        tab.evaluate(f"{number}.value = {strength}; {number}.dispatchEvent(new Event('change'))")


def send(tab: Tab, text: str) -> None:
    tab.evaluate("document.getElementById('text').focus()")
    tab.call("Input.insertText", text=text)
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
    tab.wait_for("document.getElementById('stop').disabled && document.getElementById('text').value === ''")


def turns(tab: Tab) -> list[list[str]]:
    texts = "[...document.querySelectorAll('.turn')].map(turn => [...turn.children].map(part => part.textContent))"
    return list(tab.evaluate(texts))


def failure(tab: Tab) -> Any:
    return tab.evaluate(FAILED)


def write(tab: Tab, ids: list[int], new: int) -> list[int]:
    found: list[int] = tab.evaluate(WRITE.format(ids=ids, new=new))
    return found


def test_chats_and_switches_adapters(artifact: Path, tab: Tab) -> None:
    compiled, found = lorac.load(artifact), []

    def ask(text: str) -> None:
        tab.evaluate("document.getElementById('new').click()")
        send(tab, text)
        found.append(turns(tab))

    ask("Hi")
    choose(tab, "lora")
    tab.wait_for("'lora' in model.choice")
    ask("Who?")
    choose(tab, "dora"), choose(tab, "lora"), choose(tab, "lora", 0.5)
    tab.wait_for("model.choice.lora === 0.5 && 'dora' in model.choice")
    ask("Why?")
    for ((_, asked), (active, answer)), choice in zip(found, (None, "lora", {"lora": 0.5, "dora": 1}), strict=True):
        turn = [{"role": "user", "content": asked}]
        options = {"return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
        ids = compiled.tokenizer.apply_chat_template(turn, **options)["input_ids"]
        new = expected(compiled, choice, ids[0].tolist(), 128 - ids.shape[1])
        end = new.index(2) + 1 if 2 in new else len(new)  # the model's end of a text
        wanted = compiled.tokenizer.decode(new[:end], skip_special_tokens=True)
        assert answer == wanted, (choice, answer, wanted)
        assert active == (
            "no adapter" if choice is None else choice if isinstance(choice, str) else "dora + 0.5 × lora"
        )
    tab.evaluate("document.getElementById('new').click()")
    tab.evaluate("document.getElementById('text').focus()")
    tab.call("Input.insertText", text="x" * 200)
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
    tab.wait_for(FAILED)
    assert "the text has 205 tokens, and the model positions for 128" in failure(tab)
    assert turns(tab) == [] and all(WITHOUT_GPU in said for said in tab.said)


def test_needs_no_other_server_and_none_once_it_is_loaded(artifact: Path, whole: Path, tmp_path: Path) -> None:
    with serve(whole) as (url, paths), open_tab(url, tmp_path) as tab:
        tab.wait_for(READY)
        tab.evaluate("model.swap('dora')")
        assert tab.evaluate("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)") == [
            url.rstrip("/")
        ] * tab.evaluate("performance.getEntriesByType('resource').length")
        tab.evaluate("model.swap('lora')")
        asked = len(paths)
        refused = "fetch('https://example.org/').then(() => 'sent', (error) => error.message)"
        assert tab.evaluate(refused) != "sent"
    with open_tab("about:blank", tmp_path):
        assert len(paths) == asked


def test_works_again_after_a_reload_and_with_threads(artifact: Path, whole: Path, tmp_path: Path) -> None:
    compiled = lorac.load(artifact)
    with serve(whole, **ISOLATED) as (url, _), open_tab(url, tmp_path) as tab:
        for name in ("lora", "dora"):
            tab.wait_for(READY)
            assert tab.evaluate("crossOriginIsolated")
            tab.evaluate(f"model.swap({name!r})")
            assert write(tab, IDS, 40) == expected(compiled, name, IDS, 40)
            tab.evaluate("delete globalThis.model")
            tab.call("Page.reload")


def test_shows_in_words_how_a_file_is_wrong(artifact: Path, tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "wrong.txt").write_text("not a file of tensors", encoding="utf-8")
    compiled = lorac.load(artifact)
    compiled.save_choice(tmp_path / "both.onnx_adapter", {"lora": 0.5, "dora": 1})

    def add(name: str) -> None:
        node = tab.call("DOM.querySelector", nodeId=tab.call("DOM.getDocument")["root"]["nodeId"], selector="#file")
        tab.call("DOM.setFileInputFiles", files=[str(tmp_path / name)], nodeId=node["nodeId"])

    add("wrong.txt")
    tab.wait_for(FAILED)
    assert "'wrong' is not a file of slots" in failure(tab)
    add("both.onnx_adapter")
    tab.wait_for("document.querySelector('input[name=both]') !== null")
    choose(tab, "both")
    tab.wait_for("'both' in model.choice")
    assert failure(tab) == ""
    assert write(tab, IDS, 20) == expected(compiled, {"lora": 0.5, "dora": 1}, IDS, 20)


@pytest.mark.parametrize("change", ["damaged", "missing"])
def test_shows_in_words_that_a_page_is_damaged(whole: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(whole, tmp_path / "page")
    entry = json.loads((tmp_path / "page" / "web.json").read_text("utf-8"))["weights"]["weights0"][0]
    part = tmp_path / "page" / "files" / entry["sha256"]
    part.write_bytes(bytes(entry["bytes"])) if change == "damaged" else part.unlink()
    with serve(tmp_path / "page") as (url, _), open_tab(url, tmp_path / "profile") as tab:
        tab.wait_for(FAILED)
        reason = "was changed or damaged" if change == "damaged" else "the server answers 404"
        assert reason in failure(tab)


@pytest.mark.timeout(3600)
def test_smollm2_writes_pythons_tokens_with_three_adapters_by_turns(node_modules: Path, tmp_path: Path) -> None:
    host: Any = ZOO["smollm2"].fresh()
    words = tokenizer("smollm2")
    ids = words("The three primary colours are red, yellow and")["input_ids"]
    given = {"input_ids": torch.tensor([ids, ids])}
    configs: dict[str, Any] = {
        "lora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj", "gate_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    make = functools.partial(make_peft, host, inputs=given, outputs=("logits",), contribution=0.15)
    for name, config in configs.items():
        make(tmp_path / name, config)
    options: dict[str, Any] = {"weights": "int4", "accuracy_level": 1, "active": None, "self_test": False}
    adapters = {name: tmp_path / name for name in configs}
    compiled = lorac.compile(host, adapters, target="onnxruntime", cache=True, **options)
    compiled.save(tmp_path / "artifact", tokenizer=words)
    export_web(tmp_path / "artifact", tmp_path / "page", modules=node_modules, part_mib=25)
    with serve(tmp_path / "page") as (url, _), open_tab(url, tmp_path / "profile") as tab:
        tab.wait_for(READY)
        read, seen = [*ids], set[str]()
        for name, new in (("lora", 34), ("dora", 33), ("ia3", 33)):
            tab.evaluate(f"model.swap({name!r})")
            found = write(tab, read, new)
            assert found == expected(compiled, name, read, new)
            assert found != expected(compiled, None, read, new)
            read += found
            seen.add(str(found))
        assert len(read) == len(ids) + 100 and len(seen) == 3
        assert tab.evaluate(f"model.decode({read})") == words.decode(read, skip_special_tokens=True)
