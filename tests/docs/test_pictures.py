"""The moving picture of README and the start page: it shows what the chat tutorial printed."""

import json

import pytest

from docs import draw_chat


def test_the_picture_shows_the_answers_of_the_tutorial():
    assert draw_chat.PICTURE.read_text(encoding="utf-8") == draw_chat.draw()


def test_rejects_a_notebook_that_was_not_run(tmp_path):
    cells = json.loads(draw_chat.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        cell.pop("outputs", None)
    (tmp_path / "chat.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with pytest.raises(LookupError, match="make tutorials"):
        draw_chat.answers(tmp_path / "chat.ipynb")
