"""Compares ``lorac check`` with ``lorac.compile``, over random files of all formats and over the cases of PEFT's tests.

    python -m campaigns.fit --files 200 --seed 0
    python -m campaigns.fit --peft CHECKOUT --journal FILE
    python -m campaigns.fit --peft CHECKOUT --answers [--types GLORA FROD] --journal FILE

A file is a sound one, or a damaged one, for its own model or another. The command has to exit with 0 exactly where
compile accepts the adapter, and otherwise to name a fault and a next step. Of PEFT's cases each is saved by PEFT, then
checked, and merged by ``merge_into`` and ``merge``: no raw error, and a next step with every refusal; with
``--answers`` lorac's outputs are compared with PEFT's in eager PyTorch and in ONNX Runtime, and PEFT's own of the file
that lorac writes. A case that the journal has is not run again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import io
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import lorac
from campaigns import mutations, sound
from lorac.cli import app
from lorac.cli._inspection import format_check

_CHOSEN: list[Any] = []
"""The model of the case that runs, which the command line names by ``chosen``."""
_PACKAGE = "tests_of_peft"
SKIPPED = ("training", "recipe", "merge_recipe", "model", "artifact")
"""Kinds of sound files that are no adapters."""
ANSWERS = 1e-3
"""The largest difference from PEFT's output that is right, of what the adapter adds: these are of float32."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Four roundings of float32, of PEFT's whole output: where an adapter adds so little, float32 cannot judge."""
DAMAGED, ELSEWHERE = 0.5, 0.25
"""Shares of the files that are damaged, and that are compared with another model."""


def chosen() -> Any:
    """Return the model of the case that runs."""
    return _CHOSEN[-1]


def run_check(place: Path, model: Any) -> tuple[int, str]:
    """Return the exit code of ``lorac check`` and its page; a raw error is raised.

    The command line names one model; of several, ``lorac.check`` is asked itself.
    """
    if isinstance(model, dict):
        found = lorac.check(place, model)
        return int(not found.fits), "\n".join(format_check(found))
    _CHOSEN.append(model)
    try:
        result = CliRunner().invoke(app, ["check", str(place), "--model", f"{__name__}:chosen"])
    finally:
        _CHOSEN.pop()
    if result.exception is not None and not isinstance(result.exception, SystemExit | lorac.LoracError):
        raise result.exception
    return result.exit_code, result.output


def is_taken(place: Path, model: Any) -> bool:
    """Return whether ``lorac.compile`` takes an adapter."""
    try:
        lorac.compile(model, {"a": place})
    except lorac.LoracError:
        return False
    return True


def iter_files(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Path, Any]]:
    """Yield the kind, the place and the model of random files, below a folder that ``sound.write`` filled."""
    files = [one for one in sound.read(folder) if one.kind not in SKIPPED]
    kinds, hosts = sorted({one.kind for one in files}), sorted({one.host for one in files})
    for index in range(count):
        chance = random.Random(f"{seed}/{index}")
        kind = kinds[index % len(kinds)]
        one = chance.choice([one for one in files if one.kind == kind])
        source, place = folder / one.place, folder / f"case{index}{Path(one.place).suffix}"
        shutil.copytree(source, place) if source.is_dir() else shutil.copyfile(source, place)
        if chance.random() < DAMAGED:
            mutations.damage(kind, place, chance)
        host = chance.choice(hosts) if chance.random() < ELSEWHERE else one.host
        yield f"{kind} {one.what} #{index}", place, sound.model(host)


def compare_files(folder: Path, count: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Return how many files were taken and refused, and where command and compile differ."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong = []
    for name, place, model in iter_files(folder, count, seed):
        code, page = run_check(place, model)
        taken = is_taken(place, model)
        outcomes["taken" if taken else "refused"] += 1
        if (code == 0) != taken or (not taken and "does not fit\n  " not in page):
            wrong.append(f"{name}: exit {code}, compile {'takes' if taken else 'refuses'} it\n{page}")
    return outcomes, wrong


# ── PEFT's own cases ─────────────────────────────────────────────────────────────────────────────────────────────────
def iter_peft_cases(checkout: Path) -> Iterator[tuple[str, Callable[[], Any], tuple[Any, dict[str, Any]]]]:
    """Yield the name, the maker of the model, and the class and fields of the configuration of PEFT's TEST_CASES."""
    place = checkout / "tests"
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[_PACKAGE])
    cases = importlib.import_module(f"{_PACKAGE}.test_custom_models")
    for number, (name, model_id, kind, fields) in enumerate(cases.TEST_CASES):

        def make(model_id: str = model_id) -> Any:
            torch.manual_seed(0)
            return cases.MockTransformerWrapper.from_pretrained(model_id).eval()

        yield f"{number} {name}", make, (kind, dict(fields))


def write_peft_case(make: Callable[[], Any], kind: Any, fields: dict[str, Any], folder: Path) -> Any:
    """Have PEFT save a changed adapter; return PEFT's model, or the name of the error that PEFT raises."""
    import peft

    if "r" in fields and issubclass(kind, peft.AdaLoraConfig):
        fields |= {"total_step": 1}
    try:
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(make(), kind(**fields))
        with torch.no_grad():
            for tensor in wrapped.parameters():
                if tensor.requires_grad and tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor))
        wrapped.save_pretrained(folder)
    except Exception as error:  # PEFT's own refusals
        return f"PEFT: {type(error).__name__}"
    return wrapped.eval()


@torch.no_grad()
def compare_answers(make: Callable[[], Any], kind: Any, fields: dict[str, Any], folder: Path) -> str:
    """Return "right: …" with the ways that were compared, "refused: …", or "wrong: …" with the largest differences."""
    import peft

    wrapped, model = write_peft_case(make, kind, fields, folder / "a"), make()
    if isinstance(wrapped, str):
        return wrapped
    inputs = {"X": torch.arange(90).view(9, 10)}  # as in PEFT's tests
    base, theirs = model(**inputs), wrapped(**inputs)
    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: lorac.compile(model, {"a": folder / "a"})(**inputs),
        "onnxruntime": lambda: lorac.compile(
            model, {"a": folder / "a"}, target="onnxruntime", example_inputs=inputs, self_test=False
        )(**inputs),
        "back": lambda: peft.PeftModel.from_pretrained(make(), str(_write_back(model, folder))).eval()(**inputs),
    }
    added, found = (theirs - base).norm().clamp_min(1e-9), dict[str, float | str]()
    for way, answer in ways.items():
        try:
            found[way] = float((torch.as_tensor(answer()) - theirs).norm() / added)
        except lorac.LoracError as error:
            if way == "eager":
                return f"refused: {error.what[:150]}"
            found[way] = f"refused: {error.what[:150]}"
    differences = [value for value in found.values() if isinstance(value, float)]
    limits = {"right": ANSWERS, "rounding": float(ROUNDING * theirs.norm() / added)}
    within = (word for word, limit in limits.items() if all(value <= limit for value in differences))
    return f"{next(within, 'wrong')}: {found}"


def _write_back(model: Any, folder: Path) -> Path:
    lorac.save_adapter(lorac.load_adapter(folder / "a", model), folder / "back", model=model)
    return folder / "back"


def run_peft_case(make: Callable[[], Any], kind: Any, fields: dict[str, Any], folder: Path) -> str:
    """Return what came of one case: "merged", "refused: …", or "wrong: …"."""
    wrapped, model = write_peft_case(make, kind, fields, folder / "a"), make()
    if isinstance(wrapped, str):
        return wrapped
    code, page = run_check(folder / "a", model)
    taken = is_taken(folder / "a", model)
    if (code == 0) != taken:
        return f"wrong: exit {code}, compile {'takes' if taken else 'refuses'} it"
    if not taken:
        return f"refused: {page.splitlines()[1].strip()[:150]}" if "  mend: " in page else f"wrong: no step: {page}"
    try:
        lorac.merge_into(model, [folder / "a"])
        lorac.merge([folder / "a"], "cat", model=model)
    except lorac.LoracError as error:
        return f"refused by merge: {error.what[:150]}" if error.next_step else f"wrong: no step: {error}"
    return "merged"


def run_peft_cases(
    checkout: Path, journal: Path | None, run: Callable[..., str] = run_peft_case, types: Sequence[str] = ()
) -> dict[str, str]:
    """Return the outcome of every case by name; those in the journal are not run again.

    Args:
        run: gives the outcome of one.
        types: of PEFT's, all where there is none.
    """
    import peft

    chosen = [config for name, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if not types or name.value in types]
    known = json.loads(journal.read_text()) if journal and journal.exists() else {}
    for name, make, (kind, fields) in iter_peft_cases(checkout):
        if name in known or kind not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                known[name] = run(make, kind, fields, Path(folder))
            except Exception as error:  # what must not be
                known[name] = f"wrong: {type(error).__name__}: {error}"
        if journal:
            journal.write_text(json.dumps(known, indent=1))
    return known


def main(words: Sequence[str] | None = None) -> int:
    """Run, print a summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peft", type=Path, help="a checkout of PEFT, whose tests' cases run instead")
    parser.add_argument("--answers", action="store_true", help="compare outputs with PEFT's, of --peft")
    parser.add_argument("--types", nargs="*", default=[], help="only cases of these types of PEFT")
    parser.add_argument("--journal", type=Path)
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    if given.peft:
        known = run_peft_cases(
            given.peft, given.journal, compare_answers if given.answers else run_peft_case, given.types
        )
        wrong = [f"{name}: {outcome}" for name, outcome in known.items() if outcome.startswith("wrong")]
        outcomes = collections.Counter(outcome.partition(":")[0] for outcome in known.values())
    else:
        with tempfile.TemporaryDirectory() as folder:
            sound.write(Path(folder), artifacts=False)
            outcomes, wrong = compare_files(Path(folder), given.files, given.seed)
    print(dict(outcomes), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
