"""Files that are often in the place of the one that was meant, by their first bytes."""

_PAGE = "a web page, not the file that it shows: on the hub, an address with /resolve/ gives the file"
_ARCHIVE = "an archive: unpack it, and give the folder or file in it"
_KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"pk\3\4": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"rar!": _ARCHIVE,
    b"\x1f\x8b": _ARCHIVE,
}
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".tmp")
"""Suffixes that browsers and libraries take off once a file is whole."""


def describe_mistake(begin: bytes, suffix: str) -> str | None:
    """Return the kind of a file that people give by mistake, and the next step.

    Args:
        begin: its first bytes, 512 where there are so many.
        suffix: of its name.
    """
    if suffix in _UNFINISHED:
        return "an unfinished download: get it once more"
    text = begin.lstrip().lower()
    if begin[257:262] == b"ustar":
        return _ARCHIVE
    return next((kind for magic, kind in _KINDS.items() if text.startswith(magic)), None)
