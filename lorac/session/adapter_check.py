"""``check``: compile an adapter to find out whether it fits a model, and list faults and remedies."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lorac.adapters.base_hash import check_base
from lorac.adapters.factors import iter_changes
from lorac.adapters.fit import list_faults
from lorac.adapters.name_repair import REPAIR
from lorac.argument_types import check_type
from lorac.errors import CompileError, FormatError, LoracError, list_some, short
from lorac.formats import load_adapter
from lorac.formats.engines import INVOCATION, LOST_SCALE, EngineRules, find_engine, find_model_type
from lorac.formats.peft.keys import embedding_modules
from lorac.frontend.model_view import ModelView
from lorac.runtime.generation.tokenizers import read_tokenizer
from lorac.session.api import compile
from lorac.session.request.sources import read_model
from lorac.storage.remote import find_source
from lorac.variants.adapter import Adapter
from lorac.variants.base import invocation_of

_LORAS = ("lora", "dora")
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}
"""PEFT's field -> values with which an adapter is still a plain LoRA; vLLM's peft_helper lists the initialisations."""

_LOST_SCALE = (
    "alpha / r, as LyCORIS reads it; it was trained with rs_lora, which files of LoKr and GLoRA do not keep: "
    "give the adapter the weight √r for the scale of its training"
)


@dataclass(frozen=True)
class AdapterCheck:
    """The result of ``lorac.check``: whether an adapter fits a model, and an engine.

    Attributes:
        adapter: the adapter's path or name.
        fits: whether ``lorac.compile`` accepts the adapter; without a model, whether it can be read.
        faults: the reasons why the adapter does not fit; ``lorac.compile`` raises the first.
        repairs: steps that make it fit.
        facts: subject -> finding, for an adapter that fits.
        objections: the parts of the adapter that the engine refuses, ignores or computes differently; empty where the
            engine computes the same as lorac.
    """

    adapter: str
    fits: bool
    faults: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    objections: tuple[str, ...] = ()


def check(
    adapter: Adapter | str | os.PathLike[str],
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    *,
    for_: str | None = None,
) -> AdapterCheck:
    """Check whether an adapter fits a model and an engine, and list all faults.

    The adapter is compiled for target "eager": it fits if ``lorac.compile`` accepts it.

    Args:
        adapter: its path or name, or the adapter; only read.
        model: the base, or several by name; only read. Without a model the adapter is read, and nothing is compared.
        for_: an engine of ``lorac.convert``, whose rules are compared with the adapter.

    Raises:
        CompileError: the model cannot be compiled.
        OptionError: there is no such engine.
        WrongType: ``adapter`` is neither a path nor an adapter.
    """
    step = "give the path of its file or folder, or an adapter: lorac.load_adapter(path)"
    check_type(adapter, (str, os.PathLike, Adapter), "the adapter of lorac.check", next_step=step)
    source = adapter if isinstance(adapter, Adapter) else os.fspath(adapter)
    name = source.name if isinstance(source, Adapter) else source
    given = None if model is None else read_model(model).model
    view = None if given is None else ModelView.of(given, resizes=True)
    rules = None if for_ is None else find_engine(for_)
    try:
        if not isinstance(source, Adapter):
            source = str(find_source(source, "the adapter of lorac.check", FormatError, "unreadable"))
        taken = _read(source, None) if given is None else next(iter(compile(given, [source]).adapters.values()))
    except LoracError as refusal:
        faults, repairs = [refusal.what], [refusal.next_step]
    else:
        read = _read(source, view)
        objections = () if rules is None else tuple(_iter_objections(rules, read, view))
        step = f"`lorac convert ADAPTER OUT --for {for_} --model MODEL` writes the LoRA that it runs"
        try:
            next(iter(() if view is None or not objections else iter_changes(None, read, view)), None)
        except CompileError as refusal:
            objections, step = (*objections, f"no LoRA is its equal: {refusal.what}"), str(refusal.next_step)
        return AdapterCheck(
            name,
            fits=True,
            repairs=(step,) if objections else (),
            facts=_find_facts(taken, str(source), view),
            objections=objections,
        )
    if view is not None and isinstance(source, str):
        with contextlib.suppress(LoracError):
            load_adapter(source, view, fix_names=True)
            repairs = [REPAIR]
    with contextlib.suppress(LoracError):  # it may be readable only with the model, or not at all
        faults += [] if view is None else [error.what for error in list_faults(_read(source, None), view)]
    return AdapterCheck(name, False, tuple(dict.fromkeys(faults)), tuple(filter(None, repairs)))


def _read(given: Adapter | str, view: ModelView | None) -> Adapter:
    return given if isinstance(given, Adapter) else load_adapter(given, view)


def _find_facts(adapter: Adapter, place: str, view: ModelView | None) -> dict[str, str]:
    """Return the findings about an adapter that fits."""
    config, recorded = adapter.provenance.get("config"), adapter.provenance.get("base")
    trained_on = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    replaced = f", {len(adapter.replaced)} parameters replaced" if adapter.replaced else ""
    facts = {
        "format": str(adapter.provenance.get("format") or "none, in memory"),
        "method": f"{adapter.variant.name} at {len(adapter.tensors)} sites{replaced}",
        **({"trained on": str(trained_on)} if trained_on else {}),
        **({"scale": _LOST_SCALE} if LOST_SCALE in adapter.provenance else {}),
    }
    if view is None:
        return {**facts, "base weights": "not compared: no model is given"}
    equal = bool(recorded) and check_base(adapter.name, str(recorded), view, adapter.tensors)
    facts["base weights"] = (
        "equal, by the hash that the file recorded"
        if equal
        else "not compared: the model is quantised, or narrower than the hash that the file recorded"
        if recorded
        else "not compared: the file recorded no hash of them"
    )
    sites = {path: view.sites[path] for path in adapter.tensors if path in view.sites}
    tied = {path: apart for path, site in sites.items() if (apart := sorted({*site.shares} - sites.keys()))}
    if tied:
        facts["tied weights"] = "; ".join(f"'{path}' alone, not {', '.join(apart)}" for path, apart in tied.items())
    rows = max((view.tensor(f"{path}.weight").shape[0] for path in embedding_modules(view.module)), default=0)
    with contextlib.suppress(Exception):  # transformers may raise any error for a missing or damaged tokenizer
        tokens = len(read_tokenizer(Path(place))) if (Path(place) / "tokenizer_config.json").is_file() else 0
        if tokens > rows > 0:
            step = f"call model.resize_token_embeddings({tokens}) before the adapter is loaded"
            facts["vocabulary"] = f"the tokenizer beside it has {tokens} tokens, the model {rows}: {step}"
    return facts


def _iter_objections(rules: EngineRules, adapter: Adapter, view: ModelView | None) -> Iterator[str]:
    """Yield a text for each part of an adapter that an engine does not compute as lorac does."""
    variant, config, format = adapter.variant, adapter.provenance.get("config"), adapter.provenance.get("format")
    settings = dict(config) if isinstance(config, dict) else {}
    settings |= {"use_dora": True} if variant.name == "dora" else {}
    settings[INVOCATION] = [*invocation_of(variant)]
    saved = settings.get("modules_to_save") or ()
    settings["modules_to_save"] = [name for name in saved if name not in rules.heads]
    if format not in {None, rules.format}:
        yield f"{rules.version} reads files of the format '{rules.format}', and this is of '{format}'"
    if variant.name not in _LORAS:
        yield f"{rules.version} runs LoRAs, and this is {variant.name}"
    for verb, fields in (("refuses", rules.refused), ("ignores", rules.ignored)):
        for name in fields:
            if settings.get(name) and settings[name] not in _HARMLESS.get(name, ()):
                yield f"{rules.version} {verb} {name}={short(settings[name])}"
    at = {path: variant.at_path(path).settings for path in adapter.tensors}
    rank = max((r for own in at.values() if isinstance(r := own.get("r"), int)), default=0)
    if rules.ranks and rank > rules.ranks[-1]:
        yield f"{rules.version} has ranks up to {rules.ranks[-1]}, and this has {rank}"
    if rules.uniform and len({(own.get("r"), own.get("alpha")) for own in at.values()}) > 1:
        yield f"{rules.version} has one rank and one scale for all layers, and this has several"
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in adapter.parameters()} - {*rules.dtypes}
    if dtypes:
        yield f"{rules.version} does not read tensors of {', '.join(sorted(dtypes))}"
    if view is None:
        return
    model_type = find_model_type(view)
    if not rules.serves(model_type):
        yield f"{rules.version} runs no adapters on models of type '{model_type}'"
    places: dict[str, list[str]] = {}
    for path in adapter.tensors:
        why = rules.why_not(view.sites[path], view) if path in view.sites else "not a layer"
        places.setdefault(why or "", []).append(f"'{path}'")
        owner, _, leaf = path.rpartition(".")
        group = {f"{owner}.{name}" for names in rules.together if leaf in names for name in names}
        if lacking := sorted((group & view.sites.keys()) - adapter.tensors.keys()):
            places.setdefault(f"without one of {', '.join(lacking)}", []).append(f"'{path}'")
    for why, paths in places.items():
        if why:
            yield f"{rules.version} takes no LoRA of {list_some(paths, quote='')}: {why}"
