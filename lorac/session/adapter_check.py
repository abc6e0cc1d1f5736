"""``check``: whether an adapter fits a model, by the code that compiles it, and how it is mended where it does not."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lorac.adapters.base_hash import check_base
from lorac.adapters.fit import list_faults
from lorac.adapters.name_repair import REPAIR
from lorac.argument_types import check_type
from lorac.errors import FormatError, LoracError
from lorac.formats import load_adapter
from lorac.formats.peft.keys import embedding_modules
from lorac.frontend.model_view import ModelView
from lorac.runtime.generation.tokenizers import read_tokenizer
from lorac.session.api import compile
from lorac.session.request.sources import read_model
from lorac.storage.remote.names import find_source
from lorac.variants.adapter import Adapter


@dataclass(frozen=True)
class AdapterCheck:
    """The fit of an adapter to a model.

    Attributes:
        adapter: its path, or its name.
        fits: whether ``lorac.compile`` takes it; without a model, whether it can be read.
        faults: the reasons why not, of which ``lorac.compile`` gives the first.
        repairs: steps that mend it.
        facts: subject -> finding, where nothing is at fault.
    """

    adapter: str
    fits: bool
    faults: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


def check(
    adapter: Adapter | str | os.PathLike[str], model: nn.Module | Mapping[str, nn.Module] | None = None
) -> AdapterCheck:
    """Check whether an adapter fits a model, and list everything that does not.

    It fits exactly where ``lorac.compile`` takes it for target "eager", since that is tried.

    Args:
        adapter: its path or name, or the adapter; only read.
        model: the base, or several by name; only read. Without it the adapter is read, and nothing is compared.

    Raises:
        CompileError: the model is not one that can be compiled.
        WrongType: ``adapter`` is neither a path nor an adapter.
    """
    step = "give the path of its file or folder, or an adapter: lorac.load_adapter(path)"
    check_type(adapter, (str, os.PathLike, Adapter), "the adapter of lorac.check", next_step=step)
    source = adapter if isinstance(adapter, Adapter) else os.fspath(adapter)
    name = source.name if isinstance(source, Adapter) else source
    given = None if model is None else read_model(model).model
    view = None if given is None else ModelView.of(given, resizes=True)
    try:
        if not isinstance(source, Adapter):
            source = str(find_source(source, "the adapter of lorac.check", FormatError, "unreadable"))
        taken = _read(source) if given is None else next(iter(compile(given, [source]).adapters.values()))
    except LoracError as refusal:
        faults, repairs = [refusal.what], [refusal.next_step]
    else:
        return AdapterCheck(name, True, facts=_find_facts(taken, str(source), view))
    if view is not None and isinstance(source, str):
        with contextlib.suppress(LoracError):
            load_adapter(source, view, fix_names=True)
            repairs = [REPAIR]
    with contextlib.suppress(LoracError):  # only with the model, or not at all, it can be read
        faults += [] if view is None else [error.what for error in list_faults(_read(source), view)]
    return AdapterCheck(name, False, tuple(dict.fromkeys(faults)), tuple(filter(None, repairs)))


def _read(given: Adapter | str) -> Adapter:
    return given if isinstance(given, Adapter) else load_adapter(given)


def _find_facts(adapter: Adapter, place: str, view: ModelView | None) -> dict[str, str]:
    """Return the findings about an adapter that fits."""
    config, recorded = adapter.provenance.get("config"), adapter.provenance.get("base")
    trained_on = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    replaced = f", {len(adapter.replaced)} parameters replaced" if adapter.replaced else ""
    facts = {
        "format": str(adapter.provenance.get("format") or "none, in memory"),
        "method": f"{adapter.variant.name} at {len(adapter.tensors)} sites{replaced}",
        **({"trained on": str(trained_on)} if trained_on else {}),
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
    with contextlib.suppress(Exception):  # transformers raises anything where there is no tokenizer, or a damaged one
        tokens = len(read_tokenizer(Path(place))) if (Path(place) / "tokenizer_config.json").is_file() else 0
        if tokens > rows > 0:
            step = f"call model.resize_token_embeddings({tokens}) before the adapter is loaded"
            facts["vocabulary"] = f"the tokenizer beside it has {tokens} tokens, the model {rows}: {step}"
    return facts
