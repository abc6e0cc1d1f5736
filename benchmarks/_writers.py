"""Ways to have text written: by lorac's engine, by onnxruntime-genai, and by what has transformers' ``generate``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import _genai


@dataclass(frozen=True)
class Text:
    """The text of one side: tokens by step and row; seconds to the first, and for each of the others."""

    tokens: list[list[int]]
    first: float
    each: float


Side = Callable[[Any, int, int], Text]
"""(ids (rows, length), how many tokens, capacity) -> text."""


def _clock(given: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if given.cpu else time.perf_counter


def _timed(stamps: Sequence[float], begun: float, tokens: list[list[int]]) -> Text:
    """Text of the moments at which its tokens were there."""
    return Text(tokens, stamps[0] - begun, (stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1))


class _Stamps:
    """A streamer that notes when something comes, and what: the prompt first, then every row's next token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.begun = clock, clock()
        self.stamps: list[float] = []
        self.tokens: list[list[int]] = []

    def put(self, value: Any) -> None:
        """Something came."""
        self.stamps.append(self.clock())
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing more comes."""

    @property
    def text(self) -> Text:
        """The text after the prompt."""
        return _timed(self.stamps[1:], self.begun, self.tokens[1:])


def through_generate(generate: Callable[..., Any], given: argparse.Namespace) -> Side:
    """Wrap the ``generate`` that users call, of transformers or lorac."""
    import torch

    def side(ids: Any, count: int, capacity: int) -> Text:
        tensor, streamer = torch.from_numpy(ids), _Stamps(_clock(given))
        with torch.no_grad():
            generate(
                input_ids=tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        return streamer.text

    return side


def through_engine(compiled: Any, given: argparse.Namespace) -> Side:
    """lorac's engine alone: a cache, and one call for each token."""
    import torch

    from lorac.frontend.components import MAIN_GRAPH
    from lorac.ir.slots.choice import UNSET
    from lorac.target.kv_cache import DecodeStep

    clock = _clock(given)

    def write(bound: Any, ids: Any, count: int, capacity: int) -> Text:
        begun, stamps, tokens = clock(), [], []
        cache = compiled.engine.new_cache(MAIN_GRAPH, len(ids), capacity)
        while len(tokens) < count:
            rows, length = ids.shape
            wanted = torch.full((rows, 1), length - 1)
            ids = bound.decode(MAIN_GRAPH, cache, DecodeStep(ids=ids, counts=[length] * rows, wanted=wanted)).argmax(-1)
            stamps.append(clock())
            tokens.append(ids[:, 0].tolist())
        return _timed(stamps, begun, tokens)

    def side(ids: Any, count: int, capacity: int) -> Text:
        told = torch.from_numpy(ids)
        return compiled.switch.with_choice(UNSET, lambda bound, _: write(bound, told, count, capacity))

    return side


def through_genai(model: Any, given: argparse.Namespace) -> Side:
    def side(ids: Any, count: int, capacity: int) -> Text:
        clock = _clock(given)
        begun = clock()
        generator = _genai.begin(model, ids, capacity)
        stamps, tokens = [clock()], [generator.get_next_tokens().tolist()]
        while len(tokens) < count:
            generator.generate_next_token()
            stamps.append(clock())
            tokens.append(generator.get_next_tokens().tolist())
        return _timed(stamps, begun, tokens)

    return side
