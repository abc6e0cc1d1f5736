"""The prompt cache: keys and values of earlier sequences, reused for prompts with the same first tokens."""

import collections
import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorac.argument_types import check_type
from lorac.ir.slots.choice import Choice
from lorac.target.engine import Engine
from lorac.target.kv_cache import KeyValueCache

CacheKey = tuple[Hashable, Choice, Hashable]
"""A graph (with its tenant), a choice of adapters and the versions of their tensors; no other key shares its rows."""


@dataclass(frozen=True, eq=False)
class _CachedPrompts:
    """An entry of the prompt cache: the sequences of one call.

    Attributes:
        engine: the engine that computed the sequences.
        key: the graph, the choice of adapters and the tensor versions.
        rows: the tokens of each sequence.
        cache: the keys and values of the sequences.
        nbytes: the size of ``cache``.
    """

    engine: weakref.ref[Engine]
    key: CacheKey
    rows: Sequence[Tensor]
    cache: KeyValueCache
    nbytes: int


@dataclass(eq=False)
class _Node:
    """A node of a prefix tree of sequences.

    Attributes:
        tokens: the tokens on the edge from the parent.
        passing: entry -> index of the entry's first sequence whose path contains the node.
        ends: the entry of each sequence that ends at the node.
        children: first token -> node.
    """

    tokens: Tensor
    passing: dict[_CachedPrompts, int] = field(default_factory=dict)
    ends: list[_CachedPrompts] = field(default_factory=list)
    children: dict[int, "_Node"] = field(default_factory=dict)

    def follow(self, row: Tensor) -> Iterator[tuple[int, "_Node"]]:
        """Yield each node below that a row's path reaches, after the number of the row's tokens matched so far."""
        node, shared, length = self, 0, 0
        while length == shared < len(row) and (child := node.children.get(int(row[shared]))) is not None:
            length = shared + len(child.tokens)
            shared += _common_prefix_length(child.tokens, row[shared:])
            node = child
            yield shared, node


class _PromptTree:
    """The prefix tree of an engine's sequences with one choice of adapters.

    Args:
        key: the key of all entries in the tree.
    """

    def __init__(self, key: CacheKey) -> None:
        self.key, self.root = key, _Node(torch.empty(0))

    def find(self, rows: Sequence[Tensor]) -> tuple[_CachedPrompts, list[tuple[int, int]]] | None:
        """Return the entry that shares the most first tokens with the rows, the oldest of equals; None without any.

        The second value has, for each row, the number of shared tokens and the index of the entry's sequence.
        """
        paths = [[(0, self.root), *self.root.follow(row)] for row in rows]
        (_, last), *others = (path[-1] for path in paths)
        best = next((entry for entry in last.passing if all(entry in node.passing for _, node in others)), None)
        if best is None:  # no entry is the best match of every row
            scores = collections.Counter[_CachedPrompts]()
            for path in paths:
                lengths: dict[_CachedPrompts, int] = {}
                for shared, node in path:
                    lengths.update(dict.fromkeys(node.passing, shared))
                scores.update(lengths)
            best = max(scores, key=scores.__getitem__)
        shares = [next((n, node.passing[best]) for n, node in reversed(path) if best in node.passing) for path in paths]
        return (best, shares) if any(n for n, _ in shares) else None

    @property
    def entries(self) -> Collection[_CachedPrompts]:
        """All entries of the tree."""
        return self.root.passing

    def add(self, entry: _CachedPrompts) -> list[_CachedPrompts]:
        """Add an entry; return the other entries whose sequences are all prefixes of the new sequences."""
        ended = {id(self.root): self.root.ends}
        for index, row in enumerate(entry.rows):
            node, rest = self.root, row
            node.passing.setdefault(entry, index)
            while len(rest):
                first = int(rest[0])
                child = node.children.setdefault(first, _Node(rest))
                shared = _common_prefix_length(child.tokens, rest)
                if shared < len(child.tokens):
                    upper = _Node(child.tokens[:shared], {**child.passing}, [], {int(child.tokens[shared]): child})
                    child.tokens = child.tokens[shared:]
                    node.children[first] = child = upper
                child.passing.setdefault(entry, index)
                ended[id(child)] = child.ends
                node, rest = child, rest[shared:]
            node.ends.append(entry)
        counts = collections.Counter(itertools.chain(*ended.values()))
        return [one for one, count in counts.items() if count == len(one.rows) and one is not entry]

    def remove(self, entry: _CachedPrompts) -> None:
        """Remove an entry."""
        for row in entry.rows:
            above = self.root
            above.passing.pop(entry, None)
            above.ends[:] = [one for one in above.ends if one is not entry]
            for _, node in [*self.root.follow(row)]:
                node.ends[:] = [one for one in node.ends if one is not entry]
                node.passing.pop(entry, None)
                if not node.passing:
                    above.children.pop(int(node.tokens[0]), None)
                above = node


class PromptCache:
    """A cache of sequences between calls of ``compiled.generate(prompt_cache=...)``; it evicts the least recently used.

    A call reuses the cached prefixes of its prompts, and adds its own sequences. Each choice of adapters has its own
    sequences, since keys and values depend on the choice; tokens before an adapter's invocation tokens belong to the
    choice without that adapter. Sequences of an adapter that was removed or trained since are dropped.

    Args:
        bytes: the most bytes that all sequences may take.
    """

    def __init__(self, bytes: int = 1 << 30) -> None:
        check_type(bytes, int, "the budget of lorac.PromptCache", next_step="give a number of bytes")
        self.bytes = bytes
        self._lock = threading.Lock()
        self._forget_all()

    def _forget_all(self) -> None:
        self._entries: dict[_CachedPrompts, None] = {}
        self._trees: dict[weakref.ref[Engine], dict[tuple[Hashable, Choice], _PromptTree]] = {}
        self._used = 0

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock for a block; an exception, which may leave the trees half-changed, clears the cache."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._forget_all()
                raise

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """The bytes that the sequences take."""
        return self._used

    def clear(self) -> None:
        """Forget all sequences."""
        with self._changing():
            self._forget_all()

    def forget(self, engine: Engine, adapter: str) -> None:
        """Forget the sequences that an engine computed with an adapter."""
        with self._changing():
            trees = self._trees.get(weakref.ref(engine), {})
            self._remove(
                [one for (_, choice), tree in trees.items() if adapter in dict(choice) for one in tree.entries]
            )

    def find(self, engine: Engine, key: CacheKey, rows: Sequence[Tensor]) -> KeyValueCache | None:
        """Return a copy of the cached prefixes of rows, without the last token of each row; None without a match.

        Args:
            engine: the engine that computes the rest of the rows.
            key: the graph, the choice of adapters and the tensor versions.
            rows: the tokens of each row.
        """
        with self._changing():
            tree = self._trees.get(weakref.ref(engine), {}).get(key[:2])
            found = None if tree is None or tree.key != key else tree.find([row[:-1] for row in rows])
            if found is None:
                return None
            best, matches = found
            if not best.cache.is_croppable and any(length < best.cache.lengths[index] for length, index in matches):
                return None
            self._entries[best] = self._entries.pop(best)
        if engine.memory_budget is not None:
            engine.memory_budget.touch((id(self), id(best)))
        # Without the lock, since a copy may evict other entries.
        cache = best.cache.copy([index for _, index in matches])
        cache.crop([length for length, _ in matches])
        return cache

    def add(self, engine: Engine, key: CacheKey, rows: Sequence[Tensor], cache: KeyValueCache) -> None:
        """Add sequences; drop their cached prefixes and entries of older tensors, and evict the oldest over the budget.

        Args:
            engine: the engine that computed the sequences.
            key: the graph, the choice of adapters and the tensor versions.
            rows: the tokens of each sequence.
            cache: the keys and values; the caller gives up the cache.
        """
        cache.set_encoder_outputs({})  # a call that reuses the sequences gives its own images, or none
        new = _CachedPrompts(weakref.ref(engine), key, [row.clone() for row in rows], cache, cache.nbytes)
        if engine.memory_budget is None or cache.charge is None:
            self._take(new)
        else:
            drop = functools.partial(_drop, weakref.ref(self), weakref.ref(new))
            engine.memory_budget.keep((id(self), id(new)), cache.charge, functools.partial(self._take, new), drop)

    def _take(self, new: _CachedPrompts) -> None:
        with self._changing():
            for trees in [trees for engine, trees in self._trees.items() if engine() is None]:
                self._remove([one for tree in trees.values() for one in tree.entries])
            older = self._trees.get(new.engine, {}).get(new.key[:2])
            if older is not None and older.key != new.key:  # its adapters were trained since
                self._remove([*older.entries])
            tree = self._trees.setdefault(new.engine, {}).setdefault(new.key[:2], _PromptTree(new.key))
            self._entries[new] = None
            self._used += new.nbytes
            self._remove(tree.add(new))
            while self._used > self.bytes:
                self._remove([next(iter(self._entries))])

    def drop(self, entry: _CachedPrompts) -> None:
        """Drop an entry, for a memory budget that evicts it."""
        with self._changing():
            self._remove([entry] if entry in self._entries else [])

    def _remove(self, entries: Sequence[_CachedPrompts]) -> None:
        for entry in entries:
            del self._entries[entry]
            self._used -= entry.nbytes
            engine = entry.engine()
            if engine is not None and engine.memory_budget is not None:
                engine.memory_budget.forget((id(self), id(entry)))
            trees, place = self._trees[entry.engine], entry.key[:2]
            trees[place].remove(entry)
            if not trees[place].entries:
                del trees[place]
            if not trees:
                del self._trees[entry.engine]


def _drop(owner: Callable[[], PromptCache | None], entry: Callable[[], _CachedPrompts | None]) -> None:
    """Drop an entry from a prompt cache, if both still exist."""
    cache, found = owner(), entry()
    if cache is not None and found is not None:
        cache.drop(found)


def _common_prefix_length(one: Tensor, other: Tensor) -> int:
    """Return the length of the common prefix of two sequences."""
    length = min(one.shape[0], other.shape[0])
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0, 0]) if differ.shape[0] else length
