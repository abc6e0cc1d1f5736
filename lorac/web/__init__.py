"""Pages that run a compiled language model in browsers: a folder that any web server serves as static files."""

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from lorac.argument_types import JsonMapping
from lorac.errors import ArtifactError, OptionError, Unavailable, list_some, warn
from lorac.frontend.components import MAIN_GRAPH
from lorac.storage.artifact import open_artifact, open_checked
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.version import VERSION
from lorac.web.node_packages import open_packages
from lorac.web.texts import describe_tokenizer

__all__ = ["export_web"]

CONTENTS = "web.json"
_PAGE = Path(__file__).parent / "page"
_FOLLOWED = ("do_sample", "eos_token_id", "repetition_penalty", "temperature", "top_k", "top_p")
_WITHOUT_EFFECT = {  # on a page's tokens: each call sets the length
    *("bos_token_id", "cache_implementation", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id"),
    *("return_dict_in_generate", "use_cache"),
}
_CHECKED_IDS, _CHECKED_LOGITS = 8, 512


def write_parts(folder: Path, size: int, *contents: bytes | memoryview) -> list[JsonMapping]:
    """Concatenate contents, and write them to files of at most ``size`` bytes; return each file's hash and size."""
    whole, entries = b"".join(contents), list[JsonMapping]()
    for begin in range(0, len(whole), size):
        part = whole[begin : begin + size]
        entries.append({"sha256": hashlib.sha256(part).hexdigest(), "bytes": len(part)})
        (folder / str(entries[-1]["sha256"])).write_bytes(part)
    return entries


def export_web(
    artifact: str | Path, out: str | Path, *, modules: str | Path | None = None, part_mib: int = 64
) -> JsonMapping:
    """Write a folder that a web server can serve as static files; return its adapters, model bytes and file count.

    Args:
        artifact: a saved language model, compiled for onnxruntime with ``cache=True``; int4 or int8 makes the download
            much smaller.
        out: a new or empty folder, or an older page, which is replaced.
        modules: a ``node_modules`` folder with lorac-web's dependencies; None: npm downloads them.
        part_mib: the maximum size of a file in MiB, which some servers limit.

    Raises:
        ArtifactError: the artifact is damaged, or the output folder has other content or cannot be written.
        OptionError: ``part_mib`` is less than 1.
        Unavailable: a page cannot run the program, its tokenizer or the packages.
    """
    if part_mib < 1:
        raise OptionError(f"part_mib cannot be {part_mib}", next_step="give 1 or more; 64 is the default")
    target = parse_path(out, "the folder of export_web", ArtifactError)
    manifest = open_artifact(artifact)
    fields = manifest.fields
    _check_kind(fields)
    from lorac.web.program import read_program

    program = read_program(manifest.files, fields["program"]["graphs"][MAIN_GRAPH]["slots"])
    tokenizer = describe_tokenizer(manifest.files)
    generation = _describe_generation(fields["components"][MAIN_GRAPH]["generation"])
    adapters = {
        name: {"method": entry["variant"], "content": open_checked(manifest.folder, file, fields["files"][file]).read()}
        for name, entry in fields["adapters"].items()
        if (file := entry["portable"].get(MAIN_GRAPH)) is not None
    }
    missing = sorted(fields["adapters"].keys() - adapters.keys()) if program["slots"] else []
    if missing:
        warn(
            f"the page lacks {list_some(missing)}: the artifact has no file of them that runs without lorac",
            next_step="write them by compiled.save(folder); prompts and activated LoRAs run in Python alone",
        )
    check = _compute_check(artifact, tokenizer["samples"][0]["ids"])
    with open_packages(None if modules is None else Path(modules)) as copied:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())) and not _own_files(target):
            raise ArtifactError(
                f"'{target}' exists and is not a page of export-web",
                next_step="give a new folder, an empty one, or an older page",
            )
        with translate_os_errors(target, ArtifactError, "written"), replace_atomically(target, _own_files) as staged:
            (staged / "files").mkdir(parents=True)
            write = functools.partial(write_parts, staged / "files", part_mib << 20)
            contents: dict[str, Any] = {
                **program,
                "lorac_web": 1,  # the form of this file
                "lorac": VERSION,
                "graphs": {name: write(graph) for name, graph in program["graphs"].items()},
                "weights": {name: write(*pieces) for name, pieces in program["weights"].items()},
                "neutral": write(program["neutral"]),
                "adapters": {name: {**entry, "content": write(entry["content"])} for name, entry in adapters.items()},
                "active": {name: how["strength"] for name, how in fields["active"].items() if name in adapters},
                "check": check,
                "generation": generation,
                "tokenizer": {**tokenizer, "json": write(manifest.files[tokenizer["json"]].read())},
            }
            size = sum(path.stat().st_size for path in (staged / "files").iterdir())
            for name, source in {**{path.name: path for path in _PAGE.iterdir()}, **copied}.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, staged / name)
            written = [path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()]
            contents["written"] = sorted([*written, CONTENTS])
            (staged / CONTENTS).write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    return {"adapters": sorted(adapters), "model_bytes": size, "files": len(contents["written"])}


def _check_kind(fields: JsonMapping) -> None:
    """Refuse an artifact unless it is one graph of a causal language model for ONNX Runtime."""
    graphs, traits = fields["program"].get("graphs", {}), fields["components"].get(MAIN_GRAPH, {})
    step = "compile a causal language model with target='onnxruntime' and cache=True"
    if fields["target"] != "onnxruntime":
        raise Unavailable(f"the program was compiled for {fields['target']}", next_step=step)
    if graphs.keys() != {MAIN_GRAPH}:
        raise Unavailable(f"the program has the graphs {list_some(sorted(graphs))}; a page runs one", next_step=step)
    if traits.get("generation") is None or traits.get("rules") is not None:
        raise Unavailable("the program does not write text as transformers' causal language models do", next_step=step)


def _describe_generation(settings: JsonMapping) -> dict[str, object]:
    """Return the generation settings of a model that a page supports; warn of the others."""
    ignored = [name for name in settings if name[0] != "_" and name not in {*_FOLLOWED, *_WITHOUT_EFFECT}]
    if ignored:
        named = list_some([f"{name}={settings[name]!r}" for name in ignored], quote="")
        warn(
            f"a page does not follow the model's generation settings {named}",
            next_step="leave them out, and compiled.generate writes as the page does",
        )
    return {name: settings[name] for name in _FOLLOWED if name in settings}


def _compute_check(artifact: str | Path, ids: list[int]) -> dict[str, object]:
    """Return some logits of the base after some ids, which a page compares with its own when it loads."""
    import torch

    import lorac

    compiled = lorac.load(artifact)
    if compiled.mode != "baked":
        compiled.swap(None)
    given = torch.tensor([ids[:_CHECKED_IDS] or [0]])
    logits = compiled(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].float()
    stride = -(-len(logits) // _CHECKED_LOGITS)
    return {"ids": given[0].tolist(), "stride": stride, "logits": [round(x, 4) for x in logits[::stride].tolist()]}


def _own_files(folder: Path) -> frozenset[str]:
    """Return the files that an older page lists as its own; an empty set if the folder has no page."""
    try:
        contents = json.loads((folder / CONTENTS).read_text("utf-8"))
        return frozenset(contents["written"]) if "lorac_web" in contents else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
