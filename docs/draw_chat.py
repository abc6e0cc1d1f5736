"""The moving picture of README: a chat whose adapter is swapped midway, drawn from the chat tutorial's outputs.

    python -m docs.draw_chat

The answers are those that ``make tutorials`` printed. The picture is an SVG that moves by CSS, so that it needs no
player, and takes the reader's colours.
"""

from __future__ import annotations

import html
import itertools
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

NOTEBOOK = Path(__file__).parent / "tutorials" / "chat.ipynb"
PICTURE = Path(__file__).parent / "pictures" / "chat.svg"
QUESTION = "What is the sea?"
ADAPTERS = {
    "None": "None",
    "pirate": '"pirate"',
    "polite": '"polite"',
    "pirate:0.6+loud:0.6": '{"pirate": 0.6, "loud": 0.6}',
}
"""The choices by the name that the tutorial prints before their answers, as Python writes them."""
COLUMNS, LINE, SIZE, MARGIN = 76, 22, 15, 20
"""Letters of a line; its height, the letters' and the margin's in pixels."""
SECONDS, PAUSE, REST = 0.9, 0.6, 4.0
"""A line appears after so many seconds, an answer after a pause; the picture begins with the rest, all lines shown."""
STYLE = """
  text { font: %dpx ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
  .call { fill: #0550ae } .asked { fill: #656d76 } rect { fill: #f6f8fa; stroke: #d0d7de }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .call { fill: #79c0ff } .asked { fill: #9198a1 } rect { fill: #161b22; stroke: #30363d }
  }
  @media (prefers-reduced-motion: reduce) { text { opacity: 1; animation: none !important } }
"""


def answers(notebook: Path = NOTEBOOK) -> dict[str, str]:
    """Return the printed answers by choice.

    Raises:
        LookupError: the notebook holds no answer of an adapter
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    printed = [line for cell in cells for one in cell.get("outputs", ()) for line in one.get("text", ())]
    answered = list(itertools.dropwhile(lambda line: not line.startswith("None: "), printed))
    found = {name: next((line for line in answered if line.startswith(f"{name}: ")), "") for name in ADAPTERS}
    missing = [name for name, line in found.items() if not line]
    if missing:
        raise LookupError(f"{notebook} holds no answer of {', '.join(missing)}; run `make tutorials`")
    return {name: line.removeprefix(f"{name}: ").strip() for name, line in found.items()}


def lines() -> Iterator[tuple[str, str]]:
    """Yield each line and its class: a call of lorac, a question, an answer."""
    found = answers()
    for name, choice in ADAPTERS.items():
        yield "call", f">>> compiled.swap({choice})"
        yield "asked", f"you: {QUESTION}"
        for number, line in enumerate(textwrap.wrap(found[name], COLUMNS - 5)):
            yield "told", f"{'     ' if number else 'llm: '}{line}"


def draw() -> str:
    """Return the SVG."""
    drawn = list(lines())
    starts, clock = [], 0.0
    for kind, _ in drawn:
        clock += SECONDS + (PAUSE if kind == "call" else 0)
        starts.append(clock)
    whole = clock + REST
    frames, texts = [], []
    for number, ((kind, line), start) in enumerate(zip(drawn, starts, strict=True)):
        shown = 100 * start / whole
        frames.append(
            f"  @keyframes l{number} {{ 0%, {shown:.2f}% {{ opacity: 0 }} {shown + 0.8:.2f}%, 100% {{ opacity: 1 }} }}"
        )
        height = MARGIN + LINE * number + SIZE
        animation = f"animation: l{number} {whole:.1f}s {REST - whole:.1f}s infinite"
        texts.append(f'  <text class="{kind}" x="{MARGIN}" y="{height}" style="{animation}">{html.escape(line)}</text>')
    width, height = 2 * MARGIN + round(0.605 * SIZE * COLUMNS), 2 * MARGIN + LINE * len(drawn)
    frame = f'  <rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    style = f"<style>{STYLE % SIZE}{chr(10).join(frames)}\n  </style>"
    title = "<title>A chat whose adapter is swapped while the program runs</title>"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    return "\n".join([opening, title, style, frame, *texts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
