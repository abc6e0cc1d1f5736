"""Strings that end an answer, found in text that comes in parts."""

from typing import final


@final
class StopString:
    """A search for a string in text that comes in parts, by Knuth, Morris and Pratt: it reads each character once.

    Args:
        text: the string, not empty.

    Attributes:
        begun: the length of the longest end of the text so far with which the string begins.
    """

    def __init__(self, text: str) -> None:
        self._text, self.begun = text, 0
        self._borders = [0]  # of each beginning of the string: the longest end with which the string begins, too
        for char in text[1:]:
            self._borders.append(self._extend(self._borders[-1], char))

    def find(self, new: str) -> int | None:
        """Read more text; return where in it the string ends, or None if it does not yet."""
        for place, char in enumerate(new, 1):
            self.begun = self._extend(self.begun, char)
            if self.begun == len(self._text):
                return place
        return None

    def _extend(self, begun: int, char: str) -> int:
        """Return the length of the beginning that a text ends with behind one more character."""
        while begun and self._text[begun] != char:
            begun = self._borders[begun - 1]
        return begun + (self._text[begun] == char)
