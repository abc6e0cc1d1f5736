"""Paths that callers give and that files name, and the translation of ``OSError`` into lorac's errors."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorac.argument_types import check_type
from lorac.errors import LoracError, OptionError, nearest_name, short

ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)
"""An address, even if ``Path`` has merged its slashes. A scheme has two letters or more, a drive of Windows has one."""
HUB_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<at>refs/(pr|convert)/\w+|[^/@]+))?(/(?P<inner>[^@]*))?(@(?P<revision>[^@]+))?",
    re.ASCII,
)
"""A name on the hub. The revision is after the repository, as in huggingface_hub's hf://, or at the end."""
_STEP = "give the path of a file or folder"
_LOCAL_STEP = "give a path; names of models and adapters are user/repo, hf://, s3://, gs:// and https://"
_DEVICE = r"(?i:con|prn|aux|nul|com\d|lpt\d)"
_PORTABLE_NAME = re.compile(rf"(?!{_DEVICE}$)[A-Za-z0-9][A-Za-z0-9_-]{{0,63}}", re.ASCII)
"""Names of adapters that every system accepts as file names; on Windows some are devices, with any ending."""


def parse_path(given: object, subject: str, kind: type[LoracError], code: str | None = None) -> Path:
    """Return a path, with ``~`` replaced by the home folder.

    Args:
        given: the path.
        subject: the path as the subject of a sentence: "the path of lorac.load".
        kind: the error for text that is not a path, with `code`.

    Raises:
        WrongType: it is neither text nor a path.
    """
    check_type(given, (str, os.PathLike), subject, next_step=_STEP)
    text = os.fspath(given)  # type: ignore[call-overload]  # checked above
    path = Path(text)
    if ADDRESS.fullmatch(str(path)):
        raise kind(f"{subject} is an address, {short(text)}", next_step=_LOCAL_STEP, code=code)
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL, or a lone surrogate
        fault = f"{subject} is {short(text)}, and no file can have that name"
        raise kind(fault, next_step=_STEP, code=code) from error
    except OSError:
        pass
    with contextlib.suppress(RuntimeError):  # there is no such user
        return path.expanduser()
    return path


def check_new(destination: Path) -> Path:
    """Return a path to write to.

    Raises:
        OptionError: a file, or a folder that is not empty, is there already.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OptionError(f"'{destination}' exists already", next_step="give a new path, or remove it first")
    return destination


def suggest_name(path: Path) -> str | None:
    """Return a next step for a missing path that could also be a name on the Hugging Face hub."""
    name = path.as_posix()
    return f"for the one of that name on the Hugging Face hub: 'hf://{name}'" if HUB_NAME.fullmatch(name) else None


_FOREIGN = re.compile(rf"[\\:\x00-\x1f\x7f]|[. ](?:/|$)|(?:^|/){_DEVICE}(?:\.[^/]*)?(?:/|$)")
"""Characters that separate folders, name drives or streams, or end names on some system; and Windows' devices."""


def is_inner_name(name: str) -> bool:
    """Return whether a name, relative and with slashes, stays inside its folder; links are not examined.

    Names of more than 255 bytes are none: no common system has longer names of files.
    """
    is_short = len(name.encode(errors="replace")) <= 255
    return is_short and not _FOREIGN.search(name) and {"", ".", ".."}.isdisjoint(name.split("/"))


def find_inner_path(folder: Path, name: str) -> Path | None:
    """Return the path for a name in a file, or None if the path could be outside the folder.

    Every path that lorac takes from a file passes through this function. A name is relative and has slashes. It may
    not be absolute, have empty parts or dots for parts, or pass through a link.

    Args:
        folder: the folder that the name is relative to.
        name: the name in the file.
    """
    if not is_inner_name(name):
        return None
    parts = name.split("/")
    steps = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return None if any(step.is_symlink() or getattr(step, "is_junction", bool)() for step in steps) else steps[-1]


def file_stems(names: Sequence[str], reserved: re.Pattern[str] | None = None) -> dict[str, str]:
    """Return the name of each adapter's files: the adapter's own if every system accepts it, else a number.

    Args:
        names: the adapters' names.
        reserved: a pattern of names that files of adapters must not have.
    """
    stems: dict[str, str] = {}
    for index, name in enumerate(names):
        taken = name.lower() in {stem.lower() for stem in stems.values()} or (reserved and reserved.fullmatch(name))
        stems[name] = name if _PORTABLE_NAME.fullmatch(name) and not taken else f"_{index}"
    return stems


@contextlib.contextmanager
def translate_os_errors(
    path: str | os.PathLike[str], kind: type[LoracError], verb: str, code: str | None = None
) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into one of lorac's errors, with the path and the system's reason.

    Args:
        path: the file that is read or written, for errors that name no path.
        kind: the error to raise, with `code`.
        verb: "read" or "written", for the text of the error.
    """
    try:
        yield
    except OSError as error:
        is_named = isinstance(error.filename, str) and error.filename2 is None  # of two, one is a temporary name
        named = error.filename if is_named else os.fspath(path)
        missing, folder = isinstance(error, FileNotFoundError), Path(named).parent
        raise kind(
            f"'{named}' cannot be {verb}: {error.strerror or error}",
            nearest=nearest_name(Path(named).name, os.listdir(folder)) if missing and folder.is_dir() else None,
            next_step="check that it exists, whether it is a file or a folder, and its permissions",
            code=code,
        ) from error
