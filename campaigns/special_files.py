"""Entries that are not the file they stand for: pipes, devices, sockets, folders and links, which readers refuse.

A reader that waits for one of them hangs, which the campaign against files finds.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

KIND = "special"
"""The kind of the cases that put one in the place of a file, of any other kind."""


def _make_socket(target: Path) -> None:
    handle = os.open(target.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{handle}/{target.name}"[:100])  # the paths of sockets are short
    os.close(handle)


def _link_to_pipe(target: Path) -> None:
    pipe = target.with_name(f"{target.name}.pipe")
    os.mkfifo(pipe)
    target.symlink_to(pipe)


def _link_to(place: str) -> Callable[[Path], None]:
    return lambda target: target.symlink_to(place)


WAYS: tuple[Callable[[Path], None], ...] = (
    lambda target: None,
    Path.mkdir,
    os.mkfifo,
    _make_socket,
    _link_to_pipe,
    lambda target: target.symlink_to(target),
    *map(_link_to, ("/etc/hostname", "/etc", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "no such file")),
)
"""Each makes another entry at a path."""


def put(target: Path, chance: random.Random) -> None:
    """Put something else in the place of a file."""
    target.unlink()
    chance.choice(WAYS)(target)


def put_below(place: Path, chance: random.Random) -> None:
    """Put something else in the place of a file, or of one to three files of a folder."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for target in chance.sample(files, min(len(files), chance.choice((1, 1, 2, 3)))):
        put(target, chance)
