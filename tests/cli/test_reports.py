"""The output of the command line: tables, JSON, its version, completion; and its structured options."""

import json
import re
import sys
import warnings

import numpy as np
import pytest
from safetensors.torch import save_file

import lorac
from lorac.cli import main
from lorac.cli._compile_options import parse_dynamic_shapes, parse_reserve
from lorac.cli._inputs import read_inputs
from lorac.cli._output import make_table, print_report
from lorac.errors import warn
from lorac.version import VERSION
from tests.mistakes import Tiny, example, lora

MODEL = "tests.mistakes:Tiny"
INPUTS = example()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs in every format, an adapter's folder, and a compiled folder that the command line made of them."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "in.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in INPUTS.items()}))
    np.savez(folder / "in.npz", **{name: tensor.numpy() for name, tensor in INPUTS.items()})
    save_file(INPUTS, folder / "in.safetensors")
    compiled = lorac.compile(Tiny(), {"sql": lora()})
    lorac.save_adapter(compiled.adapters["sql"], folder / "sql", model=Tiny())
    words = [
        *("compile", MODEL, "-a", f"sql={folder / 'sql'}", "-o", str(folder / "compiled"), "--target", "eager"),
        *("--inputs", str(folder / "in.json"), "--dynamic", "ids=0,1", "--dynamic", "mask=0,1"),
        *("--reserve", "targets=q_proj,out_proj", "--reserve", "rank=20", "--dtype", "float64", "--device", "cpu"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorac", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """(words) -> output, run in the folder without errors."""
    monkeypatch.chdir(folder)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code, printed.err) == (0, "")
        return printed.out

    return call


def test_the_version(cli):
    assert cli("--version") == f"lorac {VERSION}\n"


# --- reports ---------------------------------------------------------------------------------------------------------

REPORTS = [
    ["sites", MODEL],
    ["variants"],
    ["inspect", "sql", "--model", MODEL],
    ["inspect", "compiled"],
    ["explain", "compiled"],
    ["explain", MODEL, "-a", "sql"],
    ["run", "compiled", "-i", "in.npz"],
    ["swap", "compiled", "sql=0.5"],
    ["bench", "compiled", "-i", "in.json", "--rounds", "1"],
    ["convert", "sql", "sql.safetensors", "-f", "native"],
]


@pytest.mark.parametrize("words", REPORTS, ids=" ".join)
def test_every_report_is_also_json(cli, words):
    assert json.loads(cli(*words, "--json"))


def test_inspecting_a_compiled_folder(cli, folder):
    found = json.loads(cli("inspect", "compiled", "--json"))
    assert (found["target"], found["mode"], found["active"]) == ("eager", "live", {"sql": 1.0})
    main_graph = found["graphs"]["main"]
    axis = main_graph["inputs"]["ids"].removeprefix("int64[batch, ").removesuffix("]")
    assert not axis.isdecimal(), "the length was to vary"
    assert main_graph["inputs"] == {"ids": f"int64[batch, {axis}]", "mask": f"float64[batch, {axis}]"}
    assert main_graph["outputs"] == {"output": f"float64[batch, 6, {axis}]"}
    (adapter,) = found["adapters"]
    assert (adapter["name"], adapter["method"], adapter["hyperparameters"]["r"]) == ("sql", "lora", 2)
    assert len(found["sites"]) == 4, "those of --reserve too"
    written = {path.relative_to(folder / "compiled").as_posix() for path in (folder / "compiled").rglob("*.*")}
    assert written == {*found["files"], "manifest.json"}
    files = found["files"]
    program = sum(nbytes for name, nbytes in files.items() if not name.startswith("adapters/"))
    assert found["memory"] == {"program": program, "adapters": adapter["bytes"]}
    for part in ("eager, live, active: sql*1", "mask", "hyper-parameters", "4 sites; memory: program", "on disk"):
        assert part in cli("inspect", "compiled")


def test_reserving_on_the_command_line(folder):
    compiled = lorac.load(folder / "compiled")
    compiled.add_adapter(lora(r=12, targets=["q_proj", "out_proj"]), "late")
    assert compiled.swap({"sql": 1.0, "late": 1.0}).sites == 4


@pytest.mark.parametrize("suffix", ["npz", "json", "safetensors"])
def test_inputs_of_every_format_give_the_same_outputs(cli, suffix):
    rows = [json.loads(cli("run", "compiled", "-i", f"in.{kind}", "--json")) for kind in ("npz", suffix)]
    assert rows[0] == rows[1]


def test_cuts_a_table_only_at_a_terminals_width(monkeypatch, capsys):
    path = "model.layers.11.attention.projection_of_queries." * 4
    made = make_table(("site", "kind"), [(path, "linear [in]")])
    monkeypatch.setenv("COLUMNS", "60")
    print_report(None, made, as_json=False)
    assert path in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_report(None, made, as_json=False)
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 60
    assert path in "".join(line[1:].partition("│")[0].strip() for line in lines if line.startswith("│"))


def test_a_warning_is_printed_in_words(folder, monkeypatch, capsys):
    compiled = lorac.load(folder / "compiled")

    def loaded(path, **options):
        warn("it computes in float32", next_step="dtype='float32' asks for that")
        return compiled

    monkeypatch.setattr("lorac.load", loaded)
    monkeypatch.setattr(sys, "argv", ["lorac", "swap", "compiled", "sql"])
    with pytest.raises(SystemExit):
        main()
    expected = "lorac.LoracWarning: it computes in float32\n  dtype='float32' asks for that\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("words", [[], ["--traceback"]])
def test_prints_warnings_of_libraries_only_on_request(words, folder, monkeypatch):
    compiled = lorac.load(folder / "compiled")

    def loaded(path, **options):
        warnings.warn_explicit("it is deprecated", FutureWarning, "/lib/site-packages/transformers/args.py", 1)
        warnings.warn_explicit("the model says so", UserWarning, "/home/model.py", 1)
        return compiled

    monkeypatch.setattr("lorac.load", loaded)
    monkeypatch.setattr(sys, "argv", ["lorac", *words, "swap", "compiled", "sql"])
    with pytest.raises(SystemExit), warnings.catch_warnings(record=True, action="always") as shown:
        main()
    expected = ["it is deprecated", "the model says so"] if words else ["the model says so"]
    assert [str(one.message) for one in shown] == expected


# --- spelling --------------------------------------------------------------------------------------------------------


def test_a_reserve():
    found = parse_reserve(["rank=64", "targets=all-linear", "adapters=8", "scales=yes"])
    assert found == lorac.Reserve(targets="all-linear", rank=64, adapters=8, scales=True)
    assert parse_reserve(["targets=a,b"]) == lorac.Reserve(targets=("a", "b"))
    assert parse_reserve(["outputs=a:77,b.c:3", "outputs=d:5"]) == lorac.Reserve(outputs={"a": 77, "b.c": 3, "d": 5})
    assert parse_reserve([]) is None


def test_dynamic_shapes():
    model = Tiny()
    assert parse_dynamic_shapes([], model, INPUTS) is None
    shapes = parse_dynamic_shapes(["ids=0,1", "mask="], model, INPUTS)
    assert sorted(shapes["ids"]) == [0, 1]
    assert shapes["mask"] == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_reserve(["rnak=3"]), "--reserve has no field 'rnak'\n  nearest: rank\n"),
        (lambda: parse_reserve(["rank"]), "--reserve takes no 'rank'"),
        (lambda: parse_reserve(["rank=many"]), "--reserve takes no rank=many\n  give a whole number"),
        (lambda: parse_reserve(["scales=maybe"]), "--reserve takes no scales=maybe\n  give yes or no"),
        *(
            (lambda text=text: parse_reserve([f"outputs={text}"]), f"takes no outputs={text}\n  give NAME:NUMBER")
            for text in ("head", "head:many", ":3", "")
        ),
        (
            lambda: parse_dynamic_shapes(["idx=0"], Tiny(), INPUTS),
            "--dynamic: the model has no input 'idx'\n  nearest: ids\n",
        ),
        (lambda: parse_dynamic_shapes(["ids=2"], Tiny(), INPUTS), "'ids' has no axis '2'\n  give an axis from 0 to 1"),
        (lambda: parse_dynamic_shapes(["ids=-1"], Tiny(), INPUTS), "'ids' has no axis '-1'"),
    ],
)
def test_rejects_misspelt_options(call, message):
    with pytest.raises(lorac.OptionError) as raised:
        call()
    assert message in str(raised.value)


def test_inputs_that_cannot_be_read(tmp_path):
    for name, text in (("x.txt", ""), ("x.json", '{"a": "b"}'), ("y.json", "[1]"), ("x.npz", "no archive")):
        (tmp_path / name).write_text(text)
        with pytest.raises(lorac.OptionError, match=name):
            read_inputs(tmp_path / name)


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("lorac ins", "inspect"),
        ("lorac compile --res", "--reserve"),
        ("lorac compile m --target on", "onnxruntime"),
        ("lorac compile m --mode ba", "baked"),
        ("lorac convert a b --format na", "native"),
    ],
)
def test_a_shell_completes(typed, completed, monkeypatch, capsys):
    for name, value in {"_LORAC_COMPLETE": "complete_bash", "COMP_WORDS": typed}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    monkeypatch.setattr(sys, "argv", ["lorac"])
    with pytest.raises(SystemExit):
        main()
    assert completed in capsys.readouterr().out.split()
