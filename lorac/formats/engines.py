"""The engines that run adapters, and the LoRAs that each engine supports: the table ``engines.toml``.

An engine that ignores a field or a tensor silently computes another result, so its row lists the fields that it ignores
as well as those that it refuses. ``lorac.convert`` makes a LoRA that fits a row.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorac.errors import not_one_of
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind

ENGINE, INVOCATION = "engine", "alora_invocation_tokens"
"""Entry of the provenance of a LoRA that was made for an engine: its name, by which its file is laid out; and PEFT's
field with token ids, which an engine looks for that neither refuses nor ignores it."""
LOST_SCALE = "lost_scale"
"""Entry of the provenance of a file whose metadata name a scale that LyCORIS did not write into alpha."""
_ANY = "*"
"""The model_type that stands for all that a row does not list."""
_OUTPUT = "lm_head"
_LANGUAGE = ("model.language_model.", "language_model.")
"""Prefixes of the language model in a model that has other parts."""


@dataclass(frozen=True, kw_only=True)
class EngineRules:
    """The LoRAs that one engine supports.

    Attributes:
        version: the release of the engine that the rules describe.
        source: the source files of that release that contain the rules.
        format: lorac's name of the format that the engine reads.
        usage: the command that runs a model with the adapter; {path} is the path of the file, {rank} its largest rank.
        refused: fields of PEFT's adapter_config.json that the engine refuses where they are set.
        ignored: fields that the engine does not read, though they change the result.
        kinds: kinds of sites that the engine adapts.
        leaves: last names of the linear layers that the engine adapts; empty: any name.
        embeddings: model_types for which the engine adapts the input embedding.
        outputs: model_types for which the engine adapts the output layer; empty: those in ``embeddings``.
        ties: whether the engine can adapt only one of two layers that share a weight.
        models: model_types for which the engine runs adapters; empty: all except ``without``.
        without: model_types that the engine runs, but without adapters.
        heads: modules that a file may replace whole (``modules_to_save``).
        together: groups of layer names; the engine needs all layers of a group adapted with one rank, or none.
        experts: model_type -> the module of a block that contains experts that are separate in the file, and the names
            of an expert's gate, up and down projections.
        stacked: model_types for which the experts' factors are stacked, as in PEFT's files.
        biases: whether the engine supports ``lora_bias``.
        ranks: the ranks for which the engine can reserve memory, in ascending order; empty: any rank.
        uniform: whether all layers must have one rank and one scale.
        dtypes: dtypes of tensors that the engine reads.
        loaders: library of a model's class -> the method by which its models load LoRAs; models of that library without
            the method run no LoRAs.
        renames: part of a name in lorac's file -> the engine's replacement for it.
    """

    version: str
    source: str
    format: str
    usage: str
    refused: Sequence[str]
    ignored: Sequence[str]
    kinds: Sequence[str] = (SiteKind.LINEAR, SiteKind.EMBEDDING)
    leaves: Sequence[str] = ()
    embeddings: Sequence[str] = (_ANY,)
    outputs: Sequence[str] = ()
    ties: bool = True
    models: Sequence[str] = (_ANY,)
    without: Sequence[str] = ()
    heads: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()
    experts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    stacked: Sequence[str] = ()
    biases: bool = False
    ranks: Sequence[int] = ()
    uniform: bool = False
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16")
    loaders: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, site: Site, view: ModelView) -> str | None:
        """Return why the engine supports no LoRA of a site, as the end of a sentence on the site; None if it does."""
        model_type, leaf = find_model_type(view), site.path.rpartition(".")[2]
        if site.stack:
            return None if self.experts_of(model_type) or model_type in self.stacked else "a stack of experts"
        if site.within is not None or site.kind not in self.kinds:
            return f"a weight within '{site.within}'" if site.within else f"of kind {site.kind}"
        if site.conv is not None and site.conv.groups > 1:
            return f"a convolution of {site.conv.groups} groups"
        owner = type(view.components.get(site.path.partition(".")[0], view.module))
        loader = self.loaders.get(owner.__module__.partition(".")[0])
        if loader is not None and not hasattr(owner, loader):
            return f"in a {owner.__name__}, which has no {loader}"
        if site.shares and not self.ties:
            return f"whose weight is that of '{site.shares[0]}'"
        if leaf == _OUTPUT or site.kind is SiteKind.EMBEDDING:
            taken = (leaf == _OUTPUT and self.outputs) or self.embeddings
            return None if _lists(taken, model_type) else "an embedding or output layer"
        config: Any = getattr(view.module, "config", None)
        has_parts = hasattr(config, "get_text_config") and config.get_text_config() is not config
        if has_parts and not site.path.startswith(_LANGUAGE):
            return "outside the language model"
        return None if not self.leaves or leaf in self.leaves else "a layer that it does not know by this name"

    def experts_of(self, model_type: str) -> Sequence[str] | None:
        """Return the names of experts that are separate in the engine's files; None where its files stack them."""
        return None if model_type in self.stacked else self.experts.get(model_type, self.experts.get(_ANY))

    def serves(self, model_type: str) -> bool:
        """Return whether the engine runs adapters on models of a type."""
        return model_type not in self.without and _lists(self.models, model_type)


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ENGINES: Mapping[str, EngineRules] = {name: EngineRules(**row) for name, row in _TABLE.items()}
"""Name in ``lorac convert --for`` -> its rules."""


def find_engine(name: str) -> EngineRules:
    """Return the rules of an engine.

    Raises:
        OptionError: no engine has that name.
    """
    if name not in ENGINES:
        raise not_one_of("there is no engine", name, ENGINES)
    return ENGINES[name]


def find_model_type(view: ModelView) -> str:
    """Return the model_type in the language model's transformers configuration; "" without a configuration."""
    config: Any = getattr(view.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return str(getattr(config, "model_type", ""))


def _lists(types: Sequence[str], model_type: str) -> bool:
    return _ANY in types or model_type in types
