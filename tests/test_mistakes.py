"""Mistakes are answered in words: a golden text shows the messages, and the suggested corrections are run."""

import re

import lorac
from tests import goldens
from tests.mistakes import MISTAKES, World
from tests.mistakes_of_devices import DEVICES
from tests.mistakes_of_files import FILES
from tests.mistakes_of_generation import GENERATING
from tests.mistakes_of_memory import MEMORY
from tests.mistakes_of_methods import MORE
from tests.mistakes_of_starts import BEGINNING
from tests.mistakes_of_training import LOOPS
from tests.mistakes_of_words import WORDS

SUGGESTS = re.compile(r"(?<![\w'])[a-z_]+=|\w\(|`lorac |\blorac\.\w")
"""What in a next step is code."""


def test_every_mistake_is_answered_and_the_answer_helps(tmp_path):
    """Check all mistakes in one test, which share one world, and list what is wrong together."""
    world, said, wrong = World(tmp_path), "", []
    for mistake in (*MISTAKES, *FILES, *MORE, *GENERATING, *BEGINNING, *DEVICES, *WORDS, *MEMORY, *LOOPS):
        error = _made(mistake, world)
        said += f"# {mistake.name}\n{_shown(error, world)}\n\n"
        wrong += [f"{mistake.name}: {problem}" for problem in _problems(mistake, error, world)]
    goldens.check("mistakes", said)
    assert wrong == []


def _made(mistake, world):
    try:
        return mistake.wrong(world)
    except Exception as error:
        return error


def _shown(error, world):
    """The message; what torch and Python say in it is theirs to change, and paths and hashes are of this run."""
    text = f"lorac.{type(error).__name__} [{getattr(error, 'code', None)}]: {error}".replace(str(world.folder), "…")
    cause = error.__cause__
    if cause is not None and not isinstance(cause, lorac.LoracError):
        for theirs in (str(cause), " ".join(str(cause).partition("The error above")[0].split())):
            text = text.replace(theirs, "…")
    return re.sub(r"[0-9a-f]{32}", "…", text)


def _problems(mistake, error, world):
    if not isinstance(error, lorac.LoracError):
        yield f"is answered by {error!r}"
    elif not error.next_step:
        yield "has no next step"
    elif mistake.right is None and SUGGESTS.search(error.next_step):
        yield f"nobody runs what is suggested: {error.next_step}"
    else:
        yield from _refused(mistake, str(error), world)


def _refused(mistake, said, world):
    try:
        if mistake.right is not None:
            mistake.right(world, said)
    except Exception as error:
        yield f"what is suggested fails: {error!r}"


def test_recognises_code_in_next_steps():
    assert SUGGESTS.search("pass model=, or another")
    assert SUGGESTS.search("call compiled(...)")
    assert not SUGGESTS.search("give a name, {name: strength}, or None")
