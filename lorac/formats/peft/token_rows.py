"""Rows of an embedding that PEFT trains by themselves (``trainable_token_indices``).

Source: peft.utils.other.TrainableTokensWrapper and peft.tuners.trainable_tokens of PEFT 0.21. A file holds, per module,
``token_adapter.trainable_tokens_delta`` (n, d): what takes the place of n rows, whose numbers its configuration has. An
output layer that is tied to the embedding reads the same rows. Here they become the whole weight, which the model's own
other rows fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorac.errors import AdapterError, BaseNeeded, FormatError, SiteError, nearest_name
from lorac.formats.peft import config
from lorac.frontend.model_view import ModelView
from lorac.ir.sites import Site, SiteKind

Tensor = torch.Tensor
Rows = Mapping[str, Tensor]


def read_token_rows(value: Any) -> dict[str | None, tuple[int, ...]]:
    """End of a module's path -> numbers of its rows; None for the input embedding. Nothing for null.

    Raises:
        ValueError: They are no whole numbers from 0, or one comes twice.
    """
    given = value if isinstance(value, dict) else {None: value} if value else {}
    found = {}
    for key, numbers in given.items():
        found[key] = config.layers(numbers)
        if not found[key] or min(found[key]) < 0 or len(set(found[key])) < len(found[key]):
            raise ValueError("expected numbers of rows, each once")
    return found


def fill_rows(name: str, rows: Rows, values: Mapping[str, Any], model: nn.Module | None) -> dict[str, Tensor]:
    """The weights that rows come to, by the names of the parameters that they replace.

    Args:
        name: The adapter's name, for messages.
        rows: Module -> its rows (n, d), as in the file.
        values: The configuration, read.
        model: The base.

    Raises:
        BaseNeeded: There is no model.
        SiteError: A module is not in it.
        AdapterError: Rows and their numbers, or the weight, do not belong together.
        FormatError: The configuration names rows that the file lacks.
    """
    given = values.get("trainable_token_indices") or {}
    missing = [key for key in given if key is not None and not any(_is(module, key) for module in rows)]
    if missing or (given and not rows):
        raise FormatError(
            f"the file of adapter '{name}' lacks the rows of '{missing[0] if missing else 'the embedding'}' that its "
            "trainable_token_indices name",
            next_step="it is incomplete: save the adapter again",
            code="corrupt_file",
        )
    if not rows:
        return {}
    if model is None:
        raise BaseNeeded(f"adapter '{name}' holds rows of '{min(rows)}' alone", next_step="load_adapter(path, model)")
    sites, found = ModelView.of(model).sites, dict[str, Tensor]()
    for module, tensor in rows.items():
        if module not in sites:
            raise SiteError(
                f"adapter '{name}' has rows for '{module}', which the model does not have",
                nearest=nearest_name(module, sites),
                next_step="load the class of model that the adapter was trained on",
                code="site_not_found",
            )
        whole = _whole(name, sites[module], tensor, _numbers(given, module), model)
        tied = [path for path in sites[module].shares if path not in rows]
        found |= {str(sites[path].weight): whole for path in (module, *tied)}
    return found


def refuse_adapted_rows(name: str, rows: Rows, adapted: Mapping[str, Any]) -> None:
    """Refuse rows of a layer that the adapter changes besides, which PEFT cannot run."""
    both = sorted(rows.keys() & adapted.keys())
    if both:
        raise FormatError(
            f"adapter '{name}' trains rows of '{both[0]}' and adapts it",
            next_step="PEFT does not combine them either: exclude_modules the layer",
            code="unsupported_field",
        )


def _whole(name: str, site: Site, rows: Tensor, numbers: tuple[int, ...], model: nn.Module) -> Tensor:
    weight = ModelView.of(model).tensor(str(site.weight)).detach()
    plain = site.kind in {SiteKind.EMBEDDING, SiteKind.LINEAR} and not site.transposed
    if not plain or rows.shape != (len(numbers), weight.shape[1]) or max(numbers) >= len(weight):
        raise AdapterError(
            f"adapter '{name}' has rows {tuple(rows.shape)} of '{site.path}' for {len(numbers)} tokens up to number "
            f"{max(numbers)}; its weight is {tuple(weight.shape)}",
            next_step=f"call model.resize_token_embeddings({max(numbers) + 1}) if the vocabulary has grown",
            code="shape_mismatch",
        )
    return weight.index_copy(0, torch.tensor(numbers), rows.to(weight))


def _numbers(given: Mapping[str | None, tuple[int, ...]], module: str) -> tuple[int, ...]:
    """The rows' numbers: those under the module's name, or those that stand for the input embedding."""
    return next(
        (numbers for key, numbers in given.items() if key is not None and _is(module, key)), given.get(None, ())
    )


def _is(module: str, key: str) -> bool:
    """Whether a name in the configuration is a module's, as PEFT compares them."""
    return module.endswith(key)
