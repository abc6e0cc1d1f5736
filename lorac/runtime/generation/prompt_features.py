"""Images and sounds in prompts: the inputs of a tower, and the tower's features for the rows of a batch."""

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
    BLOCK_TYPES,
    BLOCKS,
    FEATURES,
    KINDS,
    OFFSETS,
    TOKEN_TYPES,
    Modality,
    TokenBlocks,
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
        inputs: the tower's inputs, for all rows of the call.
        counts: number of placeholders of each row of the call.
        marks: (rows, length): true where a token of the prompts is a placeholder.
        tables: name of a program input -> for each row a table (length + 1, axes): a term for each token of the prompt,
            such as an offset of its position; the last line is for all later tokens.
        selected: indices of these rows in the call.
    """

    modality: Modality
    inputs: Mapping[str, Tensor]
    counts: Sequence[int]
    marks: Tensor
    tables: Mapping[str, Sequence[Tensor]]
    selected: Sequence[int]

    @staticmethod
    def of(options: Fields, reads: Sequence[str], traits: ModelTraits, prompts: Prompts) -> "PromptFeatures | None":
        """Return the images or sounds of a call; None for a call without any.

        Args:
            options: the call's options and inputs.
            reads: names of the tower's inputs.
            traits: the model's traits.
            prompts: the rows.

        Raises:
            InputMismatch: inputs of the tower are missing, or types of tokens do not fit the prompts.
        """
        given = {name: convert_input(name, options[name], None) for name in reads if options.get(name) is not None}
        blocks = _find_blocks(options, traits, prompts) if reads else None
        if not given and blocks is None:
            return None
        modality = find_modality(reads)
        assert modality is not None
        token = modality.find_token(traits.settings)
        assert token is not None  # a capture found it
        if given and (missing := [name for name in reads if name not in given]):
            raise InputMismatch(
                f"the call gives {', '.join(given)} and no {missing[0]}",
                next_step=f"give all that the model's processor makes, {', '.join(reads)} among it",
            )
        marks = prompts.ids.eq(token)
        marks = marks if prompts.mask is None else marks & prompts.mask.bool()
        counts = marks.sum(1).tolist()
        tables = {} if blocks is None else {BLOCKS: blocks}
        known = find_stored_positions(cast("dict[str, Any]", traits.to_json()["config"]))
        asked = {IDS: prompts.ids, MASK: prompts.mask, KINDS: prompts.arrange(options.get(KINDS)), **given}
        positions = None if known is None else known.compute(asked)
        if known is not None and positions is None:
            raise InputMismatch(
                f"positions are computed from {KINDS}, and the call has none",
                next_step="give it, as the processor does",
            )
        if positions is not None:
            rows = zip(positions.unbind(1), prompts.counts, strict=True)
            tables[OFFSETS] = []
            for row, count in rows:  # from a row's token numbers to its positions; the last is for later tokens
                own = row[:, -count:]
                behind = (own.max() + 1 - count).expand(len(own))
                tables[OFFSETS].append(torch.cat([(own - torch.arange(count)).T, behind[None]]))
        return PromptFeatures(modality, given, counts, marks, tables, range(len(counts)))

    def rows(self, rows: Sequence[int]) -> "PromptFeatures":
        """Select some of the rows; the tower still reads the inputs of all rows."""
        tables = {name: [table[row] for row in rows] for name, table in self.tables.items()}
        selected = [self.selected[row] for row in rows]
        return PromptFeatures(self.modality, self.inputs, self.counts, self.marks[list(rows)], tables, selected)

    def place(self, runs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a program over a cache: features and tables, padded to one tensor each.

        Args:
            runs: the features (count, size) of all rows of the call, in parts.

        Raises:
            InputMismatch: the number of features differs from the number of placeholders.
        """
        features = torch.cat(list(runs)) if runs else torch.zeros(0, 1)
        if len(features) != sum(self.counts):
            raise InputMismatch(
                f"the prompts have {sum(self.counts)} tokens for {self.modality.name}s, and {self.modality.main}= "
                f"gives {len(features)} features",
                next_step="give prompts and inputs that the model's processor made together",
            )
        parts = features.split(list(self.counts))
        placed = {FEATURES: pad_rows([parts[row] for row in self.selected])} if runs else {}
        placed |= {name: pad_rows(table) for name, table in self.tables.items()}
        return {encoder_output_name(name): value for name, value in placed.items()}

    def feed(self, prompts: Prompts) -> list[Tensor]:
        """Return the tokens of each row as the program takes them."""
        return prompts.tokens(torch.where(self.marks, feature_ids(self.marks), prompts.ids))

    def text(self, prompts: Prompts) -> Tensor:
        """Return the prompts' ids with placeholders replaced by 0, as a placeholder may be outside the vocabulary."""
        return prompts.ids.masked_fill(self.marks, 0)

    def key(self, prompts: Prompts, features: Mapping[str, Tensor]) -> Prompts:
        """Return the prompts as keys of a prompt cache: digests replace placeholders and tokens in blocks.

        A digest covers all features of a row and all blocks in the row.

        Args:
            prompts: the rows.
            features: as ``place`` returns them.
        """
        ids = prompts.ids.clone()
        for row, mark in enumerate(self.marks):
            whole, depends = hashlib.blake2b(digest_size=7), mark.clone()
            if BLOCKS in self.tables:  # the keys and values of a token depend on later tokens of its block
                own = self.tables[BLOCKS][row][:-1].ne(0).any(1)
                depends[len(depends) - len(own) :] |= own
                whole.update(ids[row, depends & ~mark].numpy().tobytes())
            for value in features.values():
                other = value[row].ne(value[row, -1]).any(-1).nonzero()  # trailing lines equal to the last are padding
                whole.update(value[row, : 2 + int(other.max()) if len(other) else 1].contiguous().numpy().tobytes())
            ids[row, depends] = -int.from_bytes(whole.digest()) - torch.arange(int(depends.sum()))
        return replace(prompts, ids=ids)


def check_plain_call(traits: ModelTraits) -> None:
    """Refuse a plain call of a model whose tokens attend to later ones by their types.

    Raises:
        InputMismatch: the model is of this kind, and a plain call has no types of tokens.
    """
    by_type = BLOCK_TYPES.get(str(traits.settings.get("model_type")))
    if by_type is not None and by_type.is_whole:
        raise _types_missing(by_type)


def _types_missing(by_type: TokenBlocks) -> InputMismatch:
    return InputMismatch(
        f"the model needs {by_type.argument} to know which tokens see later ones, and the call has none",
        next_step="call generate with what the model's processor makes",
    )


def _find_blocks(options: Fields, traits: ModelTraits, prompts: Prompts) -> list[Tensor] | None:
    """Return the table of each row's blocks; None where the call gives no types of tokens or the model takes none."""
    by_type = BLOCK_TYPES.get(str(traits.settings.get("model_type")))
    if by_type is None and options.get(TOKEN_TYPES) is not None:
        raise InputMismatch(f"the model takes no {TOKEN_TYPES}", next_step="leave them out")
    if by_type is None:
        return None
    if options.get(by_type.argument) is None:
        if by_type.is_whole:
            raise _types_missing(by_type)
        return None
    types = convert_input(by_type.argument, options[by_type.argument], None)
    if types.shape != prompts.ids.shape:
        raise InputMismatch(
            f"{by_type.argument} has the shape {list(types.shape)}, and {IDS} {list(prompts.ids.shape)}",
            next_step="give a number for each token, as the processor does",
        )
    arranged: Any = prompts.arrange(types)
    return [by_type.find(row[-count:]) for row, count in zip(arranged, prompts.counts, strict=True)]
