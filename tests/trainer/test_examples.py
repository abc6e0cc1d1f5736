"""The recipes in examples/recipes, as the command line runs them: each learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import recipe_data
from lorac.trainer import read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
LEARNS = {
    "digits": lambda log: log("eval_accuracy")[-1] > 0.6,
    "docs": lambda log: log("eval_loss")[-1] < log("eval_loss")[0],
    "pairs": lambda log: log("rewards/margins")[-1] > 0.1,
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_example_is_a_recipe(file):
    recipe = read_recipe(file)
    assert recipe.adapters.keys() == {file.stem}
    assert recipe.out == f"build/runs/{file.stem}"
    assert file.stem in LEARNS


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_example_learns(file, tmp_path):
    recipe_data.main()
    command = [Path(sys.executable).with_name("lorac"), "train", file, "--out", tmp_path / "run"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HOME": str(tmp_path / "hub")})
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert LEARNS[file.stem](lambda key: [entry[key] for entry in history if key in entry]), history
    assert any(path.name.startswith(file.stem) for path in (tmp_path / "run").iterdir())
