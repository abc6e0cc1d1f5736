"""Search for stop strings in text that comes in parts."""

from typing import final


@final
class StopString:
    """A Knuth-Morris-Pratt search for a string in text that comes in parts: it reads each character once.

    Args:
        text: the string, not empty.

    Attributes:
        begun: the length of the longest suffix of the text so far that is a prefix of the string.
    """

    def __init__(self, text: str) -> None:
        self._text, self.begun = text, 0
        self._borders = [0]  # for each prefix: the length of its longest proper suffix that is a prefix too
        for char in text[1:]:
            self._borders.append(self._extend(self._borders[-1], char))

    def find(self, new: str) -> int | None:
        """Read new text; return the position in it where the string ends, or None if the string does not end in it."""
        for place, char in enumerate(new, 1):
            self.begun = self._extend(self.begun, char)
            if self.begun == len(self._text):
                return place
        return None

    def _extend(self, begun: int, char: str) -> int:
        """Return the length of the longest prefix with which the text ends after one more character."""
        while begun and self._text[begun] != char:
            begun = self._borders[begun - 1]
        return begun + (self._text[begun] == char)
