"""Every benchmark runs, tiny, on the path of the full run: tables whole, JSON filled, nothing else on the terminal."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
from pathlib import Path

import pytest

from benchmarks import __main__ as everything

ROOT = Path(__file__).parents[2]
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
ROWS = {
    "aoti": [["live / plain", "live, none / plain", "plain, A/A / plain", "swap"]],
    "bank": [
        [
            "copy of its bytes",
            "copy of its bytes, A/A",
            "a prepared adapter into its place",
            "a swap to a prepared adapter",
            "reading its file",
            "reading its file, A/A",
            "an adapter from disk, of a new layout",
            "an adapter from disk, the first time",
            "an adapter from disk, again",
        ],
        ["registered, each", "beyond the budget"],
    ],
    "compile": [
        ["plain export", "plain export, A/A", "lorac live", "lorac live, no self-test", "lorac fused"],
        ["genai builder, adapter", "genai builder, no adapter", "lorac live, cache"],
        ["1", "2"],
    ],
    "diffusion": [["plain export", "base", "live"], ["base, A/A", "live", "plain export", "eager"]],
    "generate": [
        [
            "genai base",
            "PEFT",
            "base",
            "base, A/A",
            "live",
            "live, capacity 2048",
            "live, generate",
            "int4 live",
            "openvino live, bf16",
        ],
        [
            "base, A/A / base",
            "base / genai base",
            "live / base",
            "live / PEFT",
            "live, capacity 2048 / live",
            "live, generate / live",
            "int4 live / live",
            "openvino live, bf16 / live",
        ],
        ["base, A/A", "live"],
    ],
    "invocation": [
        [
            "aLoRA, the base's prompt reused",
            "A/A: aLoRA, the base's prompt reused",
            "aLoRA, the whole prompt read",
            "LoRA beside the base's prompt",
        ]
    ],
    "forms": [
        [
            *["sum and RMS norm"] * 2,
            *["sum and layer norm"] * 2,
            *["between attentions"] * 2,
            *["residual sum"] * 2,
            *["gate|up"] * 2,
            *["q|k|v's B"] * 2,
        ]
    ],
    "files": [["safetensors", "safetensors, A/A", "of PEFT", "lorac's own, sealed", "hashing alone"]],
    "hops": [
        [
            "compile, eager",
            "compile, ONNX Runtime",
            "call, eager",
            "call, ONNX Runtime",
            "call, ONNX Runtime, one choice per row",
            "swap, kept",
            "swap, a new mixture",
            "load_adapter, a PEFT folder",
        ],
        ["the first of its layout", "the fifth of its layout", "evicted before"],
    ],
    "hybrids": [["attention"] * 4 + ["lfm2"] * 4],
    "load": [
        ["bare session", "bare session, A/A", "lorac.load", "lorac.load, prepacked="],
        ["lorac.load", "lorac.load, prepacked="],
    ],
    "merged_checkpoint": [["copy", "copy, A/A", "lorac merge"]],
    "overhead": [
        [
            "base / plain export",
            "live / base",
            "dora / base",
            "baked / base",
            "fused / base",
            "A/A / base",
            "live, none / base",
            "settled / base",
            "plain export / base",
            *(
                [
                    "openvino live / openvino",
                    "openvino live, bf16 / live",
                    "openvino / openvino's plain export",
                    "openvino A/A / openvino",
                ]
                if HAS_OPENVINO
                else []
            ),
            "PEFT's base / PEFT's base",
            "PEFT LoRA / PEFT's base",
            "PEFT DoRA / PEFT's base",
            "live / plain export",
        ]
    ],
    "recipe": [["step", "peak", "losses"]],
    "revisions": [
        [
            "compile, live, self-test included",
            "compile with a cache",
            "a call of 1x16 with the adapter",
            "a swap and the next call",
            "a training step in eager mode",
            "a generated token",
        ]
    ],
    "serving": [["float32"] * 8, ["float32"] * 9],
    "rows": [["32x1"] * 12 + ["32x16"] * 12, ["32"] * 3],
    "routed": [
        [
            "base / base",
            "A/A / base",
            "MeteoRA / base",
            "gathered / base",
            "X-LoRA / base",
            "X-LoRA, off / base",
            "eager base / eager base",
            "eager loop / eager base",
            "eager, PEFT's X-LoRA / eager base",
            "MeteoRA's overhead / the loop's overhead",
        ],
        ["base / base", "A/A / base", "FlyLoRA, all ranks / base", "FlyLoRA / base", "the gate alone"],
    ],
    "peers": [
        ["lorac"] * 3 + ["lorac, A/A"] + ["lorac in OpenVINO"] * 3 * HAS_OPENVINO + ["PEFT"] * 3,
        ["lorac in OpenVINO"] * 3 * HAS_OPENVINO + ["PEFT"] * 3,
        ["lorac"] * 3 + ["lorac, A/A"] + ["lorac in OpenVINO"] * 3 * HAS_OPENVINO + ["PEFT"] * 3,
    ],
    "quantised": [["float32", "float32, A/A", "int8", "int4, gptq", "gguf Q4_0"]] * 2,
    "side": [["lora", "lora again", "qst adapter", "qst avg"]],
    "starts": [["olora"] * 2 + ["eva"] * 2],
    "swap": [
        [
            "live LoRA (ONNX Runtime)",
            "fused LoRA (ONNX Runtime)",
            "fused LoRA (eager)",
            "A/A: fused LoRA (eager)",
            "fused SHiRA 1 % (eager)",
            "fused SHiRA 1 % (ONNX Runtime)",
            "weights copied once",
            "touched lines, contiguous",
            "touched lines, where they lie",
            "PEFT unmerge + merge",
        ],
        ["live", "fused"],
    ],
    "tensorrt": [["base", "base, A/A", "live", "live, no self-test", "fused", "baked"]],
    "threads": [["eager"] * 4 + ["onnxruntime"] * 4],
    "train": [
        ["lora q,v"] * 2 + ["dora all checkpointed"] * 2,
        [rule for rule in ("LoRA+", "LoRA+ in PEFT", "AltLoRA", "ALLoRA") for _ in range(2)],
    ],
    "variants": [["lora"]],
}
"""The first cells of every table of a smoke run."""


def _benchmark(name):
    return importlib.import_module(f"benchmarks.{name}").BENCHMARK


def test_every_benchmark_is_here():
    assert everything.names() == sorted(ROWS)


SLOW = (
    "aoti",
    "compile",
    "diffusion",
    "hops",
    "hybrids",
    "overhead",
    "peers",
    "quantised",
    "recipe",
    "routed",
    "rows",
    "starts",
    "swap",
    "tensorrt",
    "train",
)
"""Smoke runs of ten seconds and more: so many models do they compile."""


@pytest.mark.medium("test_help_lists_the_options imports every benchmark")
@pytest.mark.slow("the benchmark of threads on the same path", keep=["threads"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ROWS]
)
def test_runs_and_prints_its_tables(name, tmp_path, capfd):
    _benchmark(name).main(["--smoke", "--json", str(tmp_path / "result.json")])
    printed, complaints = capfd.readouterr()
    result = json.loads((tmp_path / "result.json").read_text())
    assert [[row[0] for row in table["rows"]] for table in result["tables"]] == ROWS[name]
    lines = sum(4 + len(table["rows"]) + len(table["notes"]) for table in result["tables"])
    assert len(printed.split("\n")) == 1 + lines, "it prints its tables alone"
    assert complaints == ""
    noise = [ratio for table in result["tables"] for ratio in table["A/A"].values()]
    assert noise and all(math.isfinite(ratio) and ratio > 0 for ratio in noise)
    assert result["machine"]["cpu"] and result["machine"]["cores"] > 0
    assert result["versions"].keys() == {"torch", "onnxruntime", "transformers", "peft", "lorac"}


@pytest.mark.parametrize("name", ROWS)
def test_help_lists_the_options(name, capsys):
    with pytest.raises(SystemExit) as end:
        _benchmark(name).main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all(option in shown for option in ("--smoke", "--json", "--processes"))
    assert "arget" in shown, "the docstring, with what is to be reached"


@pytest.mark.slow("test_reports_why_a_process_failed starts one")
def test_measures_in_separate_processes(tmp_path, monkeypatch, capsys):
    """The full run's way: each job is measured by a fresh process, and its median over processes is what counts."""
    monkeypatch.chdir(ROOT)
    options = ["--smoke", "--processes", "1", "--only", "eager", "--json", str(tmp_path / "result.json")]
    _benchmark("threads").main(options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["options"]["processes"] == 1
    assert [row[0] for row in result["tables"][0]["rows"]] == ["eager"] * 4
    assert "eager" in capsys.readouterr().out


def test_reports_why_a_process_failed(monkeypatch):
    monkeypatch.chdir(ROOT)
    moved = dataclasses.replace(_benchmark("threads"), name="moved")
    with pytest.raises(SystemExit, match=r"No module named benchmarks\.moved"):
        moved.main(["--smoke", "--processes", "1"])


def test_a_failing_benchmark_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    package = tmp_path / "benchmarks"
    package.mkdir()
    for name, text in {"__init__": "", "bad": "raise SystemExit(3)", "good": "print('measured')"}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything.benchmarks, "__path__", [str(package)])
    with pytest.raises(SystemExit, match=r"^failed: bad$"):
        everything.main([])
    assert capfd.readouterr().out == "measured\n"


def test_rejects_a_table_without_a_promised_row():
    from benchmarks import common

    table = common.Table("title", ("side", "ratio"), [("a", "1")], [("b",)], {})
    with pytest.raises(AssertionError, match="not the rows it promises"):
        common.print_table(table)


def test_reports_a_missing_engine():
    from benchmarks import _genai

    given = argparse.Namespace(genai=_genai.NOWHERE)
    assert not _genai.found(given)
    assert "was not measured: pip install" in _genai.note(given)
