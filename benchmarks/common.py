"""Parts that all benchmarks share: command line, fresh processes, alternating sides, medians, tables, and their JSON.

Every figure is the median over processes of the median over rounds; within a round all sides run in shuffled order
through the same kind of call. A/A is the base against a second one of the same base: its distance from 1 is what the
machine's noise is worth.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.native_library import find_native_library
from lorac.progress import progress
from lorac.third_party_output import hide_progress_bars, suppress_third_party_output

Side = Callable[[], Any]
Job = tuple[str, ...]
Found = Mapping[Job, Mapping[str, Any]]
WARM_UP = 2
"""Calls of each side before it is timed."""
# Sessions of one model in one process differ by the pages they land on; huge pages make them alike.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
PROGRAM = ("lorac/backends", "lorac/passes", "lorac/runtime", "native")
"""Rooms of a program and of what calls it."""
TRAINING = ("lorac/backends/eager", "lorac/trainer", "lorac/training", "lorac/variants")
LIBRARIES = ("torch", "onnxruntime", "transformers", "peft", "lorac")


# ── A benchmark and its command line ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Option:
    """``--name``: a number, a word, a switch, or (where the default is a tuple) any of the words in it."""

    name: str
    default: Any
    smoke: Any
    """Its value in the smoke run, where everything is tiny."""
    help: str
    choices: Sequence[str] | None = None


@dataclass(frozen=True)
class Table:
    """One table; it fits a terminal, a log and a closing note alike."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    promised: Sequence[tuple[str, ...]]
    """The first cells of each of its rows: a table with other rows is refused."""
    a_a: Mapping[str, float]
    """The base over a second one of the same base, by what was compared."""
    notes: Sequence[str] = ()
    """Notes below it: how something was found, or why it is missing."""


@dataclass(frozen=True)
class Benchmark:
    """The measurement of one file.

    Attributes:
        name: of its module below ``benchmarks``.
        text: the module's docstring.
        options: its own options; ``--smoke``, ``--json`` and ``--processes`` have all.
        jobs: what is measured, each in a process of its own.
        measure: one job's figures (numbers in mappings; words where all processes agree).
        tables: the tables, from the medians of every job.
        rooms: folders of the repository whose commits may change the figures.
        prepare: writes what the jobs share into the folder that ``--folder`` names, else one for this run.
        find_faults: figures that make the command fail, as sentences.
    """

    name: str
    text: str
    options: Sequence[Option]
    jobs: Callable[[argparse.Namespace], Sequence[Job]]
    measure: Callable[[Job, argparse.Namespace], Mapping[str, Any]]
    tables: Callable[[Found, argparse.Namespace], Sequence[Table]]
    rooms: Sequence[str] = ("lorac",)
    prepare: Callable[[argparse.Namespace], None] | None = None
    find_faults: Callable[[Found, argparse.Namespace], Sequence[str]] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Measure as the command line says, print the tables, and write them as JSON where that is asked for."""
        given = self._given(arguments)
        if given.worker:
            settings = json.loads(given.worker)
            with suppress_third_party_output():
                print(json.dumps(self.measure(tuple(settings.pop("job")), argparse.Namespace(**settings))))
            return
        begun = time.perf_counter()
        with suppress_third_party_output(), tempfile.TemporaryDirectory() as folder:
            if self.prepare is not None:
                given.folder = given.folder or folder
                self.prepare(given)
            found = self._measured(given)
        tables = self.tables(found, given)
        for table in tables:
            print_table(table)
        if given.json:
            write_json(given.json, self, given, tables, time.perf_counter() - begun)
        if self.find_faults is not None and (faults := self.find_faults(found, given)):
            raise SystemExit("\n".join(faults))

    def _given(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            f"python -m benchmarks.{self.name}",
            description=self.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--smoke", action="store_true", help="seconds instead of minutes: everything tiny, no figures"
        )
        parser.add_argument(
            "--json", type=Path, help="also write the tables, the machine and the versions to this file"
        )
        parser.add_argument("--processes", type=int, default=3, help="per figure; 0 measures in this one (default: 3)")
        parser.add_argument("--worker", help=argparse.SUPPRESS)
        if self.prepare is not None:
            parser.add_argument("--folder", help="where what is prepared is kept, and found by the next run")
        for option in self.options:
            _add(parser, option)
        if parser.parse_args(arguments).smoke:
            parser.set_defaults(processes=0, **{option.name: option.smoke for option in self.options})
        return parser.parse_args(arguments)

    def _measured(self, given: argparse.Namespace) -> Found:
        jobs = list(self.jobs(given))
        runs: dict[Job, list[Mapping[str, Any]]] = {job: [] for job in jobs}
        turns = [job for _ in range(max(given.processes, 1)) for job in random.sample(jobs, len(jobs))]
        measure = self._in_fresh_process if given.processes else self.measure
        with progress(f"benchmarks.{self.name}", total=len(turns)) as report:
            for job in turns:
                report.step(" ".join(job))
                runs[job].append(measure(job, given))
        return {job: medians(found) for job, found in runs.items()}

    def _in_fresh_process(self, job: Job, given: argparse.Namespace) -> Mapping[str, Any]:
        """One job's figures: the JSON on the last line of ``python -m benchmarks.<name> --worker``."""
        settings = {name: value for name, value in vars(given).items() if name not in {"json", "worker"}}
        command = [sys.executable, "-m", f"benchmarks.{self.name}", "--worker", json.dumps({"job": job, **settings})]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    """Return the option as argparse takes it; its kind follows from its default."""
    flag, default = f"--{option.name}", option.default
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=option.help)
    elif isinstance(default, tuple):
        choices = option.choices or default
        parser.add_argument(flag, nargs="+", choices=choices, metavar="NAME", default=default, help=option.help)
    else:
        text = f"{option.help} (default: {default})"
        parser.add_argument(flag, type=type(default), choices=option.choices, default=default, help=text)


# ── Hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
LLAMAS = {
    "llama": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 32000},
    "narrow": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128},
}
"""Randomly initialised Llamas; at 20 layers the first has 166 M parameters."""
SMOLLM2 = "smollm2"
MODEL = Option("model", "llama", smoke="tiny", help="the host", choices=tuple(LLAMAS))
TEXT_MODEL = Option("model", SMOLLM2, smoke="tiny", help="the host", choices=(SMOLLM2, *LLAMAS))


def layers(full: int) -> Option:
    """``--layers``."""
    return Option("layers", full, smoke=1, help="of the host")


def rounds(full: int) -> Option:
    """Make the option ``--rounds``."""
    return Option("rounds", full, smoke=1, help="timed in each process, all sides in each")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = Option(
    "clock", "wall", smoke="wall", help="what seconds are of: cpu where others use the machine", choices=tuple(CLOCKS)
)
"""CPU seconds are those of all threads together."""
RANK = Option("rank", 16, smoke=2, help="of the adapters")


def llama(given: argparse.Namespace) -> Any:
    """Return the randomly initialised Llama that the options name, with tied embeddings."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {**LLAMAS[given.model], "num_hidden_layers": given.layers}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def host(given: argparse.Namespace) -> Any:
    """SmolLM2, cut to its first layers; or one of the Llamas."""
    if given.model != SMOLLM2:
        return llama(given)
    from examples.models import smollm2

    with hide_progress_bars():
        model, _ = smollm2()
    model.model.layers = model.model.layers[: given.layers]
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def save_host(model: Any, folder: Path, given: argparse.Namespace) -> None:
    """Return the host as a folder of transformers', with its tokenizer, where it has one."""
    with hide_progress_bars():
        model.save_pretrained(folder)
        if given.model == SMOLLM2:
            from examples.models import smollm2

            smollm2()[1].save_pretrained(folder)


def saved_host(folder: Path) -> Any:
    """Load what ``save_host`` wrote."""
    import transformers

    with hide_progress_bars():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def save_peft(folder: Path, given: argparse.Namespace) -> None:
    """PEFT's own file of a LoRA on all linear layers, its values as small as training leaves them."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(host(given), LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (one for one in wrapped.parameters() if one.requires_grad):
            parameter.normal_(0, 0.02, generator=generator)
    wrapped.save_pretrained(str(folder))


VOCABULARIES = {SMOLLM2: 49152, **{name: sizes["vocab_size"] for name, sizes in LLAMAS.items()}}


def tokens(given: argparse.Namespace, shape: tuple[int, int]) -> dict[str, Any]:
    """Return the inputs of a call, as NumPy arrays, the same in every process."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, VOCABULARIES[given.model], shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def label(shape: tuple[int, int]) -> str:
    """Format a shape for a table: rows x length."""
    return "x".join(map(str, shape))


def call(model: Any, inputs: Mapping[str, Any]) -> Side:
    """Return a side that calls a compiled model."""
    return lambda: model(**inputs)


def torch_call(model: Any, inputs: Mapping[str, Any]) -> Side:
    """Return a side that calls a module, which takes tensors, without gradients."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def called() -> Any:
        with torch.no_grad():
            return model(**tensors)

    return called


def away_from_init(adapter: Any, seed: int) -> None:
    """Give an adapter's tensors small random values, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensors in adapter.tensors.values():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and name != "magnitude":
                    tensor.normal_(0, 0.02, generator=generator)


def plain_export(model: Any, path: Path, inputs: Mapping[str, Any] | None = None) -> None:
    """Export a model by transformers' own ONNX exporter.

    Args:
        inputs: of a call, whose sizes the program has alone; None: tokens of any number of rows and any length.
    """
    import functools
    from unittest import mock

    import onnx_ir
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    tokens = {"input_ids": torch.ones(2, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    # Told the shapes: left to find them it takes longer.
    config = OnnxConfig(dynamic_shapes=dict.fromkeys(tokens, free)) if inputs is None else OnnxConfig()
    # torch prints its steps unless it is told not to, and transformers has no way to tell it.
    silent = functools.partial(torch.onnx.export, verbose=False)
    with mock.patch.object(torch.onnx, "export", silent):
        program = OnnxExporter().export(model, inputs or tokens, config).program
    onnx_ir.save(program, path, external_data=f"{path.name}.data")


# ── Figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def alternate(
    sides: Mapping[str, Side], rounds: int, warm_up: int = WARM_UP, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds per call of each side by a clock: the median over rounds, order shuffled in each."""
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(seconds(sides[name], clock))
    return {name: statistics.median(times[name]) for name in sides}


def seconds(side: Side, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes, by a clock."""
    begun = clock()
    side()
    return clock() - begun


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median over processes, key by key; words must be the same in all."""
    return {key: _median([run[key] for run in runs]) for key in runs[0]}


def _median(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return medians(values)
    if isinstance(values[0], str):
        assert len(set(values)) == 1, f"processes disagree: {values}"
        return values[0]
    return statistics.median(values)


def forget_peak() -> None:
    """Have the kernel's high-water mark of this process's memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Return the peak memory in MiB, pages of mapped files included; getrusage's is never below the parent's."""
    return _memory("VmHWM")


def anonymous() -> float:
    """Return the memory in MiB without pages of mapped files, which the kernel takes back when it needs them."""
    return _memory("RssAnon")


def _memory(field: str) -> float:
    """Return a field of this process's status in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) / 1024


def measure_call(call: Callable[[], object], *, above_start: bool = False) -> dict[str, float]:
    """Return the seconds and CPU seconds of a call, and its memory in MiB, or how far that is above the start.

    The memory is the peak, pages of mapped files included, and what is anonymous while the result is kept.
    """
    forget_peak()
    before, unmapped, begun, spent = peak(), anonymous(), time.perf_counter(), time.process_time()
    kept = call()
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent}
    held = {"peak": peak(), "anonymous": anonymous()}
    del kept
    start = {"peak": before, "anonymous": unmapped} if above_start else dict.fromkeys(held, 0.0)
    return {**took, **{what: value - start[what] for what, value in held.items()}}


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def compare_sides(title: str, found: Found, sides: Sequence[str]) -> Table:
    """Return a table of what ``measure_call`` found of each side, beside the first; the second is another run of it."""
    first, again, *_ = sides
    compared = ("peak", "cpu", "seconds")
    ratios = {side: {what: found[(side,)][what] / found[(first,)][what] for what in compared} for side in sides}
    rows = []
    for side in sides:
        one, ratio = found[(side,)], ratios[side]
        figures = (f"{one['seconds']:.3f}", f"{one['cpu']:.3f}", f"{one['peak']:.0f}", f"{one['anonymous']:.0f}")
        rows.append((side, *figures, *(f"{ratio[what]:.2f}" for what in compared)))
    columns = ("side", "s", "CPU s", "peak MiB", "anonymous MiB", "memory ratio", "CPU ratio", "time ratio")
    return Table(title, columns, rows, [(side,) for side in sides], ratios[again])


def native_note() -> str:
    """Return a table's note on lorac-native."""
    library = find_native_library()
    return f"lorac-native: {library.kernels}" if library else "lorac-native is not installed: make wheel-native"


def print_table(table: Table) -> None:
    """Print it, having seen that it is whole."""
    begun = [tuple(row[: len(cells)]) for row, cells in zip(table.rows, table.promised, strict=True)]
    assert begun == list(table.promised), f"{table.title}: not the rows it promises"
    assert all(len(row) == len(table.columns) for row in table.rows), f"{table.title}: a row of another length"
    lines = (table.columns, *table.rows)
    widths = [max(len(row[i]) for row in lines) for i in range(len(table.columns))]
    print(f"\n{table.title}")
    for row in (table.columns, ["-" * width for width in widths], *table.rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in table.notes:
        print(note)


def write_json(
    path: Path, benchmark: Benchmark, given: argparse.Namespace, tables: Sequence[Table], took: float
) -> None:
    """Return the tables for the pages that cite them, with what they were measured on and with."""
    options = ("smoke", "processes", *(option.name for option in benchmark.options))
    result = {
        "benchmark": benchmark.name,
        "revision": _revision(),
        "rooms": [f"benchmarks/{benchmark.name}.py", *benchmark.rooms],
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "options": {name: getattr(given, name) for name in options},
        "seconds": round(took, 1),
        "tables": [
            {"title": t.title, "columns": t.columns, "rows": t.rows, "A/A": t.a_a, "notes": t.notes} for t in tables
        ],
    }
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _revision() -> str | None:
    """Return the commit that is measured, or None outside a checkout. Changes that no commit has end it with a plus."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _cpu() -> str:
    """Return the processor's model as Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
