"""Rows of an embedding that PEFT trains by themselves (``trainable_token_indices``).

Source: peft.utils.other.TrainableTokensWrapper and peft.tuners.trainable_tokens of PEFT 0.21. A file holds, per module,
``token_adapter.trainable_tokens_delta`` (n, d): n rows, which replace those whose numbers the configuration has. An
output layer that is tied to the embedding reads the same rows. Here they become the whole weight, filled with the
model's own other rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorac.errors import AdapterError, BaseNeeded, SiteError, nearest_name
from lorac.formats._config_fields import read_rows
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats.peft.keys import PeftFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind

TokenIndices = Mapping[str | None, tuple[int, ...]]
"""End of the path of a module -> its row numbers; None stands for the input embedding."""


def read_token_rows(value: object) -> TokenIndices:
    """Return row numbers by module; null is empty.

    Raises:
        ValueError: they are not whole numbers from 0, or one comes twice.
    """
    by_module = value if isinstance(value, dict) else {None: value} if value else {}
    return {key: read_rows(rows) for key, rows in by_module.items()}


def fill_rows(file: PeftFile) -> dict[str, Tensor]:
    """Return whole weights with the rows of a file in them, by the names of the parameters that they replace.

    Raises:
        BaseNeeded: there is no model.
        SiteError: a module is not in it.
        AdapterError: rows and their numbers, or the weight, do not belong together.
        FormatError: the configuration names rows that the file lacks, or those of a layer that the adapter also changes
            otherwise, which PEFT cannot run.
    """
    rows, name = file.contents.rows, file.name
    adapted = sorted(rows.keys() & file.contents.sites.keys())
    if adapted:
        raise unsupported_error(
            f"adapter '{name}' trains rows of '{adapted[0]}' and adapts it",
            next_step="PEFT does not combine them either: exclude_modules the layer",
        )
    indices: TokenIndices = file.values.get("trainable_token_indices") or {}
    missing = [key for key in indices if key is not None and not any(module.endswith(key) for module in rows)]
    if missing or (indices and not rows):
        raise corrupt_error(
            f"the file of adapter '{name}' lacks the rows of '{missing[0] if missing else 'the embedding'}' that its "
            "trainable_token_indices name",
            next_step="it is incomplete: save the adapter again",
        )
    if not rows:
        return {}
    if file.view is None:
        raise BaseNeeded(f"adapter '{name}' holds rows of '{min(rows)}' alone", next_step="load_adapter(path, model)")
    sites, weights = file.view.sites, dict[str, Tensor]()
    for module, tensor in rows.items():
        if module not in sites:
            raise SiteError(
                f"adapter '{name}' has rows for '{module}', which the model does not have",
                nearest=nearest_name(module, sites),
                next_step="load the class of model that the adapter was trained on",
                code="site_not_found",
            )
        site = sites[module]
        # PEFT compares the ends of names; other rows are those of the input embedding.
        named = (numbers for key, numbers in indices.items() if key is not None and module.endswith(key))
        weight = _fill_weight(name, site, tensor, next(named, indices.get(None, ())), file.view)
        tied = [path for path in site.shares if path not in rows]
        weights |= {str(sites[path].weight): weight for path in (module, *tied)}
    return weights


def _fill_weight(name: str, site: Site, rows: Tensor, indices: tuple[int, ...], view: ModelView) -> Tensor:
    weight = view.tensor(str(site.weight)).detach()
    plain = site.kind in {SiteKind.EMBEDDING, SiteKind.LINEAR} and not site.transposed
    if not plain or rows.shape != (len(indices), weight.shape[1]) or max(indices) >= len(weight):
        raise AdapterError(
            f"adapter '{name}' has rows {tuple(rows.shape)} of '{site.path}' for {len(indices)} tokens up to number "
            f"{max(indices)}; its weight is {tuple(weight.shape)}",
            next_step=f"call model.resize_token_embeddings({max(indices) + 1}) if the vocabulary has grown",
            code="shape_mismatch",
        )
    return weight.index_copy(0, torch.tensor(indices), rows.to(weight))
