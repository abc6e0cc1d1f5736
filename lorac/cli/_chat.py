"""A chat in the terminal: lines are turns, and lines that begin with a slash are commands."""

import sys
from collections.abc import Callable

from lorac.cli._generation import TextStreamer, TextWriter
from lorac.cli._models import parse_choice
from lorac.cli._output import format_error
from lorac.errors import InputMismatch, LoracError, OptionError, escape_controls, not_one_of


class Chat:
    """A conversation.

    Args:
        writer: writes the answers.
    """

    def __init__(self, writer: TextWriter) -> None:
        if not getattr(writer.tokenizer, "chat_template", None):
            raise OptionError("the tokenizer has no chat template", next_step='--prompt "TEXT" continues a text')
        self._writer = writer
        self._turns: list[dict[str, str]] = []
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/adapter": ("NAME, none, or A=0.7,B=0.3: the adapters for the next answers", self._swap),
            "/adapters": ("list the adapters", lambda _: self._list()),
            "/new": ("begin a new conversation", lambda _: self._turns.clear()),
            "/exit": ("end", lambda _: None),
        }

    def run(self) -> None:
        """Take turns until the end of the input, or /exit."""
        if sys.stdin.isatty():
            print("\n".join(f"{name:10s} {meaning}" for name, (meaning, _) in self._commands.items()))
        while True:
            try:
                line = input(f"[{self._active}] > " if sys.stdin.isatty() else "").strip()
                if line == "/exit":
                    return
                if line.startswith("/"):
                    name, *rest = line.split(maxsplit=1)
                    if name not in self._commands:
                        raise not_one_of("there is no command", name, self._commands)
                    self._commands[name][1]("".join(rest))
                elif line:
                    self._answer(line)
            except EOFError:
                return
            except LoracError as error:
                print(format_error(error), file=sys.stderr)

    @property
    def _active(self) -> str:
        active = self._writer.compiled.active
        return ", ".join(n if strength == 1 else f"{n}*{strength:g}" for n, strength in active.items()) or "none"

    def _swap(self, spec: str) -> None:
        if not spec:
            raise OptionError("/adapter needs a name", next_step="write /adapter NAME, none, or A=0.7,B=0.3")
        self._writer.compiled.swap(parse_choice(spec))
        print(escape_controls(f"adapter: {self._active}"))

    def _list(self) -> None:
        compiled = self._writer.compiled
        for name in compiled.adapters:
            print(escape_controls(f"{'*' if name in compiled.active else ' '} {name}"))
        print(f"{' ' if compiled.active else '*'} none")

    def _answer(self, line: str) -> None:
        """Answer one turn. The shown part of an interrupted answer stays in the conversation; a failed one does not."""
        turns = [*self._turns, {"role": "user", "content": line}]
        inputs = self._writer.encode_turns(turns)
        if self._writer.positions_left(inputs) == 0:
            raise InputMismatch(
                "the conversation is longer than the model has positions for",
                next_step="/new begins a new conversation",
            )
        streamer = TextStreamer(self._writer.tokenizer, lambda piece: print(piece, end="", flush=True))
        try:
            self._writer.write(inputs, streamer)
        except KeyboardInterrupt:
            if not streamer.text:
                return
        finally:
            if streamer.tokens:
                print()
        self._turns = [*turns, {"role": "assistant", "content": streamer.text}]
