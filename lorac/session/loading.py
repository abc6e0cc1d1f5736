"""``load``: a compiled model from an artefact. What compiling takes is imported only where another target is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lorac.argument_types import check_type
from lorac.errors import ArtifactError, LoracError, nearest_name
from lorac.formats import formats
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import list_callable_paths, make_module_site
from lorac.ir.sites import Site
from lorac.ir.slots.program_values import make_once_site
from lorac.runtime.generation.tokenizers import TokenizerFiles
from lorac.runtime.traits import traits_from_json
from lorac.session.assembly import Assembly
from lorac.session.compiled import Compiled
from lorac.session.host_model import HostModel
from lorac.session.manifest import Manifest
from lorac.session.placement import resolve_placement
from lorac.session.precision import check_stored_dtypes
from lorac.session.session import Session
from lorac.session.sources import AdapterSource, check_device, parse_device
from lorac.session.targets import find_backend
from lorac.storage.atomic_folders import MANIFEST, read_consistently
from lorac.storage.plans import choice_from_json, plan_from_json


def load(folder: str | Path, target: str | None = None, device: str | torch.device | None = None) -> Compiled:
    """A compiled model from an artefact of ``compiled.save``; it needs neither the host nor its weights elsewhere.

    Every file is opened once, held against the manifest's hash and kept open: the folder may be replaced or removed
    from then on. What is loaded answers, swaps and takes further adapters, but does not train. A method of one's own
    needs no class for that, unless further adapters of it are added. Nothing that the artefact names is run. Output
    classes are those of transformers and diffusers alone: where the package is imported already, its own; else one that
    answers to the same names. Anything else that the host answered with comes back as a plain dict or tuple.

    Args:
        folder: the artefact.
        target: default: the one it was saved from. An eager artefact can also be compiled for another target.
        device: where it runs; default: where it ran when it was saved.

    Raises:
        ArtifactError: damaged, unsafe, of another version, or no artefact.
        Unavailable: the artefact cannot be turned into the target.
    """
    check_type(folder, (str, os.PathLike), "what lorac.load reads", next_step="give the path of a folder")
    folder, place = Path(os.path.realpath(folder)), parse_device(device)
    return read_consistently(folder, lambda: _load_folder(folder, target, place))


def _refuse_other_contents(folder: Path) -> None:
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


def _load_folder(folder: Path, target: str | None, device: torch.device | None) -> Compiled:
    _refuse_other_contents(folder)
    try:
        manifest = Manifest.of(folder)
        loaded = _load_manifest(manifest, target or manifest.target, device)
        loaded.tokenizer = TokenizerFiles.among(manifest.files)
        return loaded
    except LoracError:
        raise
    except Exception as error:  # its seal agrees, so somebody made it so: what reads it may stumble anywhere
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"the manifest of '{folder}', or a file of it, does not fit together: {type(error).__name__}: {reason}",
            next_step="save the artefact again with this version",
        ) from error


def _load_manifest(manifest: Manifest, target: str, device: torch.device | None) -> Compiled:
    saved = find_backend(manifest.target)
    base = saved.base_of(manifest.files)
    host = HostModel.stored(manifest.host, base or {})
    model = host.module  # held, so that it is made once
    lasting = Session(host)
    lasting.read_from(base)
    lasting.preparer.stored = manifest.reductions
    for name, record, forms in manifest.adapters():
        lasting.restore(name, record, forms)
    sites = lasting.sites
    plans = {path: plan_from_json(_planned_site(path, manifest, model, sites), p) for path, p in manifest.plans.items()}
    choice = choice_from_json(manifest.active)
    if target != manifest.target:
        from lorac.session.compilation import Compilation

        backend = find_backend(target)
        options, _ = resolve_placement(backend, backend.told({}), device)
        check_stored_dtypes(
            backend.dialect_for(options), (plan.site.dtype for plan in plans.values()), str(manifest.folder)
        )
        program = saved.program_of(manifest.program, manifest.files, sites, plans)
        return Compilation(lasting, backend, _compile).built(plans, manifest.mode, choice, options, program)
    if device is not None and not saved.dialect.emits:
        check_device(device)
    engine = saved.restore(manifest.program, manifest.files, plans, manifest.mode, device)
    traits = traits_from_json(manifest.components)
    return Assembly(lasting=lasting, backend=saved, again=_compile, traits=traits).over(
        engine, plans, manifest.mode, choice
    )


def _planned_site(path: str, manifest: Manifest, model: nn.Module, sites: Mapping[str, Site]) -> Site:
    """The site of a stored plan, be it one that no adapter of the artefact names any more."""
    if path in sites:
        return sites[path]
    if path in list_callable_paths(model):
        return make_module_site(path, model, sites)
    for reader, plan in manifest.plans.items():
        if any(branch["once"] == path for branch in plan["branches"]):
            return make_once_site(path, _planned_site(reader, manifest, model, sites).dtype)
    return ModelView(model, sites).make_parameter_site(path)


def _compile(model: nn.Module, adapters: Mapping[str, AdapterSource], **given: object) -> Compiled:
    from lorac.session.api import compile

    return compile(model, adapters, **given)  # type: ignore[arg-type]  # what export() was given, as it came
