"""Rows of an embedding that PEFT trains without the other rows (``trainable_token_indices``).

Source: peft.utils.other.TrainableTokensWrapper and peft.tuners.trainable_tokens of PEFT 0.21. A file has for each
module ``token_adapter.trainable_tokens_delta`` (n, d): n rows, which replace the rows with the numbers in the
configuration. An output layer that is tied to the embedding reads the same rows. When lorac reads the file, the adapter
gets the whole weight, with the model's other rows; for training it gets the rows only (``lorac.adapters.token_rows``).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorac.errors import FormatError, missing_site_error, nearest_name, require_base, shape_error
from lorac.formats._config_fields import read_rows
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats.peft.keys import PeftFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import SiteKind
from lorac.variants.adapter import TOKEN_ROWS, Adapter
from lorac.variants.trainable_tokens import TrainableTokens, rows_of
from lorac.variants.union import Union

NumberedRows = tuple[tuple[int, ...], Tensor]
"""Numbers of n rows of a weight, and the rows (n, d)."""
TokenIndices = Mapping[str | None, tuple[int, ...]]
"""End of the path of a module -> its row numbers; None stands for the input embedding."""


def read_token_rows(value: object) -> TokenIndices:
    """Return the row numbers of each module; null gives an empty mapping.

    Raises:
        ValueError: a number is not a whole number from 0, or occurs twice.
    """
    by_module = value if isinstance(value, dict) else {None: value} if value else {}
    return {key: read_rows(rows) for key, rows in by_module.items()}


def fill_rows(adapter: Adapter, file: PeftFile) -> None:
    """Insert the rows of a file into copies of the model's weights, and add these to the adapter's replacements.

    Raises:
        BaseNeeded: no model is given.
        SiteError: the model lacks a module.
        AdapterError: the rows do not fit their numbers or the weight.
        FormatError: the configuration names rows that the file lacks, or rows of a layer that the adapter also adapts,
            which PEFT cannot run.
    """
    rows, name = file.contents.rows, file.name
    adapted = sorted(rows.keys() & file.contents.sites.keys())
    if adapted:
        raise unsupported_error(
            f"adapter '{name}' trains rows of '{adapted[0]}' and adapts it",
            next_step="put the layer into exclude_modules: PEFT does not combine them either",
        )
    indices: TokenIndices = file.values.get("trainable_token_indices") or {}

    def find_numbers(module: str) -> tuple[int, ...]:
        # PEFT compares suffixes of names; rows without a name belong to the input embedding.
        named = (own for key, own in indices.items() if key is not None and module.endswith(key))
        return next(named, indices.get(None, ()))

    embeddings = [path for path in rows if path in file.sites and file.sites[path].kind is SiteKind.EMBEDDING]
    # PEFT ties a layer that has the embedding's numbers or none, and saves only the embedding's rows.
    tied = {other: path for path in embeddings for other in file.sites[path].shares if other not in rows}
    tied = {other: path for other, path in tied.items() if find_numbers(other) in {(), find_numbers(path)}}
    named = (key for key in indices if key is not None)
    missing = [key for key in named if not any(module.endswith(key) for module in (*rows, *tied))]
    if missing or (indices and not rows):
        raise corrupt_error(
            f"the file of adapter '{name}' lacks the rows of '{missing[0] if missing else 'the embedding'}' that its "
            "trainable_token_indices name",
            next_step="save the adapter again: the file is incomplete",
        )
    if not rows:
        return
    view = require_base(
        file.view, f"adapter '{name}' holds rows of '{min(rows)}' alone", next_step="load_adapter(path, model)"
    )
    sites, numbers = view.sites, adapter.provenance.setdefault(TOKEN_ROWS, {})
    for module, tensor in rows.items():
        if module not in sites:
            raise missing_site_error(
                f"adapter '{name}' has rows for '{module}', which the model does not have",
                nearest=nearest_name(module, sites),
                next_step="load the class of model that the adapter was trained on",
            )
        own, site = find_numbers(module), sites[module]
        stored = view.tensor(str(site.weight)).detach()
        plain = site.kind in {SiteKind.EMBEDDING, SiteKind.LINEAR} and not site.transposed
        if not plain or tensor.shape != (len(own), stored.shape[1]) or max(own) >= len(stored):
            raise shape_error(
                f"adapter '{name}' has rows {tuple(tensor.shape)} of '{module}' for {len(own)} tokens up to number "
                f"{max(own)}; its weight has shape {tuple(stored.shape)}",
                next_step=f"call model.resize_token_embeddings({max(own) + 1}) if the vocabulary has grown",
            )
        weight = stored.index_copy(0, torch.tensor(own), tensor.to(stored))
        names = [str(sites[path].weight) for path in (module, *tied) if tied.get(path, module) == module]
        adapter.replaced |= dict.fromkeys(names, weight)
        numbers |= dict.fromkeys(names, own)


def take_rows(adapter: Adapter, view: ModelView | None) -> tuple[Adapter, dict[str, NumberedRows]]:
    """Return an adapter without separately trained rows, and these rows by module as a file has them.

    A layer tied to an embedding is omitted, since PEFT gives it the embedding's rows.

    Raises:
        FormatError: a tied layer has other rows than its embedding.
    """
    variant, replaced = adapter.variant, dict(adapter.replaced)
    rows: dict[str, NumberedRows] = {}
    cut: dict[int, Tensor] = {}
    for name, numbers in adapter.provenance.get(TOKEN_ROWS, {}).items():
        whole = replaced.pop(name)
        rows[name.rpartition(".")[0]] = tuple(numbers), cut.setdefault(id(whole), whole[list(numbers)])
    others = [part for part in variant.methods if not isinstance(part, TrainableTokens)]
    if isinstance(variant, Union) and len(others) == 1:
        # Embeddings come first: the layers tied to them have the parameter "rows".
        for path in sorted(adapter.tensors, key=lambda path: "rows" in adapter.tensors[path]):
            method = variant.method_at(path)
            if isinstance(method, TrainableTokens):
                rows[path] = method.token_indices, rows_of(adapter.tensors[path])
        variant = replace(others[0], targets=(), modules_to_save=variant.modules_to_save, bias=variant.bias)
    kept: dict[str, NumberedRows] = {}
    for path, (numbers, own) in rows.items():
        shares = () if view is None else view.sites[path].shares
        tied = (at for at, (same, other) in kept.items() if own is other or (at in shares and numbers == same))
        source = next(tied, None)
        if source is None:
            kept[path] = numbers, own
        elif not torch.equal(own, kept[source][1]):
            raise untied_error(adapter.name, path, source)
        if view is not None and view.sites[path].kind is SiteKind.EMBEDDING and (alone := {*shares} - {*rows}):
            raise untied_error(adapter.name, min(alone), path)
    tensors = {path: own for path, own in adapter.tensors.items() if path not in rows}
    return replace(adapter, variant=variant, tensors=tensors, replaced=replaced), kept


def untied_error(adapter: str, path: str, source: str) -> FormatError:
    """Return the error for a tied layer that PEFT would change together with its embedding."""
    return unsupported_error(
        f"'{path}' is tied to '{source}', and PEFT changes both; adapter '{adapter}' does not",
        next_step="adapt both alike, or use format='native'",
    )
