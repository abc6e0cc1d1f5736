"""A chat in the terminal: lines are turns, and those that begin with a slash are about the chat itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lorac.cli._generation import TextStreamer, TextWriter
from lorac.cli._models import parse_choice
from lorac.cli._output import format_error
from lorac.errors import LoracError, OptionError, nearest_name


class Chat:
    """What was said, and by which adapters it goes on.

    Args:
        writer: answers.
    """

    def __init__(self, writer: TextWriter) -> None:
        if not getattr(writer.tokenizer, "chat_template", None):
            raise OptionError(
                "the tokenizer has no chat template", next_step='--prompt "TEXT" goes on with a text as it is'
            )
        self._writer = writer
        self._said: list[dict[str, str]] = []
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/adapter": ("NAME, none, or A=0.7,B=0.3: who answers from now on", self._swap),
            "/adapters": ("who there is", lambda _: self._list()),
            "/new": ("forget what was said", lambda _: self._said.clear()),
            "/exit": ("end", lambda _: None),
        }

    def run(self) -> None:
        """Take turns until the end of the input, or /exit."""
        if sys.stdin.isatty():
            print("\n".join(f"{name:10s} {told}" for name, (told, _) in self._commands.items()))
        while (line := self._asked()) != "/exit":
            try:
                self._taken(line)
            except LoracError as error:
                print(format_error(error), file=sys.stderr)

    def _asked(self) -> str:
        """The next line; /exit where there is none."""
        shown = f"[{self._active}] > " if sys.stdin.isatty() else ""
        try:
            return input(shown).strip()
        except EOFError:
            return "/exit"

    @property
    def _active(self) -> str:
        active = self._writer.compiled.active
        return ", ".join(n if strength == 1 else f"{n}*{strength:g}" for n, strength in active.items()) or "none"

    def _taken(self, line: str) -> None:
        if line.startswith("/"):
            self._commanded(*line.split(maxsplit=1))
        elif line:
            self._answer(line)

    def _commanded(self, name: str, rest: str = "") -> None:
        if name not in self._commands:
            raise OptionError(
                f"there is no '{name}'",
                nearest=nearest_name(name, self._commands),
                next_step=f"there are {', '.join(self._commands)}",
            )
        self._commands[name][1](rest)

    def _swap(self, spec: str) -> None:
        if not spec:
            raise OptionError("/adapter needs to know which", next_step=f"write {self._commands['/adapter'][0]}")
        self._writer.compiled.swap(parse_choice(spec))
        print(f"adapter: {self._active}")

    def _list(self) -> None:
        compiled: Any = self._writer.compiled
        for name in compiled.adapters:
            print(f"{'*' if name in compiled.active else ' '} {name}")
        print(f"{' ' if compiled.active else '*'} none")

    def _answer(self, line: str) -> None:
        """One turn; what was written stays said when it is interrupted, and nothing of a turn that fails."""
        said = [*self._said, {"role": "user", "content": line}]
        shown = TextStreamer(self._writer.tokenizer, lambda piece: print(piece, end="", flush=True))
        try:
            self._writer.write(self._writer.turns(said), shown)
        except KeyboardInterrupt:
            pass
        finally:
            if shown.tokens:
                print()
        self._said = [*said, {"role": "assistant", "content": shown.text}]
