"""Capture: a host model becomes an ExportedProgram in which every call of a site is one ``lorac`` node.

The host is never touched. ``structural_copy`` makes a second tree of modules over the same storage; ``mark`` gives the
sites of that copy a forward that calls the site's op; ``export`` traces it. Hugging Face models go through
``transformers.exporters``, which patches what does not trace, all others through ``torch.export`` directly.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lorac.ir import ops
from lorac.errors import CaptureFailed, ExampleInputsNeeded
from lorac.ir.copying import structural_copy

Inputs = Mapping[str, Any]
Forward = Callable[..., Any]

_LOCK = threading.RLock()  # tracing swaps attributes of torch and of transformers' classes for the whole process
_BATCH, _LENGTH, _MASK_PREFIX = 2, 7, "decoder_"
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_MACHINERY = frozenset({os.path.abspath(__file__), os.path.abspath(ops.__file__)})
_LIBRARIES = ("/torch/", "/transformers/exporters/", "<string>", "<frozen")
_STDLIB = sysconfig.get_paths()["stdlib"]


# ── The sites ────────────────────────────────────────────────────────────────────────────────────────────────────────
def mark(model: nn.Module, blocks: Collection[str] = ()) -> list[str]:
    """Make every site of ``model`` (a structural copy) call its op, in place; return the paths of the sites.

    Args:
        model: the copy.
        blocks: paths of modules whose exits are marked too.

    Raises:
        CaptureFailed: ``blocks`` names no module of the model.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(set(blocks) - modules.keys()):
        raise CaptureFailed(f"the model has no module {unknown[0]!r} to mark as a block")
    sites = []
    for path, module in modules.items():
        if (forward := _site_forward(module, path)) is not None:
            _override(module, forward)
            sites.append(path)
    for path in blocks:
        modules[path].forward = _block_forward(modules[path].forward, path)
        sites.append(path)
    return sites


def _site_forward(module: nn.Module, path: str) -> Forward | None:
    """The forward that calls the op of this site; None where the module is no site."""
    if isinstance(module, nn.Linear):
        return lambda input: torch.ops.lorac.linear(input, module.weight, module.bias, path)
    if isinstance(module, nn.Embedding) and module.max_norm is None:  # max_norm writes into the weight
        padding = -1 if module.padding_idx is None else module.padding_idx
        return lambda input: torch.ops.lorac.embedding(input, module.weight, padding, path)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _conv_forward(module, path)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return lambda x: torch.ops.lorac.linear(x, module.weight.t(), module.bias, path)
    return None


def _conv_forward(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, path: str) -> Forward:
    """A convolution's forward; padding the op does not know (by mode, or lopsided "same") is done before it."""
    pads = module._reversed_padding_repeated_twice
    lopsided = any(pads[i] != pads[i + 1] for i in range(0, len(pads), 2))
    before = module.padding_mode != "zeros" or lopsided
    mode = module.padding_mode if module.padding_mode != "zeros" else "constant"
    padding = [0] * len(module.stride) if before else list(pads[::-2])
    stride, dilation = list(module.stride), list(module.dilation)

    def forward(input: Tensor) -> Tensor:
        x = F.pad(input, pads, mode=mode) if before else input
        return torch.ops.lorac.conv(x, module.weight, module.bias, stride, padding, dilation, module.groups, path)

    return forward


def _override(module: nn.Module, forward: Forward) -> None:
    """Replace a layer's own forward, also below a subclass whose forward calls ``super().forward`` (a scaled or
    offset embedding) and below a wrapper on the instance (accelerate's hooks)."""
    if "_old_forward" in vars(module):
        module._old_forward = forward
        return
    base = next(cls for cls in type(module).__mro__ if cls in _LAYERS or cls.__name__ == "Conv1D")
    if type(module).forward is base.forward:
        module.forward = forward
        return
    below = type(base.__name__, (base,), {"forward": lambda self, *args, **kwargs: forward(*args, **kwargs)})
    cls = type(module)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    module.__class__ = type(cls.__name__, (cls, below), names)


_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _block_forward(original: Forward, path: str) -> Forward:
    """A block's forward with the first tensor of its output marked; the kind of output stays."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        x = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        leaves, spec = pytree.tree_flatten(output)
        index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[index] = torch.ops.lorac.block(x, leaves[index], path)
        return pytree.tree_unflatten(leaves, spec)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


# ── The inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────
def default_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs from the model's main input and configuration.

    Raises:
        ExampleInputsNeeded: neither text nor pixels, or a model that joins them by special tokens.
    """
    config, names = getattr(model, "config", None), list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", None) if _is_hugging_face(model) else None
    inputs: dict[str, Tensor] = {}
    placeholder = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if placeholder is None and main in ("input_ids", "pixel_values") and main in names:
        device = next((p.device for p in model.parameters()), None)
        if main == "input_ids":
            inputs |= _text_inputs(config, names, device)
        if "pixel_values" in names and (pixels := _pixels(model, config, device)) is not None:
            inputs["pixel_values"] = pixels
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _ids(config, _LENGTH - 2, device)
    if main not in inputs:
        raise ExampleInputsNeeded(
            f"example inputs cannot be made for {type(model).__name__}; its forward takes ({', '.join(names)})",
            next_step="pass example_inputs= a tuple or a dict of tensors, batch and lengths of 2 or more",
        )
    return inputs


def _text_inputs(config: Any, names: Collection[str], device: Any) -> dict[str, Tensor]:
    ids = _ids(config, _LENGTH, device)
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {})


def _ids(config: Any, length: int, device: Any) -> Tensor:
    """Distinct-looking token ids without a random generator; the last is the end of the text (CLIP looks for it)."""
    text = config.get_text_config(decoder=True)
    ids = (torch.arange(_BATCH * length, device=device).reshape(_BATCH, length) * 5 + 3) % text.vocab_size
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def _pixels(model: nn.Module, config: Any, device: Any) -> Tensor | None:
    """Images of the configured size; None where no size is configured."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else (tuple(size or ()) or (None, None))
    if height is None:
        return None
    shape = (_BATCH, getattr(vision, "num_channels", 3), height, width)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device).remainder(255) / 127.5 - 1).reshape(shape).to(dtype)


def default_shapes(model: nn.Module, inputs: Inputs, *, named: bool = True) -> dict[str, Any]:
    """Dynamic shapes: the batch of every tensor input, and the length of text inputs.

    Args:
        model: bounds the length where positions come from a table.
        inputs: the example inputs, by name.
        named: ``Dim``s called batch, length and decoder_length; else ``Dim.AUTO``, which lets torch narrow them.
    """
    limit = _position_limit(model)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    batch = tensors[0].shape[0] if tensors else None
    dims: dict[str, Any] = {"batch": Dim("batch")}
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            shapes[name] = None
            continue
        shapes[name] = axes = {}
        if value.dim() and value.shape[0] == batch:
            axes[0] = dims["batch"] if named else Dim.AUTO
        plain = name.removeprefix(_MASK_PREFIX)
        if _is_hugging_face(model) and plain in _TEXT and value.dim() >= 2:
            length = "length" if plain == name else "decoder_length"
            axes[1] = dims.setdefault(length, Dim(length, max=limit)) if named else Dim.AUTO
    return shapes


def _position_limit(model: nn.Module) -> int | None:
    """The longest text a table of positions admits; None where positions are computed (rotary, relative)."""
    config = getattr(model, "config", None)
    if config is None or not _is_hugging_face(model):
        return None
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = (path for path, module in model.named_modules() if isinstance(module, nn.Embedding))
    return limit if any(re.search(r"(^|\.)(wpe|\w*position\w*)$", path) for path in tables) else None


# ── The export ───────────────────────────────────────────────────────────────────────────────────────────────────────
def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Inputs | None = None,
    dynamic_shapes: Any = None,
    *,
    blocks: Collection[str] = (),
) -> ExportedProgram:
    """Capture ``model`` in eval mode, each call of a site one ``lorac`` node whose last argument is the site's path.

    Args:
        model: the host; left as it was.
        example_inputs: what forward is called with; None makes them (``default_inputs``).
        dynamic_shapes: as ``torch.export`` takes them; None means batch, and length for text.
        blocks: paths of modules whose exits are marked too.

    Raises:
        ExampleInputsNeeded: there are no inputs and none can be made.
        CaptureFailed: the model does not trace; the message names the line that does not.
    """
    given = default_inputs(model) if example_inputs is None else example_inputs
    inputs = _by_name(model, given) if isinstance(given, Mapping) or _is_hugging_face(model) else given
    with _LOCK, torch.no_grad(), torch.random.fork_rng(devices=[]), _no_fast_path():
        try:
            host = structural_copy(model, share_buffers=True).eval()
        except Exception as error:
            raise CaptureFailed(f"{type(model).__name__} cannot be copied: {error}") from error
        mark(host, blocks)
        attempts = [dynamic_shapes] if dynamic_shapes is not None else _attempts(model, inputs)
        for shapes in attempts:
            try:
                return _trace(host, inputs, shapes)
            except Exception as error:
                cause = error
                if not _is_about_shapes(error):
                    break
        failure = _failure(host, inputs, shapes, cause)
    raise failure from cause


def _trace(host: nn.Module, inputs: Any, shapes: Any) -> ExportedProgram:
    """One torch.export of a marked copy."""
    if _is_hugging_face(host):
        return _trace_hugging_face(host, inputs, shapes)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    return torch.export.export(host, args, kwargs, dynamic_shapes=shapes)


def _trace_hugging_face(host: nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    """Through transformers' exporter, without caches. It changes its arguments: the copy's, not the host's."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    class Exporter(DynamoExporter):
        tested_versions: ClassVar[dict[str, str]] = {}  # says at every export that torch is newer than the one they tested

    for module in host.modules():
        if hasattr(config := getattr(module, "config", None), "use_cache"):
            config.use_cache = False
    program, _ = Exporter().export_program(host, dict(inputs), DynamoConfig(dynamic_shapes=shapes))
    return program


def _attempts(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """The default shapes to try: named dims, then dims that torch may narrow or fix."""
    named = isinstance(inputs, Mapping)
    by_name = inputs if named else {str(i): value for i, value in enumerate(inputs)}
    for names in (True, False):
        shapes = default_shapes(model, by_name, named=names)
        yield shapes if named else tuple(shapes.values())


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer and nn.MultiheadAttention off the fused kernel that bypasses their layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# ── The errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_about_shapes(error: BaseException) -> bool:
    """Whether the model traced, but not for every size the shapes promise."""
    return any(type(e).__name__ in ("ConstraintViolationError", "UserError") for e in _chain(error))


def source_line(error: BaseException) -> str | None:
    """``file:line: code`` of the innermost line of the model in an error of torch.export; None where there is none.

    Tracing runs the model's own Python, so its frames are in the traceback.
    """
    for e in _chain(error):
        if line := _model_line(traceback.extract_tb(e.__traceback__)):
            return line
    return None


def _model_line(frames: Sequence[traceback.FrameSummary]) -> str | None:
    entered = next((i for i, frame in enumerate(frames) if frame.name == "_call_impl"), len(frames))
    for frame in reversed(frames[entered:]):
        if _is_model_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


def _is_model_file(filename: str) -> bool:
    if filename in _MACHINERY or (filename.startswith(_STDLIB) and "site-packages" not in filename):
        return False
    path = filename.replace(os.sep, "/")
    return not any(part in path for part in _LIBRARIES)


class _GuardLines(logging.Handler):
    """Where guards come from: a broken promise about sizes is reported after the trace, when the line is gone, but
    torch logs each guard while the line runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "[guard added]" in record.getMessage() and (line := _model_line(traceback.extract_stack())):
            self.lines.append(line)


def _guard_lines(host: nn.Module, inputs: Any, shapes: Any) -> list[str]:
    """The lines of the model that need particular sizes, found by tracing once more."""
    logger, handler = logging.getLogger("torch.fx.experimental.symbolic_shapes"), _GuardLines()
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        with contextlib.suppress(Exception):
            _trace(host, inputs, shapes)
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
    return list(dict.fromkeys(handler.lines))


def _failure(host: nn.Module, inputs: Any, shapes: Any, error: Exception) -> CaptureFailed:
    line = source_line(error)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    step = "make this line independent of the values of tensors (torch.where, torch.cond)"
    if _is_about_shapes(error):
        lines = _guard_lines(host, inputs, shapes)
        line = line or (lines[0] if lines else None)
        reason = " ".join(str(error).partition("The error above")[0].split())
        step = "give dynamic_shapes= that this line admits, or change the line"
    elif not isinstance(error, GuardOnDataDependentSymNode):
        step = "the same call in eager shows whether the inputs fit the model"
    return CaptureFailed(
        f"torch.export cannot trace {type(host).__name__}" + (f" at {line}" if line else "") + f": {reason}",
        next_step=step,
    )


def _is_hugging_face(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _by_name(model: nn.Module, given: Any) -> dict[str, Any]:
    """Inputs as a dict: a tuple is bound to the names of forward, and what is None is left out."""
    if not isinstance(given, Mapping):
        given = inspect.signature(model.forward).bind(*given).arguments
    return {name: value for name, value in given.items() if value is not None}
