"""PEFT type TRAINABLE_TOKENS.

Source: peft.tuners.trainable_tokens of PEFT 0.21. A file holds, per module, ``trainable_tokens_delta`` (n, d): n rows,
which replace those whose numbers the configuration has. An output layer that is tied to the input embedding reads the
same rows, and a file has them again for it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_rows
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.trainable_tokens import TrainableTokens

DELTA = "trainable_tokens_delta"


class TrainableTokensType(PeftType[TrainableTokens]):
    """TRAINABLE_TOKENS."""

    peft_type = "TRAINABLE_TOKENS"
    variants = {TrainableTokens: {}}
    fields = {
        **{name: field for name, field in WITHOUT_FAN.items() if name != "modules_to_save"},
        "token_indices": Applied([], to="token_indices", read=read_rows, write=list),
        "init_weights": TrainingOnly(True),
    }
    suffixes = (DELTA,)
    needs_model = True
    tied = {"rows": "columns"}

    def find_tied_sites(self, stored: Mapping[str, Tensors], sites: Mapping[str, Site]) -> dict[str, str]:
        """Return layers that are tied to an embedding whose rows a file has -> that embedding."""
        embeddings = [sites[path] for path in stored if path in sites and sites[path].kind is SiteKind.EMBEDDING]
        return {other: site.path for site in embeddings for other in site.shares}

    def read_site(self, variant: TrainableTokens, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the rows as columns of an embedding, and an embedding that they fit."""
        delta = take_tensors(path, stored, {DELTA: 2}, f"{DELTA} is (n, d)")[DELTA]
        return matrix_site(path, delta.shape[1], len(delta), SiteKind.EMBEDDING), {"columns": delta.t()}

    def complete_site(self, variant: TrainableTokens, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        index = torch.tensor([variant.token_indices], dtype=torch.int64)
        columns = tensors["columns"]
        return {"index": index} | ({"columns": columns} if site.kind is SiteKind.EMBEDDING else {"rows": columns.t()})

    def write_site(self, variant: TrainableTokens, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        return {DELTA: tensors["columns"].t() if "columns" in tensors else tensors["rows"]}
