"""Skeletons: a model without its forward has the same sites, and the same names of modules in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from examples.pipelines import build
from lorac.formats._image_files.original_names import find_original_names
from lorac.formats._image_files.places import list_pipeline
from lorac.frontend.components import Components
from lorac.frontend.model_view import ModelView
from lorac.frontend.skeleton import build_skeleton, describe_skeleton

pytest.importorskip("diffusers")


def rebuild(model: nn.Module) -> ModelView:
    """Return the view of a model's skeleton, after a way through JSON."""
    return ModelView.of(build_skeleton(json.loads(json.dumps(describe_skeleton(model)))))


@pytest.mark.parametrize("kind", ["stable_diffusion_xl", "flux"])
def test_files_of_pipelines_find_the_same_modules(kind: str, tmp_path: Path) -> None:
    models = {name: part for name, part in build(kind, tmp_path).components.items() if isinstance(part, nn.Module)}
    for model in (Components(models), *models.values()):
        view, found = ModelView.of(model), rebuild(model)
        assert found.sites == view.sites
        wanted, pipeline = list_pipeline(view), list_pipeline(found)
        assert {name: part.prefix for name, part in pipeline.items()} == {n: part.prefix for n, part in wanted.items()}
        assert {name: part.original for name, part in pipeline.items()} == {n: p.original for n, p in wanted.items()}
    assert find_original_names(next(iter(models[name] for name in ("unet", "transformer") if name in models)))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)


def test_ignores_class_names_that_are_not_identifiers() -> None:
    described = json.loads(json.dumps(describe_skeleton(nn.Sequential(_Plain()))))
    assert type(build_skeleton(described).get_submodule("0")).__name__ == "_Plain"
    described["modules"]["0"]["class"] = "somewhere.not a name"
    assert type(build_skeleton(described).get_submodule("0")) is nn.Module


def test_attention_with_biases_of_keys_and_values_has_a_skeleton() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    found = build_skeleton(json.loads(json.dumps(describe_skeleton(nn.Sequential(attention)))))
    assert found.get_parameter("0.bias_k").shape == attention.bias_k.shape
