"""The sublayers of a model's residual stream, found by one run: attentions, MLPs and their residuals.

A copy of the model runs. A recorder notes the tensors that each module takes and returns, and the tensors that are
added; names do not matter. Within a block, the sum of the stream and a module's output is a sublayer:

1. its **module** is the outermost module inside the block that returns the added tensor;
2. its **residual** is the other operand: the block's input, an earlier sum, or the norm of an earlier sum;
3. it is an **attention** if an attention was computed since the previous sum, and a **cross** attention if the previous
   sum was an attention; else it is an **mlp**;
4. it has a **norm** after it (a post-LN model) if a LayerNorm inside the block reads the sum, and the sum is neither an
   operand of another sum nor the block's output.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError
from lorac.frontend.model_runner import WatchingMode
from lorac.frontend.model_view import ModelView, find_output_layers
from lorac.frontend.module_sites import infer_module_site
from lorac.frontend.transformer_blocks import (
    copy_for_hooks,
    is_attention_op,
    iter_components,
    run_under_dispatch_mode,
)
from lorac.ir.sites.patterns import find_outermost_blocks

SublayerKind = Literal["attention", "cross", "mlp"]
_Key = tuple[int, torch.Size]
"""Identity of a tensor: its address and its shape. All tensors are kept alive, so that no address is reused."""


@dataclass(frozen=True)
class Sublayer:
    """An addition in a block to the stream of hidden states.

    Attributes:
        block: path of the block.
        modules: paths of the outermost modules that return the added tensor, in the order of their calls: more than one
            where a module passes on the output of another (dropout).
        residual: path of the module inside the block that takes the other operand; None if there is no such module.
        norm: path of the LayerNorm that is applied to the sum before it becomes the stream, or None.
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
        sublayers: additions of the blocks, in order.
        embedding: paths of the outermost modules that return the first block's input, as ``Sublayer.modules``.
        head: paths of the modules that return the output layer's input, innermost first; None if the model has no
            output layer, empty if no module returns this input.
    """

    blocks: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]
    embedding: tuple[str, ...]
    head: tuple[str, ...] | None


def trace_residual_stream(view: ModelView, inputs: object = None) -> ResidualStream:
    """Run a copy of a model and return its residual stream.

    Args:
        view: the model, which is not changed; each of several components is run.
        inputs: example inputs as ``lorac.compile`` takes them; by default made from the model's configuration.

    Raises:
        ExampleInputsNeeded: no inputs were given, and none can be made.
        CaptureError: the model cannot be copied.
    """
    parts = list[ResidualStream]()
    for model, prefix, sites, given in iter_components(view, inputs):
        copied = copy_for_hooks(model)
        recorder = _StreamRecorder({f"{prefix}{path}" for path in find_outermost_blocks(sites)})
        for path, module in copied.named_modules():
            if path:
                module.register_forward_pre_hook(recorder.enter(prefix + path), with_kwargs=True)
                module.register_forward_hook(recorder.leave(prefix + path, is_norm=isinstance(module, nn.LayerNorm)))
        run_under_dispatch_mode(copied, model, given, recorder)
        parts.append(recorder.summarize(next((prefix + path for path in find_output_layers(model)), None)))
    return ResidualStream(
        tuple(path for part in parts for path in part.blocks),
        tuple(sublayer for part in parts for sublayer in part.sublayers),
        tuple(path for part in parts for path in part.embedding),
        next((part.head for part in parts if part.head is not None), None),
    )


@dataclass
class _RecordedSum:
    """An addition inside a block, and the number of attentions before it."""

    block: str
    operands: tuple[_Key, _Key]
    result: _Key
    attentions: int


@dataclass
class _TensorUses:
    """The time at which a tensor was first seen, and the modules that took and returned it."""

    since: int
    taken_by: list[str] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)


class _StreamRecorder(WatchingMode):
    """A mode that records the tensors and additions of one run.

    Args:
        blocks: paths of the outermost blocks.
    """

    def __init__(self, blocks: set[str]) -> None:
        super().__init__()
        self._blocks = blocks
        self._held: list[Tensor] = []
        self._time, self._attentions = 0, 0
        self._open_blocks: list[str] = []
        self._tensors: dict[_Key, _TensorUses] = {}
        self._entered_at: dict[str, int] = {}
        self._attentions_before: dict[str, int] = {}
        self._inputs: dict[str, _Key] = {}
        self._norm_outputs: dict[str, _Key] = {}
        self._sums: list[_RecordedSum] = []

    def enter(self, path: str) -> Callable[[nn.Module, object, object], None]:
        """Return a hook to run before a module's forward."""

        def record(module: nn.Module, args: object, kwargs: object) -> None:
            self._time += 1
            self._entered_at.setdefault(path, self._time)
            if path in self._blocks:
                self._open_blocks.append(path)
                self._attentions_before.setdefault(path, self._attentions)
            key = self._key_of((args, kwargs))
            if key is not None:
                self._inputs.setdefault(path, key)
                self._tensors[key].taken_by.append(path)

        return record

    def leave(self, path: str, *, is_norm: bool) -> Callable[[nn.Module, object, object], None]:
        """Return a hook to run after a module's forward."""

        def record(module: nn.Module, args: object, output: object) -> None:
            self._time += 1
            if path in self._blocks:
                self._open_blocks.pop()
            key = self._key_of(output)
            if key is not None:
                self._tensors[key].returned_by.append(path)
                if is_norm:
                    self._norm_outputs.setdefault(path, key)

        return record

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        name = str(op)
        self._attentions += is_attention_op(name, args)
        if name.startswith("aten.add.") and self._open_blocks and all(isinstance(arg, Tensor) for arg in args[:2]):
            first, second, total = (self._hold(tensor) for tensor in (*args[:2], result))
            if args[0].shape == args[1].shape == result.shape:
                self._sums.append(_RecordedSum(self._open_blocks[-1], (first, second), total, self._attentions))
        return result

    def _key_of(self, tree: object) -> _Key | None:
        """Return the identity of the first tensor in a tree, and keep this tensor alive."""
        tensor = next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)
        return None if tensor is None else self._hold(tensor)

    def _hold(self, tensor: Tensor) -> _Key:
        key = (tensor.data_ptr(), tensor.shape)
        if key not in self._tensors:
            self._held.append(tensor)
            self._tensors[key] = _TensorUses(self._time)
        return key

    def summarize(self, head: str | None) -> ResidualStream:
        """Return the residual stream of the recorded run.

        Args:
            head: path of the output layer, or None.
        """
        blocks = sorted(self._blocks & self._entered_at.keys(), key=lambda path: self._entered_at[path])
        seen: dict[tuple[str, ...], Sublayer] = {}
        for block in blocks:
            for sublayer in self._find_sublayers(block):
                seen.setdefault(sublayer.modules, sublayer)
        embedding = self._outermost_sources(self._inputs.get(blocks[0]), "") if blocks else ()
        taken = self._tensors.get(self._inputs[head]) if head in self._inputs else None
        sources = None if head is None else tuple(taken.returned_by) if taken else ()
        return ResidualStream(tuple(blocks), tuple(seen.values()), embedding, sources)

    def _find_sublayers(self, block: str) -> Iterator[Sublayer]:
        sums = [found for found in self._sums if found.block == block]
        operands = {key for found in sums for key in found.operands}
        stream, attentions, crossed = {self._inputs.get(block)}, self._attentions_before[block], False
        for found in sums:
            for added, residual in (found.operands, found.operands[::-1]):
                modules = self._outermost_sources(added, block)
                if modules and residual in stream and self._tensors[residual].since < self._entered_at[modules[0]]:
                    break  # these modules return the added tensor
            else:
                continue
            total = self._tensors[found.result]
            readers = [path for path in self._tensors[residual].taken_by if _is_inside(path, block)]
            norms = [path for path in total.taken_by if path in self._norm_outputs and _is_inside(path, block)]
            goes_on = found.result in operands or block in total.returned_by
            kind: SublayerKind = "mlp" if found.attentions == attentions else "cross" if crossed else "attention"
            stream |= {found.result, *(self._norm_outputs[path] for path in norms)}
            attentions, crossed = found.attentions, kind != "mlp"
            norm = None if goes_on else next(iter(norms), None)
            yield Sublayer(block, kind, modules, next(iter(readers), None), norm)

    def _outermost_sources(self, key: _Key | None, block: str) -> tuple[str, ...]:
        """Return the paths of the outermost modules inside a block that return a tensor."""
        sources = self._tensors[key].returned_by if key in self._tensors else []
        inside = [path for path in sources if _is_inside(path, block)]
        depth = min((path.count(".") for path in inside), default=0)
        return tuple(dict.fromkeys(path for path in inside if path.count(".") == depth))


def _is_inside(path: str, block: str) -> bool:
    return not block or path.startswith(f"{block}.")


def find_sublayer_sites(view: ModelView, stream: ResidualStream) -> dict[str, Sublayer]:
    """Return site path -> sublayer; the site is the norm after it, or its first module whose width can be inferred."""
    paths = [(sublayer.norm or _first_site(sublayer.modules, view), sublayer) for sublayer in stream.sublayers]
    return {path: sublayer for path, sublayer in paths if path is not None}


def find_stream_start(view: ModelView, stream: ResidualStream) -> str:
    """Return the path of the site that returns the stream's first value.

    Raises:
        SiteError: no module with an inferable width returns that value and is called only for it.
    """
    known = _first_site([path for path in stream.embedding if _has_single_name(path, view.module)], view)
    if known is None:
        raise SiteError(
            f"no module of {type(view.module).__name__} returns the first block's input, does only that and shows its "
            f"width; looked at {', '.join(stream.embedding) or 'no module'}",
            next_step="leave inv_adapter out, or name the module in embeddings=",
        )
    return known


def find_stream_end(view: ModelView, stream: ResidualStream, taken: Collection[str]) -> tuple[str, bool] | None:
    """Return the path of the site that returns the output layer's input, and False; None without an output layer.

    If no module returns it, or all such modules are taken: the path of the output layer, and True.

    Args:
        taken: sites that have another adapter already.
    """
    if stream.head is None:
        return None
    free = [path for path in stream.head if path not in taken and _has_single_name(path, view.module)]
    found = _first_site(free, view)
    return (view.output_layers[0], True) if found is None else (found, False)


def find_common_norm_eps(norms: Sequence[nn.Module], default: float) -> float:
    """Return the common eps of LayerNorms; ``default`` if there are no norms.

    Raises:
        SiteError: the norms differ, or a norm lacks weight or bias.
    """
    found = {float(norm.eps) for norm in norms if isinstance(norm, nn.LayerNorm)}
    plain = [norm for norm in norms if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None]
    if len(found) > 1 or plain:
        raise SiteError(
            "a LayerNorm behind a sublayer has no weight and bias" if plain else f"LayerNorms have eps {sorted(found)}",
            next_step="narrow targets= to sublayers with equal norms",
        )
    return found.pop() if found else default


def _first_site(paths: Iterable[str], view: ModelView) -> str | None:
    """Return the first module that is a site, or whose width can be inferred; None if there is none."""
    return next((path for path in paths if path in view.sites or infer_module_site(path, view) is not None), None)


def _has_single_name(path: str, model: nn.Module) -> bool:
    """Return whether a module has only one name; a module that encoder and decoder share is called for both."""
    module = model.get_submodule(path)
    return sum(other is module for _, other in model.named_modules(remove_duplicate=False)) == 1
