"""Lookup of a model's layers by the module names in a file."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lorac.errors import FormatError, missing_site_error, nearest_name
from lorac.formats._image_files.original_names import (
    TEMPLATES,
    Place,
    find_original_names,
    find_other_names,
)
from lorac.formats._image_files.spellings import COMPONENTS, DIFFERENCES, TensorName
from lorac.frontend.components import MAIN_GRAPH
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import CONVOLUTION_KINDS, Site, SiteKind

LAYERS = frozenset({SiteKind.LINEAR, *CONVOLUTION_KINDS.values()})
"""The kinds of site that files adapt."""
_OLD_LETTERS = {"q": ".to_q", "k": ".to_k", "v": ".to_v", "out": ".to_out.0"}
"""The layers of CLIP's attentions, which the oldest files name as those of U-Nets."""
_OLD_LETTER = re.compile(rf"\.({'|'.join(_OLD_LETTERS)})_proj$")
_TEXT_MODEL = "text_model."
"""The prefix of paths of CLIP's layers before transformers 5, which files still have."""


@dataclass(frozen=True)
class PipelineModel:
    """One model of a pipeline, and the names that files give its modules.

    Attributes:
        name: the name of the model in the pipeline.
        prefix: the prefix of its sites' paths.
        model: the model.
    """

    name: str
    prefix: str
    model: nn.Module

    @functools.cached_property
    def original(self) -> Mapping[str, Place]:
        """The names of modules in the authors' code."""
        return find_original_names(self.model)

    @functools.cached_property
    def uses_original_names(self) -> bool:
        """Whether sd-scripts writes the names of the authors' code: it does for SDXL, Flux and SD3."""
        config = getattr(self.model, "config", {})
        return type(self.model).__name__ in TEMPLATES or getattr(config, "addition_embed_type", None) == "text_time"

    @functools.cached_property
    def _modules(self) -> frozenset[str]:
        """Paths of modules."""
        return frozenset(path for path, _ in self.model.named_modules() if path)

    @functools.cached_property
    def _places(self) -> Mapping[str, frozenset[Place]]:
        """Name of a module, with underscores for dots -> its place; several places where the name is ambiguous."""
        own = self._modules
        named = [(path, Place((path,))) for path in own]
        named += [(f"{_TEXT_MODEL}{path}", Place((path,))) for path in own]
        for path in own:
            old = _OLD_LETTER.sub(lambda found: _OLD_LETTERS[found[1]], f"{_TEXT_MODEL}{path}")
            named.append((old, Place((path,))))
        named += [(path.removeprefix(_TEXT_MODEL), Place((path,))) for path in own if path.startswith(_TEXT_MODEL)]
        known: dict[str, set[Place]] = {}
        for name, place in (*named, *self.original.items(), *find_other_names(self.model).items()):
            known.setdefault(_underscore(name), set()).add(place)
        return {name: frozenset(places) for name, places in known.items()}

    def knows(self, name: TensorName, sites: Mapping[str, Site]) -> bool:
        """Return whether the model has a layer of that name that an adapter can change."""
        own = frozenset({Place((name.module,))}) if name.module in self._modules else frozenset()
        places = own or self._places.get(_underscore(name.module), frozenset())
        paths = [self.prefix + path for place in places for path in place.paths]
        return bool(paths) and (name.leaf in DIFFERENCES or all(p in sites and sites[p].kind in LAYERS for p in paths))

    def find(self, name: TensorName, adapter: str) -> Place:
        """Return the layers that a module of a file stands for.

        Raises:
            SiteError: the model has no such module.
            FormatError: several modules have that name.
        """
        if "." in name.module and name.module in self._modules:
            return Place((name.module,))
        found = self._places.get(_underscore(name.module), frozenset())
        if not found:
            raise missing_site_error(
                f"adapter '{adapter}' has the tensor '{name.key}', and no module of {self.described} has that name",
                nearest=nearest_name(_underscore(name.module), self._places),
                next_step="load the model that the adapter was trained on; `lorac sites MODEL` prints the sites of one",
            )
        if len(found) > 1:
            paths = " and ".join(sorted(f"'{place.paths[0]}'" for place in found))
            raise FormatError(
                f"adapter '{adapter}' has the tensor '{name.key}', which may belong to {paths}: without dots their "
                "names are the same",
                next_step="save it from its trainer with dots in the names, as diffusers does",
            )
        return next(iter(found))

    @property
    def described(self) -> str:
        """The component as a phrase for messages."""
        return f"'{self.name}'" if self.prefix else f"the {type(self.model).__name__}"


def _underscore(name: str) -> str:
    return name.replace(".", "_")


def list_pipeline(view: ModelView) -> dict[str, PipelineModel]:
    """Return the models of a view by their names in a pipeline; the class of a single model decides its name."""
    models = view.components
    if MAIN_GRAPH in models:
        name = name_component(models[MAIN_GRAPH])
        return {name: PipelineModel(name, "", models[MAIN_GRAPH])}
    return {name: PipelineModel(name, f"{name}.", model) for name, model in models.items()}


def name_component(model: nn.Module) -> str:
    """Return the name that a model of this class has in pipelines; "model" if no pipeline has the class."""
    library = type(model).__module__.partition(".")[0]
    if library == "diffusers":
        return "unet" if "UNet" in type(model).__name__ else "transformer"
    return "text_encoder" if library == "transformers" else "model"


def choose_component(beginning: str, pipeline: Mapping[str, PipelineModel]) -> PipelineModel | None:
    """Return the component that a prefix of names belongs to, or None where the model has no such component.

    If only one model is given, every prefix belongs to it.
    """
    if len(pipeline) == 1 and not next(iter(pipeline.values())).prefix:
        return next(iter(pipeline.values()))
    return next((pipeline[name] for name in pipeline_names(beginning) if name in pipeline), None)


def pipeline_names(beginning: str) -> tuple[str, ...]:
    """Return the names that the component of a prefix may have in pipelines."""
    return COMPONENTS.get(beginning, (beginning.removesuffix("."),))
