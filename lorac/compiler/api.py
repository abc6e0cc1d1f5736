"""``compile`` and ``load``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lorac.compiler.compilation import Asked, Compilation
from lorac.compiler.handed import Source, device_of, model_of, sources_of
from lorac.compiler.precision import brought, dtype_named, refuse_lacking
from lorac.compiler.services import Lasting
from lorac.compiler.targets import backend_of
from lorac.errors import ArtifactError, LoracError, nearest_name
from lorac.formats import formats
from lorac.ir.host.components import Components
from lorac.ir.host.computed import with_plain_weights
from lorac.ir.host.example_inputs import as_tensors
from lorac.ir.host.sites import parameter_site
from lorac.ir.slots.choice import Spec
from lorac.ir.slots.planning import Reserve
from lorac.ir.store.folders import MANIFEST, steady
from lorac.ir.store.plans import choice_from_json, plan_from_json
from lorac.ir.store.tensors import TensorFile, file_base
from lorac.kinds import expect
from lorac.runtime.compiled import Compiled
from lorac.runtime.components import traits_from_json
from lorac.runtime.host import Host
from lorac.runtime.manifest import Manifest

Device = str | torch.device


def compile(  # noqa: PLR0913, PLR0917  (the public interface)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Mapping[str, Source] | Iterable[Source] = (),
    target: str = "eager",
    example_inputs: object = None,
    mode: str = "auto",
    active: Spec = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: object = None,
    dtype: torch.dtype | str | None = None,
    device: Device | None = None,
    **options: object,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module; left as it was: weights, flags, hooks, mode, random state. Or several by name: sites begin
            with a component's name, and ``compiled[name](...)`` calls it. A PeftModel is its base and its adapters.
        adapters: paths, Adapters, fresh Variants (to train) or configurations of PEFT's, by name or as a list; those
            that a PeftModel brings come first, but for names given here.
        target: ``"eager"``, ``"onnxruntime"`` or any other of ``lorac.compiler.targets.targets()``.
        example_inputs: tuple or dict of tensors or NumPy arrays, or one of these alone; of several models one tuple or
            dict by name. Default: made from the model's main input and config.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: what ``swap`` takes; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters added later; default: the given adapters' sites.
        dynamic_shapes: as torch.export's, of several models one by name; default: batch, and length for text. A size
            that the model's trace fixes nevertheless is named by a warning, and a call with another one refused.
        dtype: default: the model's; also by its name ("float16"). Floating-point example inputs, and inputs of calls
            in the model's own dtype, are cast with the model. A target that lacks the dtype computes and answers in
            another one, and a warning and ``explain()`` say so.
        device: default: the model's.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    if reserve is not None:
        expect(reserve, Reserve, "reserve=", next_step="give lorac.Reserve(targets=..., rank=...)")
    given = model_of(model)
    host = Components(given.model) if isinstance(given.model, Mapping) else given.model
    device = device_of(device)
    backend = backend_of(target)
    told = backend.told(options)
    wanted = dtype_named(dtype)
    moved, precision = brought(with_plain_weights(host), backend.dialect, wanted, device)
    lasting = Lasting(Host(moved, given.model, {"dtype": wanted, "device": device}))
    own = sources_of(adapters)
    brought_along = [named for named in given.adapters if named[0] not in dict(own)]
    examples = as_tensors(example_inputs)
    asked = Asked(
        mode=mode,
        active=given.active if active == "auto" and not own else active,
        reserve=reserve,
        example_inputs=examples if wanted is None else precision.fit(examples),
        dynamic_shapes=dynamic_shapes,
        options=told,
    )
    precision.tell(target)
    return Compilation(lasting, backend, compile, precision).run([*brought_along, *own], asked)


def load(folder: str | Path, target: str | None = None, device: Device | None = None) -> Compiled:
    """A compiled model from an artefact of ``compiled.save``; it needs neither the host nor its weights elsewhere.

    Every file is opened once, held against the manifest's hash and kept open: the folder may be replaced or removed
    from then on. What is loaded answers, swaps and takes further adapters, but does not train. A method of one's own
    needs no class for that, unless further adapters of it are added. Nothing that the artefact names is run; output
    classes are taken from transformers and diffusers alone, anything else that the host answered with comes back as a
    plain dict or tuple.

    Args:
        folder: the artefact.
        target: default: the one it was saved from. An eager artefact can also be compiled for another target.
        device: default: the one it was saved from, or the CPU.

    Raises:
        ArtifactError: damaged, unsafe, of another version, or no artefact.
        Unavailable: the artefact cannot be turned into the target.
    """
    expect(folder, (str, os.PathLike), "what lorac.load reads", next_step="give the path of a folder")
    folder = Path(os.path.realpath(folder))
    return steady(folder, lambda: _loaded_from(folder, target, device))


def _refuse_others(folder: Path) -> None:
    """Refuse what is at a folder's place and is no compiled model, saying what it is."""
    if (folder / MANIFEST).is_file():
        return
    if any(format.recognises(folder) for format in formats().values()):
        raise ArtifactError(
            f"'{folder}' is an adapter, and no compiled model",
            next_step="lorac.compile(model, adapters) takes its path; lorac.load_adapter(path) reads it",
        )
    if not folder.exists():
        raise ArtifactError(
            f"there is no compiled model at '{folder}'",
            nearest=nearest_name(folder.name, [found.parent.name for found in folder.parent.glob(f"*/{MANIFEST}")]),
            next_step="compiled.save(folder) writes one",
        )


def _loaded_from(folder: Path, target: str | None, device: Device | None) -> Compiled:
    _refuse_others(folder)
    try:
        manifest = Manifest.of(folder)
        return _loaded(manifest, target or manifest.target, device)
    except LoracError:
        raise
    except Exception as error:  # its seal agrees, so somebody made it so: what reads it may stumble anywhere
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"the manifest of '{folder}', or a file of it, does not fit together: {type(error).__name__}: {reason}",
            next_step="save the artefact again with this version",
        ) from error


def _loaded(manifest: Manifest, target: str, device: Device | None) -> Compiled:
    saved = backend_of(manifest.target)
    file = TensorFile(saved.base_file(manifest.files))
    lasting = Lasting(Host.stored(manifest.host, file), file_base(file))
    for name, record, forms in manifest.adapters():
        lasting.restore(name, record, forms)
    model, sites = lasting.host.module, lasting.sites
    plans = {
        path: plan_from_json(sites.get(path) or parameter_site(path, model), plan)
        for path, plan in manifest.plans.items()
    }
    choice = choice_from_json(manifest.active)
    if target == manifest.target:
        compilation = Compilation(lasting, saved, compile)
        compilation.traits = traits_from_json(manifest.components)
        engine = saved.restore(manifest.program, manifest.files, plans, manifest.mode, device)
        return compilation.assembled(engine, plans, manifest.mode, choice)
    backend = backend_of(target)
    refuse_lacking(backend.dialect, (plan.site.dtype for plan in plans.values()), str(manifest.folder))
    program = saved.program_of(manifest.program, manifest.files, sites, plans)
    return Compilation(lasting, backend, compile).built(plans, manifest.mode, choice, backend.told({}), program)
