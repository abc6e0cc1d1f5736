"""PEFT types LN_TUNING and TRAINABLE_TOKENS, which replace modules or rows of the base."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_pattern, read_rows, write_pattern
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import EXCLUDE, WITHOUT_FAN
from lorac.formats.peft.peft_type import Parameters, PeftType, Tensors, take_tensors
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.variants.base_parameters import LNTuning
from lorac.variants.trainable_tokens import TrainableTokens, rows_of


def read_modules(value: object) -> str | tuple[str, ...]:
    """Return names of modules or one regular expression; null is refused, since PEFT writes its default choice."""
    modules = read_pattern(value)
    if not modules:
        raise ValueError("expected names of modules, or a pattern")
    return modules


class LnTuningType(PeftType[LNTuning]):
    """LN_TUNING.

    Source: peft.tuners.ln_tuning of PEFT 0.21 (config.py, layer.py). Keys are `<module>.ln_tuning_layers.<parameter>`:
    a trained copy of every targeted module, including buffers, which replaces the module. PEFT runs one such adapter at
    a time.
    """

    peft_type = "LN_TUNING"
    variants = {LNTuning: {}}
    fields = {**WITHOUT_FAN, "target_modules": Applied(to="targets", read=read_modules, write=write_pattern), **EXCLUDE}
    copied = "ln_tuning_layers"


DELTA = "trainable_tokens_delta"


class TrainableTokensType(PeftType[TrainableTokens]):
    """TRAINABLE_TOKENS.

    Source: peft.tuners.trainable_tokens of PEFT 0.21. A file has for each module ``trainable_tokens_delta`` (n, d): n
    rows, which replace the rows with the numbers in the configuration. An output layer that is tied to the input
    embedding reads the same rows, and a file has a second copy of them for it.
    """

    peft_type = "TRAINABLE_TOKENS"
    variants = {TrainableTokens: {}}
    fields = {
        **{name: field for name, field in WITHOUT_FAN.items() if name != "modules_to_save"},
        "token_indices": Applied([], to="token_indices", read=read_rows, write=list),
        "init_weights": TrainingOnly(True),
    }
    suffixes = (DELTA,)
    kinds = None
    needs_model = True

    def find_tied_sites(self, stored: Mapping[str, Tensors], sites: Mapping[str, Site]) -> dict[str, str]:
        """Return tied layer -> embedding, for embeddings whose rows a file has; of several, the first in the model."""
        tied: dict[str, str] = {}
        for path, site in sites.items():
            if path in stored and site.kind is SiteKind.EMBEDDING and path not in tied:
                tied |= dict.fromkeys(site.shares, path)
        return tied

    def refine_variant(
        self, variant: TrainableTokens, values: JsonMapping, stored: Mapping[str, Tensors]
    ) -> TrainableTokens:
        """Return the variant with ``tied`` set where ``find_tied_sites`` gave two layers the same tensor."""
        return replace(variant, tied=len({id(tensors[DELTA]) for tensors in stored.values()}) < len(stored))

    def read_site(self, variant: TrainableTokens, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the rows, and an embedding whose sizes they fit."""
        delta = take_tensors(path, stored, {DELTA: 2}, f"{DELTA} is (n, d)")[DELTA]
        return matrix_site(path, delta.shape[1], len(delta), SiteKind.EMBEDDING), {DELTA: delta}

    def complete_site(self, variant: TrainableTokens, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        return variant.hold_rows(site, tensors[DELTA])

    def write_site(self, variant: TrainableTokens, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        return {DELTA: rows_of(tensors)}

    def holds_tied(self, own: Tensors, embedding: Tensors) -> bool:
        return bool(own and embedding) and torch.equal(rows_of(own), rows_of(embedding))
