"""Names that may become parts of paths, log lines and requests."""

import re

from lorac.errors import AdapterError, short

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def check_name(subject: str, name: object) -> str:
    """Return a name, if it is one.

    Args:
        subject: whose name it is: "an adapter".

    Raises:
        AdapterError: it is not text, too long, or has characters with a meaning elsewhere.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise AdapterError(
        f"{subject} cannot be called {short(name)}",
        next_step="a name has 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or digit",
    )
