"""``compile``: a pipeline and its adapters for a target."""

import copy
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lorac.argument_types import describe_value
from lorac.diffusion.parts import PipelinePart, find_parts, make_part_inputs, upcasts, widen
from lorac.diffusion.pipeline import CompiledPipeline, Pipeline, make_pipeline_class
from lorac.diffusion.running_call import RunningCall
from lorac.errors import ChoiceError, CompileError, OptionError, nearest_name
from lorac.frontend.host import Host
from lorac.session.api import Adapters
from lorac.session.api import compile as compile_models
from lorac.session.compiled import Compiled


def compile(
    pipeline: Pipeline,
    adapters: Adapters = (),
    target: str = "eager",
    *,
    parts: Collection[str] | None = None,
    example_inputs: Mapping[str, object] | None = None,
    **options: Any,
) -> CompiledPipeline:
    """Compile the models of a pipeline together with their adapters, and return a pipeline that runs them.

    An adapter may span the models: a file for the U-Net and the text encoders is one adapter. Batches, sizes of images
    and numbers of tokens may differ from call to call.

    Args:
        pipeline: of diffusers; left as it was. The result shares its tokenizers, its scheduler, and whatever is not
            compiled.
        adapters, target: as for ``lorac.compile``. LoRAs that the pipeline has loaded come along.
        parts: names of the models to compile; default: the denoiser, the VAE's decoder and the text encoders.
        example_inputs: by model, for models whose configuration does not determine them.
        **options: of ``lorac.compile``, such as ``mode=``, ``active=`` and ``reserve=``.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    models = {name: widen(model) for name, model in _select(pipeline, parts).items()}
    found = [name for name, model in models.items() if upcasts(model)]  # a VAE whose pictures would be lost
    if options.get("dtype") in (torch.float16, "float16") and found:
        raise OptionError(
            f"'{found[0]}' of the pipeline overflows in float16 (its configuration says force_upcast)",
            next_step="give pipeline.to(torch.float16) without dtype=, which compiles all but the VAE in float16",
        )
    given = example_inputs or {}
    unknown = sorted(given.keys() - models.keys())
    if unknown:
        raise ChoiceError(
            f"example_inputs= names '{unknown[0]}', which is not compiled",
            nearest=nearest_name(unknown[0], models),
            next_step=f"it takes {', '.join(models)} as keys",
        )
    captured = {name: Host.of(model).decoder() for name, model in models.items()}
    made = {name: inputs for name, model in captured.items() if (inputs := make_part_inputs(model)) is not None}
    compiled = compile_models(captured, adapters, target, {**made, **given}, **options)
    return _place(pipeline, compiled, captured)


def place_parts(pipeline: Pipeline, compiled: Compiled) -> CompiledPipeline:
    """Return a pipeline that runs compiled models, such as those of an artifact.

    Args:
        pipeline: of diffusers; left as it was.
        compiled: several models by their names in the pipeline, as ``lorac.load`` returns them.

    Raises:
        ChoiceError: a model has no place in the pipeline.
    """
    _check_pipeline(pipeline)
    unknown = [name for name in compiled.traits if name not in pipeline.components]
    if unknown:
        raise ChoiceError(
            f"the pipeline has no place for '{unknown[0]}'",
            nearest=nearest_name(unknown[0], pipeline.components),
            next_step="compile models by their names in the pipeline, as lorac.diffusion.compile does",
        )
    models = {name: pipeline.components[name] for name in compiled.traits}
    return _place(pipeline, compiled, {name: widen(m) for name, m in models.items() if isinstance(m, nn.Module)})


def _place(pipeline: Pipeline, compiled: Compiled, models: Mapping[str, nn.Module]) -> CompiledPipeline:
    running: ContextVar[RunningCall | None] = ContextVar("running", default=None)
    placed: Any = copy.copy(pipeline)
    placed.__class__ = make_pipeline_class(type(pipeline))
    placed.compiled, placed.running_call = compiled, running
    vars(placed).update({name: PipelinePart(compiled, name, running, models.get(name)) for name in compiled.traits})
    made: CompiledPipeline = placed
    return made


def _select(pipeline: Pipeline, parts: Collection[str] | None) -> dict[str, nn.Module]:
    """Return the models of a pipeline that are to be compiled."""
    _check_pipeline(pipeline)
    found = find_parts(pipeline.components)
    every = {name: model for name, model in pipeline.components.items() if isinstance(model, nn.Module)}
    for name in () if parts is None else parts:
        if name not in every:
            raise OptionError(
                f"parts= names '{name}', which is not a model of the pipeline",
                nearest=nearest_name(name, every),
                next_step=f"its models are {', '.join(every)}",
            )
    return found if parts is None else {name: every[name] for name in parts}


def _check_pipeline(pipeline: object) -> None:
    if isinstance(pipeline, CompiledPipeline):
        raise CompileError(
            "the pipeline is compiled already", next_step="compile the original pipeline, which is unchanged"
        )
    if not isinstance(getattr(pipeline, "components", None), Mapping):
        raise CompileError(
            f"the pipeline is {describe_value(pipeline)}, not a pipeline of diffusers",
            next_step="give a loaded one; lorac.compile takes models, alone or several by name",
        )
