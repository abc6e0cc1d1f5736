"""Save a compiled model as an artifact."""

import contextlib
from importlib import metadata
from pathlib import Path

from lorac.errors import ArtifactError, Unavailable, warn
from lorac.formats import save_adapter
from lorac.formats.native import variant_config
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import AS_TRAINED
from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.runtime.generation.tokenizers import TOKENIZER_FOLDER, tokenizer_writer
from lorac.session.session import Session
from lorac.storage.artifact import ADAPTERS, FORMS, RECORD, write_artifact
from lorac.storage.normal_forms import write_normal_forms
from lorac.storage.paths import file_stems, parse_path, translate_os_errors
from lorac.storage.plans import choice_to_json, plan_to_json
from lorac.variants._missing_method import class_modules
from lorac.version import VERSION


def save(
    session: Session, switch: ChoiceSwitch, folder: str | Path, tokenizer: object, *, onnx_adapters: bool = True
) -> None:
    """Write a compiled model into a folder.

    Args:
        switch: the compiled model's switch.
        folder: a new or empty folder, or an older artifact, which is replaced.
        tokenizer: has ``save_pretrained(folder)``; None: no tokenizer is saved.
        onnx_adapters: whether adapters are also written for programs that run without lorac.

    Raises:
        ArtifactError: the folder contains something else, or cannot be written.
        Unavailable: an active adapter is only registered.
    """
    registered = switch.pool.registered
    active = next((name for name, _ in switch.choice if name in registered), None)
    if active is not None:
        raise Unavailable(
            f"the active adapter '{active}' is registered, and a saved model holds no registered adapters",
            next_step="call compiled.swap(None) first, or remove the adapter and add its file by add_adapter",
        )
    if registered:
        count = "1 registered adapter is" if len(registered) == 1 else f"{len(registered)} registered adapters are"
        warn(f"{count} not saved", next_step="after lorac.load(folder), register their folder again")
    folder = parse_path(folder, "the folder of compiled.save", ArtifactError)
    write_tokenizer, versions = tokenizer_writer(tokenizer), {"lorac": VERSION}
    for library in ("torch", switch.engine.target):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)

    def fill(staged: Path) -> dict[str, object]:
        if write_tokenizer is not None:
            (staged / TOKENIZER_FOLDER).mkdir()
            write_tokenizer(staged / TOKENIZER_FOLDER)
        request = None
        if switch.engine.files is None:  # an engine that runs the model itself: capture the model first
            from lorac.session.building import make_build_request
            from lorac.session.lowering.lower import lower_model

            request = make_build_request(session, switch.choice, lower_model(session, session.options.aux))
        return {
            "versions": versions,
            "target": switch.engine.target,
            "mode": switch.mode,
            "active": choice_to_json(switch.choice),
            "adapters": _save_adapters(switch, staged / ADAPTERS, onnx_adapters=onnx_adapters),
            "plans": {path: plan_to_json(plan) for path, plan in session.plans.items()},
            "reductions": session.preparer.stored_reductions(switch.pool.adapters.values()),
            "program": session.backend.store(switch.engine, staged, request),
            "components": {name: traits.to_json() for name, traits in session.traits.items()},
            "host": session.host.skeleton,
        }

    with translate_os_errors(folder, ArtifactError, "written"):
        write_artifact(folder, fill)


def _save_adapters(switch: ChoiceSwitch, folder: Path, *, onnx_adapters: bool) -> dict[str, dict[str, object]]:
    """Write every adapter in memory, and return the manifest's entries."""
    entries = {}
    for name, stem in file_stems(sorted(switch.pool.adapters)).items():
        adapter = switch.pool.adapters[name]
        record = folder / f"{stem}.safetensors"
        save_adapter(adapter, record, format="native")
        method, modules = adapter.variant, class_modules(adapter.variant)
        entry: dict[str, object] = {
            RECORD: f"{folder.name}/{record.name}",
            "variant": method.name,
            "hyperparameters": variant_config(method)[0],
        }
        if modules:  # the method is not lorac's own, so its class may be missing where the artifact is loaded
            forms = folder / f"{stem}.forms.safetensors"
            write_normal_forms(forms, switch.pool[name])
            entry |= {FORMS: f"{folder.name}/{forms.name}", "modules": modules}
        # For programs that run without lorac: graph -> file, where the engine has such files.
        suffix = switch.engine.choice_suffix
        graphs = switch.engine.interfaces if onnx_adapters and suffix is not None else ()
        files = {graph: f"{stem}{'' if graph == MAIN_GRAPH else f'.{graph}'}{suffix}" for graph in graphs}
        try:
            for graph, file in files.items():
                switch.states.save(((name, AS_TRAINED),), graph, folder / file)
        except Unavailable as error:
            warn(f"adapter '{name}' is saved for lorac alone: {error.what}")
            files = {}
        portable = {graph: f"{folder.name}/{file}" for graph, file in files.items()}
        entries[name] = {**entry, "portable": portable}
    return entries
