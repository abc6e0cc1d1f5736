"""Images and sounds in prompts: the inputs of a tower, and the features that it computes for the rows of a batch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lorac.argument_types import Fields
from lorac.errors import InputMismatch
from lorac.frontend.hosts.transformers import find_stored_positions
from lorac.ir.calls.modalities import (
    FEATURES,
    KINDS,
    OFFSETS,
    Modality,
    feature_ids,
    find_modality,
    pad_rows,
)
from lorac.ir.graph.attention_ops import encoder_output_name
from lorac.ir.graph.feeds import convert_input
from lorac.ir.slots.prefix import IDS, MASK
from lorac.runtime.generation.prompts import Prompts
from lorac.runtime.traits import ModelTraits


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The images or sounds of a call's rows.

    Attributes:
        modality: images or sounds, and how the model takes them.
        inputs: of the tower, for all rows of the call.
        counts: number of placeholders of each row of the call.
        marks: (rows, length) of the prompts: which tokens are placeholders.
        offsets: (rows, length, axes): terms that the number of a token of the prompts gets to give its positions, and
            behind them that of all later tokens; None where positions are the numbers.
        selected: the rows of the call that the prompts are.
    """

    modality: Modality
    inputs: Mapping[str, Tensor]
    counts: Sequence[int]
    marks: Tensor
    offsets: Sequence[Tensor] | None
    selected: Sequence[int]

    @staticmethod
    def of(options: Fields, reads: Sequence[str], traits: ModelTraits, prompts: Prompts) -> "PromptFeatures | None":
        """Return the images of a call; None for one without.

        Args:
            options: of the call.
            reads: names of the tower's inputs.
            traits: the model's.
            prompts: the rows.

        Raises:
            InputMismatch: inputs of the tower are missing.
        """
        given = {name: convert_input(name, options[name], None) for name in reads if options.get(name) is not None}
        if not given:
            return None
        modality = find_modality(reads)
        assert modality is not None
        token = modality.find_token(traits.settings)
        assert token is not None  # a capture found it
        if missing := [name for name in reads if name not in given]:
            raise InputMismatch(
                f"the call gives {', '.join(given)} and no {missing[0]}",
                next_step=f"give all that the model's processor makes, {', '.join(reads)} among it",
            )
        marks = prompts.ids.eq(token)
        marks = marks if prompts.mask is None else marks & prompts.mask.bool()
        counts = marks.sum(1).tolist()
        known = find_stored_positions(cast("dict[str, Any]", traits.to_json()["config"]))
        asked = {IDS: prompts.ids, MASK: prompts.mask, KINDS: prompts.arrange(options.get(KINDS)), **given}
        positions = None if known is None else known.compute(asked)
        if known is not None and positions is None:
            raise InputMismatch(
                f"positions are computed from {KINDS}, and the call has none",
                next_step="give it, as the processor does",
            )
        offsets = (
            None
            if positions is None
            else [_offsets(row[:, -n:]) for row, n in zip(positions.unbind(1), prompts.counts, strict=True)]
        )
        return PromptFeatures(modality, given, counts, marks, offsets, range(len(counts)))

    def rows(self, rows: Sequence[int]) -> "PromptFeatures":
        """Return those of some of the rows, whose tower still reads the inputs of all."""
        offsets = None if self.offsets is None else [self.offsets[row] for row in rows]
        selected = [self.selected[row] for row in rows]
        return PromptFeatures(self.modality, self.inputs, self.counts, self.marks[list(rows)], offsets, selected)

    def place(self, features: Tensor) -> dict[str, Tensor]:
        """Return the inputs of a program over a cache: the features (count, size) of all rows of the call, by row.

        Raises:
            InputMismatch: there are more or fewer than placeholders.
        """
        if len(features) != sum(self.counts):
            raise InputMismatch(
                f"the prompts have {sum(self.counts)} tokens for {self.modality.name}s, and "
                f"{self.modality.main}= gives {len(features)} features",
                next_step="give prompts and inputs that the model's processor made together",
            )
        parts = features.split(list(self.counts))
        placed = {FEATURES: pad_rows([parts[row] for row in self.selected])}
        if self.offsets is not None:
            placed[OFFSETS] = pad_rows(self.offsets)
        return {encoder_output_name(name): value for name, value in placed.items()}

    def feed(self, prompts: Prompts) -> list[Tensor]:
        """Return the tokens of each row as the program takes them."""
        return prompts.tokens(torch.where(self.marks, feature_ids(self.marks), prompts.ids))

    def text(self, prompts: Prompts) -> Tensor:
        """Return the ids of the prompts with 0 in the place of placeholders, which need not be in the vocabulary."""
        return prompts.ids.masked_fill(self.marks, 0)

    def key(self, prompts: Prompts, features: Mapping[str, Tensor]) -> Prompts:
        """Return the prompts with a digest of its features in the place of each placeholder, by which caches find them.

        Args:
            prompts: the rows.
            features: as ``place`` returns them.
        """
        ids = prompts.ids.clone()
        for row, mark in enumerate(self.marks):
            whole = hashlib.blake2b(digest_size=7)
            for value in features.values():
                whole.update(value[row].contiguous().numpy().tobytes())
            ids[row, mark] = -int.from_bytes(whole.digest()) - torch.arange(int(mark.sum()))
        return replace(prompts, ids=ids)


def _offsets(positions: Tensor) -> Tensor:
    """Return the terms that a row's token numbers get (length, axes), the last for all tokens behind it.

    Args:
        positions: (axes, length).
    """
    numbers = torch.arange(positions.shape[1])
    behind = (positions.max() + 1 - positions.shape[1]).expand(positions.shape[0])
    return torch.cat([(positions - numbers).T, behind[None]])
