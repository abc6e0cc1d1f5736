"""What a compiled model offers where it generates: ``generate``, and the tokenizer that goes with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import UNSET
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.generation.tokenizers import TokenizerFiles, tokenizer_writer
from lorac.target.binding import BoundProgram

T = TypeVar("T")


class TextGenerator(ABC):
    """A model that goes on with texts, where its host does."""

    _tokenizer: Any = None

    @abstractmethod
    def with_choice(self, adapters: Any, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Some work with the active adapters, or with a choice of its own, as one call: no swap comes in between."""

    def generate(
        self,
        inputs: Any = None,
        *,
        adapters: Any = UNSET,
        seed: Any = None,
        draft: Any = UNSET,
        prefixes: Any = None,
        component: str = MAIN_GRAPH,
        **told: Any,
    ) -> Any:
        """Go on with some texts, as transformers' ``generate`` does, and answer as it does.

        It is one call: adapters that are swapped in meanwhile are not its own, and in fused mode a swap waits for its
        end. Rows may be padded on either side; each is its tokens in order, and gives what it gives alone.

        Args:
            inputs: token ids (rows, length), if they are not given as ``input_ids``; torch or numpy.
            adapters: a choice for this call, or a list with one per row.
            seed: what tokens are drawn from, for the call or a list with one per row; torch's own random numbers go on
                as if there was no call. Default: torch's own.
            draft: a choice of adapters that guesses tokens ahead, which are then checked together: None for the base,
                or one that is cut to a lower rank. What is answered is that of the call's own choice. Default: none.
            prefixes: a ``lorac.PromptCache``: texts kept between calls, on targets that keep a cache.
            component: which of several models.
            **told: ``input_ids``, ``attention_mask`` and whatever else transformers' ``generate`` takes.

        Raises:
            Unavailable: the model does not generate, or the target keeps no cache.
            InputMismatch: an empty prompt, more than there are positions for, or what transformers refuses.
            OptionError: there is no such option.
            ChoiceError: rows and choices differ in number.
            MissingExtra: transformers is not installed.
        """
        from lorac.runtime.generation.generate import generate

        told = told if inputs is None else {"inputs": inputs, **told}
        return generate(self, component, told, adapters=adapters, seed=seed, draft=draft, prefixes=prefixes)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: whatever it was set to, or the artefact's; None where there is none."""
        if isinstance(self._tokenizer, TokenizerFiles):
            self._tokenizer = self._tokenizer.loaded()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def written_tokenizer(self, tokenizer: Any) -> Callable[[Path], object] | None:
        """What writes a tokenizer, or the model's own, into a folder; None where there is none."""
        return tokenizer_writer(self._tokenizer if tokenizer is None else tokenizer)
