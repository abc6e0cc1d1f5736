"""``compile`` and ``load``: the only module that knows all the others."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.compiler.compilation import Compilation, Source
from lorac.errors import (
    ArtifactError,
    MissingExtra,
    Unavailable,
    UnknownOption,
    nearest_name,
)
from lorac.ir.host.components import Models
from lorac.ir.host.sites import parameter_site
from lorac.ir.slots.planning import Reserve
from lorac.ir.store.plans import choice_from_json, plan_from_json
from lorac.ir.store.tensors import TensorFile, file_base
from lorac.runtime import artifact
from lorac.runtime.compiled import Compiled
from lorac.runtime.host import Host
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

TARGETS = {"eager": None, "onnxruntime": None, "tensorrt": "tensorrt"}
"""Targets there are, and the extra each needs."""


def compile(  # noqa: PLR0913, PLR0917  (the interface of DESIGN 2)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Mapping[str, Source] | Iterable[Source] = (),
    target: str = "eager",
    example_inputs: Any = None,
    mode: str = "auto",
    active: Any = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module; left as it was: weights, flags, hooks, mode, random state. Or several by name, for eager:
            sites begin with a model's name, and ``compiled[name](...)`` calls it.
        adapters: paths, Adapters, or fresh Variants (to train), by name or as a list.
        target: ``"eager"``, ``"onnxruntime"`` or ``"tensorrt"``.
        example_inputs: tuple or dict; default: made from the model's main input and config.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: what ``swap`` takes; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters added later; default: the given adapters' sites.
        dynamic_shapes: as torch.export's; default: batch, and length for text.
        dtype, device: default: the model's.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    host = Models(dict(model)) if isinstance(model, Mapping) else model
    backend, backend_options = _backend(target, options)
    moved = backend.host_for(_moved(host, dtype, device))
    compilation = Compilation(Host(moved, model, {"dtype": dtype, "device": device}), compile)
    compilation.casts = _casts(host, moved)
    return compilation.run(
        backend=backend,
        options=backend_options,
        sources=_named(adapters),
        target=target,
        example_inputs=example_inputs,
        mode=mode,
        active=active,
        reserve=reserve,
        dynamic_shapes=dynamic_shapes,
    )


def load(folder: str | Path, target: str | None = None, device: str | torch.device | None = None) -> Compiled:
    """A compiled model from an artefact of ``compiled.save``; it needs neither the host nor its weights elsewhere.

    Every file is held against the manifest's hash. What is loaded answers, swaps and takes further adapters, but does
    not train. Nothing that the artefact names is run; output classes are taken from transformers alone, anything else
    that the host answered with comes back as a plain dict or tuple.

    Args:
        folder: the artefact.
        target: default: the one it was saved from. An eager artefact can also be compiled for another target.
        device: default: the one it was saved from, or the CPU.

    Raises:
        ArtifactError: damaged, unsafe, of another version, or no artefact.
        Unavailable: the artefact cannot be turned into the target.
    """
    folder = Path(os.path.realpath(folder))
    manifest = artifact.read(folder)
    try:
        return _loaded(manifest, folder, target or manifest["target"], device)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"the manifest of '{folder}' does not fit together: {type(error).__name__}: {error}",
            next_step="save the artefact again with this version",
        ) from error


def _loaded(manifest: Mapping[str, Any], folder: Path, target: str, device: Any) -> Compiled:
    stored = manifest["target"]
    saved, options = _backend(stored, {})
    file = TensorFile(saved.base_file(folder))
    compilation = Compilation(Host.stored(manifest["host"], file), compile, file_base(file))
    for name, entry in manifest["adapters"].items():
        source = artifact.inside(manifest, folder, entry["file"])
        compilation.register(compilation.load(source, name))
    model, sites = compilation.host.module, compilation.sites
    plans = {
        path: plan_from_json(sites.get(path) or parameter_site(path, model), plan)
        for path, plan in manifest["plans"].items()
    }
    mode, choice, program = manifest["mode"], choice_from_json(manifest["active"]), manifest["program"]
    if target == stored:
        engine = saved.restore(program, folder, plans, mode, device)
        return compilation.assemble(saved, engine, plans, mode, choice)
    if stored != "eager":
        raise Unavailable(
            f"'{folder}' holds a program for {stored}, which cannot be turned into one for {target}",
            next_step="compile from the model, or save an eager artefact: that can be loaded for every target",
        )
    backend, options = _backend(target, {})
    program_of = saved.relowered(program, folder, sites, plans)
    request = compilation.requested(plans, mode, choice, options, lowered=program_of)
    return compilation.finish(backend, backend.build(request), request, choice)


def _named(adapters: Mapping[str, Source] | Iterable[Source]) -> list[tuple[str | None, Source]]:
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, str | Path | Adapter | Variant):
        return [(None, adapters)]
    return [(None, source) for source in adapters]


def _backend(target: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    if target not in TARGETS:
        raise UnknownOption(
            f"there is no target '{target}'", nearest=nearest_name(target, TARGETS) or ", ".join(TARGETS)
        )
    try:
        backend = importlib.import_module(f"lorac.backends.{target}")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or target, TARGETS[target] or target) from error
    known = [field.name for field in dataclasses.fields(backend.Options)]
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"target '{target}' has no option '{name}'",
                nearest=nearest_name(name, known),
                next_step=f"it takes {', '.join(known) or 'none'}",
            )
    return backend, backend.Options(**options)


def _moved(host: nn.Module, dtype: torch.dtype | None, device: Any) -> nn.Module:
    if dtype is None and device is None:
        return host
    return copy.deepcopy(host).to(device=device, dtype=dtype)


def _casts(host: nn.Module, moved: nn.Module) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """The dtypes of parameters that the target computes with in another one."""
    if host is moved:
        return ()
    pairs = zip(host.parameters(), moved.parameters(), strict=True)
    return tuple(sorted({(a.dtype, b.dtype) for a, b in pairs if a.dtype != b.dtype}, key=str))
