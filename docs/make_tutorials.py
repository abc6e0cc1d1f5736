"""Run the notebooks of examples/tutorials, and write each as a page with its outputs and as a notebook.

    python -m docs.make_tutorials [NAME ...]

A notebook is a script whose cells begin with ``# %%``, as jupytext reads it. Lines of progress are left out.
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbconvert.writers import FilesWriter

ROOT = Path(__file__).parents[1]
SOURCES, PAGES = ROOT / "examples/tutorials", ROOT / "docs/tutorials"
FOOT = "\n\n*Made by `make tutorials`; `jupyter lab docs/tutorials/{name}.ipynb` opens [the notebook]({name}.ipynb).*\n"


def run(name: str) -> None:
    """Run the cells of one script, and write the notebook with their outputs."""
    notebook = jupytext.read(SOURCES / f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, kernel_name="python3", timeout=None, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    PAGES.mkdir(exist_ok=True)
    nbformat.write(notebook, PAGES / f"{name}.ipynb")


def write_page(name: str) -> None:
    """Write the page of a notebook, and its pictures."""
    notebook = nbformat.read(PAGES / f"{name}.ipynb", as_version=4)
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    text, resources = exporter.from_notebook_node(notebook, {"output_files_dir": f"{name}_files"})
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    FilesWriter(build_directory=str(PAGES)).write(lines + FOOT.format(name=name), resources, notebook_name=name)


if __name__ == "__main__":
    for given in sys.argv[1:] or sorted(path.stem for path in SOURCES.glob("*.py")):
        print(given, flush=True)
        run(given)
        write_page(given)
