"""The last line of pages that are made from the code."""

FOOT = "*Made by `make docs` from the code; `make check` fails where the two differ.*"
