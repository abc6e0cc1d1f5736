"""The pages of docs/tutorials are those of the scripts in examples/tutorials; ``test_blocks`` runs them."""

import json

import pytest

from tests.docs.pages import ROOT, blocks

SOURCES = sorted((ROOT / "examples/tutorials").glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_page_and_notebook_have_the_cells_of_the_script(source):
    cells = [cell.split("\n", 1) for cell in ("\n" + source.read_text(encoding="utf-8")).split("\n# %%")[1:]]
    code = [text.strip() for kind, text in cells if not kind.strip()]
    page = ROOT / "docs/tutorials" / f"{source.stem}.md"
    notebook = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))
    shown = ["".join(cell["source"]).strip() for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 3
    assert [block.text.strip() for block in blocks(page) if block.language == "python"] == code == shown


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_page_has_outputs_and_no_error(source):
    notebook = json.loads((ROOT / "docs/tutorials" / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
    kinds = [output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert "stream" in kinds
    assert "error" not in kinds
