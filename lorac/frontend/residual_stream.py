"""What a model adds to its stream of hidden states, found by running it once: attentions and MLPs, and their residuals.

Names tell nothing here. A copy of the model is run, and it is noted which tensor each module takes and gives and which
tensors are added. Within a block of the network, a sum of the stream and of what a module gave is a sublayer:

1. its **module** is the outermost one inside the block that gives what is added;
2. its **residual** is what that is added to: the block's input, an earlier sum, or the norm of one;
3. it is an **attention** if one was computed since the sum before, and a **cross** attention if the sum before was one
   already; else it is an **mlp**;
4. it has a **norm** behind it (a post-LN model) if the sum is read by a LayerNorm inside the block, is added to nothing
   else and is not what the block gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorac.errors import SiteError
from lorac.frontend.call_binding import bind_by_name
from lorac.frontend.components import get_component_prefix
from lorac.frontend.example_inputs import make_example_inputs
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site
from lorac.frontend.transformer_blocks import (
    get_component_inputs,
    is_attention_op,
    make_runnable_copy,
    run_under_dispatch_mode,
)
from lorac.ir.patterns import find_outermost_blocks
from lorac.ir.sites import Site

SublayerKind = Literal["attention", "cross", "mlp"]
_Key = tuple[int, torch.Size]
"""Which tensor it is: where it lies and how large it is. All of them are kept, so that no place is used twice."""


@dataclass(frozen=True)
class Sublayer:
    """What a block adds to its stream of hidden states.

    Attributes:
        block: path of the block.
        kind: what it is.
        modules: paths of the outermost modules that give what is added, in the order of their calls: more than one
            where one only hands on what another gave (dropout).
        residual: path of a module inside the block that takes what it is added to; None where no single one does.
        norm: path of the LayerNorm that the sum goes through before it is the stream again, or None.
    """

    block: str
    kind: SublayerKind
    modules: tuple[str, ...]
    residual: str | None
    norm: str | None


@dataclass(frozen=True)
class ResidualStream:
    """The stream of hidden states of a model.

    Attributes:
        blocks: paths of its blocks, in the order of their first calls.
        sublayers: what they add, in order.
        embedding: paths of the outermost modules that give what the first block takes, as ``Sublayer.modules``.
        head: paths of the modules that give what the output layer takes, the innermost first; None where the model has
            no output layer, and none where it computes something between.
    """

    blocks: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]
    embedding: tuple[str, ...]
    head: tuple[str, ...] | None


def trace_residual_stream(view: ModelView, inputs: object = None) -> ResidualStream:
    """Run a copy of a model to see what it adds to what.

    Args:
        view: the model, which is left unchanged; of several components each is run.
        inputs: example inputs as ``lorac.compile`` takes them; by default made from the model's configuration.

    Raises:
        ExampleInputsNeeded: none were given, and none can be made.
        CaptureError: the model cannot be copied.
    """
    parts = [
        _of_one(
            component,
            get_component_prefix(view.module, name),
            view.component_sites(name),
            get_component_inputs(inputs, view, name),
        )
        for name, component in view.components.items()
    ]
    return ResidualStream(
        tuple(path for part in parts for path in part.blocks),
        tuple(found for part in parts for found in part.sublayers),
        tuple(path for part in parts for path in part.embedding),
        next((part.head for part in parts if part.head is not None), None),
    )


def _of_one(model: nn.Module, prefix: str, sites: Mapping[str, Site], inputs: object) -> ResidualStream:
    given = bind_by_name(model, make_example_inputs(model) if inputs is None else inputs)
    copy = make_runnable_copy(model)
    notes = _StreamRecorder(prefix, [f"{prefix}{path}" for path in find_outermost_blocks(sites)])
    for path, module in copy.named_modules():
        if path:
            module.register_forward_pre_hook(notes.entering(prefix + path), with_kwargs=True)
            module.register_forward_hook(notes.leaving(prefix + path, module))
    run_under_dispatch_mode(copy, given, notes)
    return notes.told(_output_layer(copy, prefix))


def _output_layer(model: nn.Module, prefix: str) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((prefix + path for path, module in model.named_modules() if head is not None and module is head), None)


@dataclass
class _RecordedSum:
    """One addition inside a block: what was added, what came of it, and how many attentions were computed by then."""

    block: str
    operands: tuple[_Key, _Key]
    result: _Key
    attentions: int


@dataclass
class _TensorUses:
    """What modules did with one tensor: when it was first seen, and who took and gave it, with the times."""

    since: int
    took: list[str] = field(default_factory=list)
    gave: list[str] = field(default_factory=list)


class _StreamRecorder(TorchDispatchMode):
    """What is noted of one run."""

    def __init__(self, prefix: str, blocks: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._prefix, self._known = prefix, set(blocks)
        self._kept: list[Tensor] = []
        self._time, self._attentions = 0, 0
        self._inside: list[str] = []
        self._tensors: dict[_Key, _TensorUses] = {}
        self._entered: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._took: dict[str, _Key] = {}
        self._norms: dict[str, _Key] = {}
        self._sums: list[_RecordedSum] = []

    # ── While it runs ────────────────────────────────────────────────────────────────────────────────────────────────
    def entering(self, path: str) -> Any:
        """A hook before a module's forward."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._time += 1
            self._entered.setdefault(path, self._time)
            if path in self._known:
                self._inside.append(path)
                self._begun.setdefault(path, self._attentions)
            key = self._key((args, kwargs))
            if key is not None:
                self._took.setdefault(path, key)
                self._tensors[key].took.append(path)

        return note

    def leaving(self, path: str, module: nn.Module) -> Any:
        """A hook after it."""
        is_norm = isinstance(module, nn.LayerNorm)

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._time += 1
            if path in self._known:
                self._inside.pop()
            key = self._key(output)
            if key is not None:
                self._tensors[key].gave.append(path)
                if is_norm:
                    self._norms.setdefault(path, key)

        return note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self._attentions += is_attention_op(name, args)
        if name.startswith("aten.add.") and self._inside and all(isinstance(arg, Tensor) for arg in args[:2]):
            self._add(args[0], args[1], result)
        return result

    def _add(self, one: Tensor, other: Tensor, result: Tensor) -> None:
        first, second, total = (self._key(tensor) for tensor in (one, other, result))
        if first is None or second is None or total is None or not one.shape == other.shape == result.shape:
            return
        self._sums.append(_RecordedSum(self._inside[-1], (first, second), total, self._attentions))

    def _key(self, tree: Any) -> _Key | None:
        """Which tensor the first in a tree is."""
        found = next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)
        if found is None:
            return None
        key = (found.data_ptr(), found.shape)
        if key not in self._tensors:
            self._kept.append(found)
            self._tensors[key] = _TensorUses(self._time)
        return key

    # ── Afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────
    def told(self, head: str | None) -> ResidualStream:
        """What is to be learned from it."""
        blocks = sorted(self._known & self._entered.keys(), key=lambda path: self._entered[path])
        seen: dict[tuple[str, ...], Sublayer] = {}
        for block in blocks:
            for found in self._of_block(block):
                seen.setdefault(found.modules, found)
        embedding = self._given(self._took.get(blocks[0]), "") if blocks else ()
        taken = self._tensors.get(self._took[head]) if head in self._took else None
        ends = None if head is None else tuple(taken.gave) if taken else ()
        return ResidualStream(tuple(blocks), tuple(seen.values()), embedding, ends)

    def _of_block(self, block: str) -> Iterator[Sublayer]:
        sums = [found for found in self._sums if found.block == block]
        operands = {key for found in sums for key in found.operands}
        stream, attentions, crossed = {self._took.get(block)}, self._begun[block], False
        for found in sums:
            pair = self._parted(found, block, stream)
            if pair is None:
                continue
            modules, residual = pair
            readers = [path for path in self._tensors[residual].took if _within(path, block)]
            norms = [path for path in self._tensors[found.result].took if path in self._norms and _within(path, block)]
            goes_on = found.result in operands or block in self._tensors[found.result].gave
            kind: SublayerKind = "mlp" if found.attentions == attentions else "cross" if crossed else "attention"
            stream |= {found.result, *(self._norms[path] for path in norms)}
            attentions, crossed = found.attentions, kind != "mlp"
            norm = None if goes_on else next(iter(norms), None)
            yield Sublayer(block, kind, modules, next(iter(readers), None), norm)

    def _parted(self, found: _RecordedSum, block: str, stream: set[_Key | None]) -> tuple[tuple[str, ...], _Key] | None:
        """(modules that give what is added, what it is added to); None where the sum is not one with the stream."""
        for added, residual in (found.operands, found.operands[::-1]):
            modules = self._given(added, block)
            if modules and residual in stream and self._tensors[residual].since < self._entered[modules[0]]:
                return modules, residual
        return None

    def _given(self, key: _Key | None, block: str) -> tuple[str, ...]:
        """Paths of the outermost modules inside a block that give a tensor."""
        gave = [path for path in self._tensors[key].gave if _within(path, block)] if key in self._tensors else []
        least = min((path.count(".") for path in gave), default=0)
        return tuple(dict.fromkeys(path for path in gave if path.count(".") == least))


def _within(path: str, block: str) -> bool:
    return not block or path.startswith(f"{block}.")


# ── Sites ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def find_sublayer_sites(view: ModelView, stream: ResidualStream) -> dict[str, Sublayer]:
    """The path of the site that stands for a sublayer: the norm behind it, or its first module whose width is known."""
    paths = [(found.norm or _find_known_site(found.modules, view), found) for found in stream.sublayers]
    return {path: found for path, found in paths if path is not None}


def find_stream_ends(view: ModelView, stream: ResidualStream) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the site that gives the stream its first value, and of the one whose output the output layer takes.

    Each is one, or none of the latter where the model has no output layer.

    Raises:
        SiteError: no module does that, is called for that alone and tells its width by its structure.
    """
    ends = []
    for what, candidates in (("the first block", stream.embedding), ("the output layer", stream.head)):
        alone = [path for path in candidates or () if _has_single_name(path, view.module)]
        known = _find_known_site(alone, view)
        if known is None and candidates is not None:
            raise SiteError(
                f"no one module gives what {what} of {type(view.module).__name__} takes, is called for that alone and "
                f"tells its width by its structure; looked at "
                f"{', '.join(candidates) or 'none, for something lies between'}",
                next_step="leave inv_adapter out, or name the modules in embeddings= and heads=",
                code="site_unsupported",
            )
        ends.append(() if known is None else (known,))
    return ends[0], ends[1]


def find_common_norm_eps(norms: Sequence[nn.Module], otherwise: float) -> float:
    """The eps that LayerNorms have; ``otherwise`` where there are none.

    Raises:
        SiteError: it is not the same for all, or one has no weight and bias.
    """
    found = {float(norm.eps) for norm in norms if isinstance(norm, nn.LayerNorm)}
    plain = [norm for norm in norms if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None]
    if len(found) > 1 or plain:
        raise SiteError(
            "a LayerNorm behind a sublayer has no weight and bias" if plain else f"LayerNorms have eps {sorted(found)}",
            next_step="narrow targets= to sublayers whose norms are alike",
            code="site_unsupported",
        )
    return found.pop() if found else otherwise


def _find_known_site(paths: Iterable[str], view: ModelView) -> str | None:
    """The first of some modules that is a site, or whose structure tells how wide it is."""
    return next(
        (p for p in paths if p in view.sites or infer_module_site(p, view.module, view.sites) is not None), None
    )


def _has_single_name(path: str, model: nn.Module) -> bool:
    """Whether a module has no other name: one that an encoder shares with a decoder is called for both."""
    module = model.get_submodule(path)
    return sum(other is module for _, other in model.named_modules(remove_duplicate=False)) == 1
