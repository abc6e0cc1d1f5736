"""Features of other trainers: the page that lists them, and a run of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.trainers.__main__ import page
from campaigns.trainers.features import REFUSED, THERE, Feature
from campaigns.trainers.work import run, work_folder
from lorac.trainer.recipe import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
FEATURES = [*itertools.chain(*THERE.values())]
QUICK = ["own columns", "LoRA+"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with work_folder(tmp_path_factory.mktemp("features")) as made:
        yield made


def test_the_page_equals_the_features() -> None:
    assert PAGE.read_text(encoding="utf-8") == "\n".join(page()) + "\n"


def test_every_task_of_a_recipe_is_a_feature() -> None:
    found = {feature.recipe.get("task", feature.more.get("task", "sft")) for feature in FEATURES}
    assert found == {*TASKS}
    assert len({feature.name for feature in (*FEATURES, *REFUSED)}) == len(FEATURES) + len(REFUSED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow("a run; trainer/ has the tests of recipes", keep=QUICK)
@pytest.mark.medium("a run; trainer/test_options.py runs recipes by their files")
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_runs(feature: Feature, folder: Path) -> None:
    assert run(feature, FEATURES.index(feature), folder).partition(":")[0] in ("ran", "not run")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.medium("a call of the command line; trainer/test_wrong_recipes.py rejects more", keep=["PPO"])
@pytest.mark.parametrize("feature", REFUSED, ids=lambda feature: feature.name)
def test_rejects_a_feature_by_name(feature: Feature, folder: Path) -> None:
    assert run(feature, len(FEATURES) + REFUSED.index(feature), folder) == "refused"
