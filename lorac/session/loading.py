"""``load``: a compiled model from an artifact. Modules that only compiling needs are imported where they are used."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from lorac.errors import ArtifactError, LoracError, OptionError, nearest_name
from lorac.formats import is_adapter
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import make_module_site
from lorac.ir.sites.site import Site
from lorac.ir.slots.choice import parse_choice
from lorac.ir.slots.program_values import make_once_site
from lorac.limits import read_trusted
from lorac.runtime.generation.tokenizers import TokenizerFiles
from lorac.runtime.traits import traits_from_json
from lorac.session.adapter_loading import restore_adapter
from lorac.session.compiled import Compiled, make_compiled
from lorac.session.host_model import HostModel
from lorac.session.request.placement import check_device, parse_device, resolve_placement
from lorac.session.request.precision import check_stored_dtypes
from lorac.session.session import Session
from lorac.session.targets import find_backend
from lorac.storage.artifact import Manifest, open_artifact
from lorac.storage.atomic_folders import MANIFEST, read_consistently
from lorac.storage.paths import suggest_name, translate_os_errors
from lorac.storage.plans import choice_from_json, plan_from_json
from lorac.storage.remote import find_source


def load(
    folder: str | Path,
    target: str | None = None,
    device: str | torch.device | None = None,
    *,
    trust: bool = False,
    **options: object,
) -> Compiled:
    """Load a compiled model from an artifact of ``compiled.save``, without the original model or its weights.

    Every file is opened once, checked against the manifest's hash and kept open, so the folder may be replaced or
    removed afterwards. The result can be called, swapped and given further adapters, but not trained. The class of a
    method of your own is needed only to add further adapters of it. Without ``trust``, no code that the artifact names
    is run. Only output classes of transformers and diffusers are restored: the package's own class if it is imported
    already, else a class with the same names. Other outputs are plain dicts or tuples.

    Args:
        folder: the artifact's path, or a name, as ``lorac.load_adapter`` takes it.
        target: default: the target for which it was saved. An eager artifact can also be compiled for another target.
        device: the device on which it runs; default: the device on which it ran when it was saved.
        trust: whether you made the artifact, or trust its maker. A trusted eager artifact may call ops that were not
            tested with hostile operands, and take any number of operations; without trust, an artifact with such ops is
            refused, and the operations of calls are limited. An artifact for aoti is machine code, and always needs
            trust.
        **options: the target's options about the running of a program, such as ``threads`` and ``spinning`` of
            onnxruntime; default: as saved. For an eager artifact and another target, any option of that target.

    Raises:
        ArtifactError: damaged, unsafe, of another version, or not an artifact.
        OptionError: an option does not exist, or was fixed when the artifact was compiled.
        Unavailable: the artifact cannot be turned into the target.
    """
    parsed_device, path = parse_device(device), find_source(folder, "the folder of lorac.load", ArtifactError)
    real = Path(os.path.realpath(path))

    def read() -> Compiled:
        _refuse_other_contents(real, path)
        try:
            manifest = open_artifact(real)
            compiled = _load_manifest(manifest, target or manifest.fields["target"], parsed_device, options)
            compiled.tokenizer = TokenizerFiles.among(manifest.files)
            return compiled
        except (LoracError, Warning):  # warnings may be errors
            raise
        except Exception as error:  # the hashes agree: the files were written like this, and any content may be wrong
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"the manifest of '{real}' contradicts itself or its files: {type(error).__name__}: {reason}",
                next_step="save the artifact again with this version",
            ) from error

    with translate_os_errors(path, ArtifactError, "read"):
        return read_trusted(trust, lambda: read_consistently(real, read))


def _refuse_other_contents(folder: Path, given: Path) -> None:
    """Raise ``ArtifactError`` for a folder or file that is not a compiled model, and name its kind."""
    if (folder / MANIFEST).is_file():
        return
    nearest = None
    if is_adapter(folder):
        what = f"'{folder}' is an adapter, not a compiled model"
        step = "give its path to lorac.compile(model, adapters), or read it by lorac.load_adapter(path)"
    elif not folder.exists():
        what, known = f"there is no compiled model at '{given}'", folder.parent.glob(f"*/{MANIFEST}")
        nearest = nearest_name(folder.name, [found.parent.name for found in known])
        step = "`lorac compile MODEL -o FOLDER` writes one, and so does compiled.save(folder)"
        step = suggest_name(given) or step
    elif folder.is_file() and (folder.parent / MANIFEST).is_file():
        what = f"'{given}' is one file of a compiled model"
        step = f"give its folder: lorac.load({str(given.parent)!r})"
    elif (folder / "config.json").is_file():
        what = f"'{given}' is a model, not a compiled one"
        step = "compile it: `lorac compile MODEL -o FOLDER`, or in Python lorac.compile(model, adapters)"
    else:
        return
    raise ArtifactError(what, nearest=nearest, next_step=step)


def _load_manifest(
    manifest: Manifest, target: str, device: torch.device | None, options: Mapping[str, object]
) -> Compiled:
    session = _open_stored(manifest)
    if target != manifest.fields["target"]:
        return _compile_stored(manifest, session, target, device, options)
    known = session.backend.options.running
    for option in options:
        if option not in known:
            raise OptionError(
                f"an artifact for {session.backend.dialect.name} takes no option '{option}='",
                nearest=nearest_name(option, known),
                next_step=f"it takes {', '.join(known)}; all else was fixed when it was compiled"
                if known
                else "leave it out: all options were fixed when it was compiled",
            )
    if device is not None and not session.backend.emits:
        check_device(device)
    program = manifest.fields["program"]
    if "options" in program:
        kept = {name: value for name, value in program["options"].items() if name not in session.backend.options.local}
        program = {**program, "options": {**kept, **options}}
    engine = session.backend.restore(program, manifest.files, session.plans, manifest.fields["mode"], device)
    if not session.traits or session.traits.keys() - engine.interfaces.keys():
        raise ArtifactError(
            f"the artifact has the components {sorted(session.traits)}, and its program the graphs "
            f"{sorted(engine.interfaces)}",
            next_step="save the artifact again with this version",
        )
    return make_compiled(session, engine, parse_choice(choice_from_json(manifest.fields["active"]), session.pool))


def _open_stored(manifest: Manifest) -> Session:
    """Open a session for an artifact: its model is a skeleton with the base weights of the touched sites."""
    backend = find_backend(manifest.fields["target"])
    base = backend.read_base_weights(manifest.files)
    host = HostModel.stored(manifest.fields["host"], base or {})
    _module = host.module  # a reference, so that the skeleton is made only once
    session = Session.over(host, backend, backend.parse_options({}), manifest.fields["mode"])
    session.read_base_from(base)
    session.preparer.stored = manifest.fields["reductions"]
    session.traits = traits_from_json(manifest.fields["components"])
    for path, plan in manifest.fields["plans"].items():
        site, own = session.sites.get(path), plan.get("own_size")
        if site is not None and site.is_resizable and isinstance(own, int):
            resized = dataclasses.replace(site, own_size=max(1, min(own, site.size)))
            session.preparer.sites = {**session.sites, path: resized}
    for name, record, forms in manifest.adapters():
        restore_adapter(session, name, record, forms)
    view = session.view
    session.plans = {
        path: plan_from_json(_planned_site(path, manifest, view), plan)
        for path, plan in manifest.fields["plans"].items()
    }
    return session


def _compile_stored(
    manifest: Manifest, session: Session, target: str, device: torch.device | None, given: Mapping[str, object]
) -> Compiled:
    """Build an engine for another target from the artifact's program."""
    from lorac.session.building import build_engine

    backend = find_backend(target)
    options, _ = resolve_placement(backend, backend.parse_options(given), device)
    dtypes = (plan.site.dtype for plan in session.plans.values())
    check_stored_dtypes(backend.dialect_for(options), dtypes, str(manifest.folder))
    program = session.backend.restore_program(manifest.fields["program"], manifest.files, session.sites, session.plans)
    session = dataclasses.replace(session, backend=backend, options=options)
    choice = parse_choice(choice_from_json(manifest.fields["active"]), session.pool)
    return make_compiled(session, build_engine(session, choice, program), choice)


def _planned_site(path: str, manifest: Manifest, view: ModelView) -> Site:
    """Return the site of a stored plan, even if no adapter of the artifact names it any more."""
    if path in view.sites:
        return view.sites[path]
    if path in view.callable_paths:
        return make_module_site(path, view)
    for reader, plan in manifest.fields["plans"].items():
        if any(branch["once"] == path for branch in plan["branches"]):
            return make_once_site(path, _planned_site(reader, manifest, view).dtype)
    return view.make_parameter_site(path)
