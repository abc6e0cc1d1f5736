"""`lorac variants`: the table of methods, for people and as a page."""

from typer.testing import CliRunner

import lorac
from lorac.analysis.methods import render_markdown
from lorac.cli import app
from lorac.cli.models import method_rows


def test_the_page():
    done = CliRunner().invoke(app, ["variants", "--markdown"])
    assert done.exit_code == 0
    assert done.output == render_markdown(method_rows(lorac.variants().values()))


def test_brackets_are_not_markup():
    done = CliRunner().invoke(app, ["variants"], env={"COLUMNS": "400"})
    assert done.exit_code == 0
    assert "W'[o,i,u,v]" in done.output
