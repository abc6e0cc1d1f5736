"""The page in a browser, as its reader uses and sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import CHROMIUM, Tab, open_tab
from tests.serving.models import alone, make_app, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here"),
]
EVIL = "<img src=x onerror=document.title='run'>"


@pytest.fixture(scope="module")
def app(compiled: Any) -> Iterator[Any]:
    compiled.add_adapter(compiled.adapters["one"], name=EVIL)
    yield make_app(compiled, keys={"open sesame": "a"})
    compiled.remove_adapter(EVIL)


@pytest.fixture
def tab(app: Any, tmp_path: Path) -> Iterator[Tab]:
    with serve(app) as url, open_tab(url, tmp_path) as opened:
        opened.wait_for("document.activeElement?.id === 'key' && document.getElementById('load').textContent")
        yield opened


def enter_key(tab: Tab) -> None:
    tab.call("Input.insertText", text="open sesame")
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
    tab.wait_for("document.querySelectorAll('#adapters li').length === 3")
    tab.evaluate("document.getElementById('temperature').value = 0")


def send(tab: Tab, text: str) -> None:
    tab.evaluate("document.getElementById('message').focus()")
    tab.call("Input.insertText", text=text)
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")


def choose(tab: Tab, name: str, weight: float | None = None) -> None:
    item = f"[...document.querySelectorAll('#adapters li')].find(item => item.innerText.trim() === {name!r})"
    tab.evaluate(f"{item}.querySelector('[type=checkbox]').click()")
    if weight is not None:
        tab.evaluate(
            f"box = {item}.querySelector('[type=number]'); box.value = {weight}; box.dispatchEvent(new Event('input'))"
        )


def answers(tab: Tab, count: int) -> list[str]:
    done = "document.querySelectorAll('.assistant[aria-busy=false]')"
    tab.wait_for(f"{done}.length === {count}")
    return list(tab.evaluate(f"[...{done}].map(turn => turn.querySelector('p').textContent)"))


def said(tab: Tab) -> list[str]:
    """Warnings and errors of the browser, but the refusal that it reports before the key is given."""
    return [line for line in tab.said if '"verbose"' not in line and "401" not in line]


def test_a_reader_chats_with_a_mixture(compiled: Any, tab: Tab) -> None:
    enter_key(tab)
    choose(tab, "one", 0.7)
    choose(tab, "two", 0.3)
    tab.evaluate("document.getElementById('tokens').value = 9")
    send(tab, "hello <b>you</b>")
    mixture = {"one": 0.7, "two": 0.3}
    prompt = "uhello <b>you</b>;"
    first = alone(compiled, prompt, mixture, max_new_tokens=9, do_sample=False)
    assert answers(tab, 1) == [first]
    send(tab, "go on")
    second = alone(compiled, f"{prompt}a{first};ugo on;", mixture, max_new_tokens=9, do_sample=False)
    assert answers(tab, 2) == [first, second], "the conversation so far is part of the prompt"
    footer = tab.evaluate("document.querySelector('.assistant footer').textContent")
    assert (
        footer.startswith("9 tokens · ") and "tokens/s · first after" in footer and footer.endswith("cut at the limit")
    )
    assert tab.evaluate("document.querySelector('.assistant h3').textContent") == "one:0.7+two:0.3"
    assert said(tab) == []


def test_names_are_text_and_the_key_is_kept_nowhere(compiled: Any, tab: Tab) -> None:
    enter_key(tab)
    choose(tab, EVIL)
    tab.evaluate("document.getElementById('tokens').value = 5")
    send(tab, "hello")
    assert answers(tab, 1) == [alone(compiled, "uhello;", EVIL, max_new_tokens=5, do_sample=False)]
    assert tab.evaluate("document.querySelector('.assistant h3').textContent") == EVIL
    assert tab.evaluate("document.title") == "lorac" and tab.evaluate("document.images.length") == 0
    assert tab.evaluate("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie])") == '[0,0,""]'
    assert said(tab) == []


def test_escape_stops_an_answer_and_a_refusal_gives_the_message_back(app: Any, tab: Tab) -> None:
    enter_key(tab)
    with app.state.scheduler._changed:  # nothing is computed meanwhile
        send(tab, "hello")
        tab.wait_for("!document.getElementById('stop').hidden")
        tab.press("Escape", windowsVirtualKeyCode=27)
        tab.wait_for("document.querySelector('.assistant footer').textContent.includes('stopped')")
    tab.evaluate("document.getElementById('tokens').value = 5000")
    send(tab, "again")
    refusal = tab.wait_for("document.getElementById('failure').textContent")
    assert "5000" in refusal
    assert tab.evaluate("document.getElementById('message').value") == "again"
    tab.evaluate("document.getElementById('tokens').value = 3")
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
    assert len(answers(tab, 2)) == 2
    assert tab.evaluate("document.getElementById('failure').textContent") == ""
