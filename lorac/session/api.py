"""``compile``: a model and its adapters for a target."""

from collections.abc import Iterable, Mapping
from typing import Literal, overload

import torch
from torch import nn

from lorac.ir.slots.choice import ChoiceSpec
from lorac.ir.slots.required_slots import Reserve
from lorac.session.compiled import Compiled, CompiledModule, build_compiled
from lorac.session.request.compile_request import CompileRequest
from lorac.session.request.sources import AdapterSource, read_model

Adapters = AdapterSource | Mapping[str, AdapterSource] | Iterable[AdapterSource]


@overload
def compile(
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Adapters = ...,
    target: Literal["eager"] = ...,
    example_inputs: object = ...,
    mode: str = ...,
    active: ChoiceSpec = ...,
    reserve: Reserve | None = ...,
    dynamic_shapes: object = ...,
    dtype: torch.dtype | str | None = ...,
    device: torch.device | str | None = ...,
    **options: object,
) -> CompiledModule: ...
@overload
def compile(
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Adapters = ...,
    target: str = ...,
    example_inputs: object = ...,
    mode: str = ...,
    active: ChoiceSpec = ...,
    reserve: Reserve | None = ...,
    dynamic_shapes: object = ...,
    dtype: torch.dtype | str | None = ...,
    device: torch.device | str | None = ...,
    **options: object,
) -> Compiled: ...
def compile(  # noqa: PLR0913, PLR0917  (the public interface)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Adapters = (),
    target: str = "eager",
    example_inputs: object = None,
    mode: str = "auto",
    active: ChoiceSpec = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: object = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: object,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module; its weights, flags, hooks, mode and random state stay as they are. Or several models by
            name: paths of sites then begin with the name, and ``compiled[name](...)`` calls that model. A PeftModel
            is split into its base and its adapters.
        adapters: paths, Adapters, fresh Variants (to train) or configurations of PEFT's, by name or as a list. The
            adapters of a PeftModel come first; an adapter given here replaces a PeftModel's adapter of its name.
        target: ``"eager"``, ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"`` or any other of
            ``lorac.session.targets.targets()``.
        example_inputs: tuple or dict of tensors or NumPy arrays, or a single tensor or array; for several models, a
            dict of these by name. Default: made from the model's main input and configuration.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: as for ``swap``; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters that are added later; default: the sites of the given adapters.
        dynamic_shapes: as torch.export takes them; for several models, a dict of these by name. Default: batch, and
            length for text. If the model's trace fixes such a size, a warning names it, and calls of another size
            are refused.
        dtype: a dtype or its name ("float16"); default: the model's. Floating-point example inputs are cast too, and
            so are inputs of calls in the model's own dtype. A target that lacks the dtype computes in another dtype,
            and so are its outputs; a warning and ``explain()`` say so.
        device: the device on which the result runs; default: the model's. Programs are always emitted from a model on
            the CPU, so a model on another device is copied. Outputs are on the device of the inputs.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    source = read_model(model)
    request = CompileRequest.read(
        adapters, target, example_inputs, mode, active, reserve, dynamic_shapes, dtype, device, **options
    )
    return build_compiled(source, request)
