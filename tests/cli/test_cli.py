"""The command line on a model saved by transformers and adapters made by PEFT."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig

import lorac
from lorac.cli import main
from tests import peft_files
from tests.zoo import ZOO

ENTRY = ZOO["tiny_llama"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder, two adapters' folders, inputs, and an eager artefact of them."""
    folder = tmp_path_factory.mktemp("cli")
    ENTRY.model().save_pretrained(folder / "model")
    oracles = {
        name: peft_files.make_peft(
            ENTRY.model(), folder / name, LoraConfig(r=rank, target_modules=targets), inputs=ENTRY.inputs(), seed=rank
        )
        for name, rank, targets in (("sql", 3, ["q_proj", "v_proj"]), ("style", 1, ["down_proj"]))
    }
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in ENTRY.inputs().items()})
    adapters = {name: folder / name for name in oracles}
    lorac.compile(ENTRY.model(), adapters, active=None).save(folder / "compiled")
    return SimpleNamespace(folder=folder, oracles=oracles)


@pytest.fixture
def cli(files, monkeypatch, capsys):
    """(words) -> (exit code, what was printed, what was complained of), run in the files' folder."""
    monkeypatch.chdir(files.folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def test_sites(cli):
    code, out, _ = cli("sites", "model", "--targets", "q_proj")
    assert code == 0
    assert "model.layers.0.self_attn.q_proj" in out
    assert "down_proj" not in out
    code, out, _ = cli("sites", "model")
    assert all(site in out for site in lorac.sites(ENTRY.model()))


def test_variants(cli):
    code, out, _ = cli("variants")
    assert code == 0
    assert all(name in out for name in lorac.variants())


def test_inspect(cli):
    code, out, _ = cli("inspect", "sql", "--model", "model")
    assert code == 0
    assert "LoRA(" in out
    assert "r=3" in out
    assert "model.layers.1.self_attn.v_proj" in out
    assert "lora_A[3, 64]" in out or "lora_A" in out


def test_explain(cli):
    code, out, _ = cli("explain", "model", "-a", "sql", "-a", "other=style")
    assert code == 0
    assert "sql: lora r=3" in out
    assert "other: lora r=1" in out
    code, compiled, _ = cli("explain", "compiled")
    assert code == 0
    assert "sql: lora r=3" in compiled


def test_convert(cli, files):
    code, out, _ = cli("convert", "sql", "sql.safetensors", "--format", "native", "--model", "model")
    assert (code, out) == (0, "sql.safetensors: native\n")
    given = lorac.load_adapter(files.folder / "sql", ENTRY.model())
    made = lorac.load_adapter(files.folder / "sql.safetensors", ENTRY.model())
    assert made.variant == given.variant
    for path, tensors in given.tensors.items():
        assert all(torch.equal(made.tensors[path][name], tensor) for name, tensor in tensors.items())


def test_run_answers_as_peft(cli, files):
    code, out, _ = cli("run", "compiled", "-i", "inputs.npz", "--adapters", "sql", "-o", "answer.npz")
    assert code == 0
    assert "logits" in out
    with np.load(files.folder / "answer.npz") as archive, torch.no_grad():
        answer = {"logits": archive["logits"]}
        base, reference = (model(**ENTRY.inputs()) for model in (ENTRY.model(), files.oracles["sql"]))
    from tests import parity

    parity.assert_parity(answer, reference, base, names=["logits"])


def test_swap_and_save(cli, files):
    code, out, _ = cli("swap", "compiled", "sql=0.7,style=0.3")
    assert code == 0
    assert "bound: 9 sites, " in out
    assert lorac.load(files.folder / "compiled").active == {}
    code, _, _ = cli("swap", "compiled", "style", "--save")
    assert code == 0
    assert lorac.load(files.folder / "compiled").active == {"style": 1.0}
    code, _, _ = cli("swap", "compiled", "none", "--save")
    assert lorac.load(files.folder / "compiled").active == {}


def test_bench(cli):
    code, out, _ = cli("bench", "compiled", "-i", "inputs.npz", "--rounds", "2")
    assert code == 0
    assert all(name in out for name in ("none", "sql", "style", "ratio"))


def test_compile_for_onnxruntime(cli, files):
    code, out, _ = cli("compile", "model", "-a", "sql", "-o", "for_ort")
    assert (code, out) == (0, "for_ort: onnxruntime, auto, adapters sql, active {'sql': 1.0}\n")
    assert lorac.load(files.folder / "for_ort").engine.target == "onnxruntime"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sites", "nowhere"], "lorac.UnknownOption: 'nowhere' is no model"),
        (["sites", "sql"], "lorac.UnknownOption: 'sql' holds no config.json"),
        (["sites", "no.such:thing"], "lorac.UnknownOption: 'no.such:thing' cannot be loaded"),
        (["sites", "model", "--targets", "q_prj"], "lorac.SiteNotFound: "),
        (["inspect", "nowhere"], "lorac."),
        (["compile", "model", "-a", "sql", "-a", "sql=style", "-o", "x"], "lorac.AdapterExists: two adapters"),
        (["compile", "model", "-a", "sql", "-o", "x", "--target", "onnx"], "lorac.UnknownOption: there is no target"),
        (
            ["compile", "model", "-a", "sql", "-o", "x", "--target", "eager", "--mode", "l"],
            "lorac.UnknownOption: there",
        ),
        (["compile", "model", "-o", "x", "--dtype", "flaot16"], "lorac.UnknownOption: dtype= takes no 'flaot16'"),
        (
            ["compile", "model", "-a", "sql", "-o", "x", "--active", "slq"],
            "lorac.AdapterNotFound: no adapter is called",
        ),
        (["run", "nowhere", "-i", "inputs.npz"], "nowhere' is no artefact"),
        (["run", "compiled", "-i", "nowhere.npz"], "lorac.UnknownOption: 'nowhere.npz' cannot be read"),
        (["run", "compiled", "-i", "model/config.json"], "lorac.UnknownOption: 'model/config.json' cannot be read"),
        (["swap", "compiled", "slq"], "lorac.AdapterNotFound: no adapter is called 'slq'\n  nearest: sql"),
        (["swap", "compiled", "sql=much"], "lorac.ChoiceError: 'sql=much' is no choice"),
        (["swap", "compiled", "sql=1,sql=2"], "lorac.ChoiceError: 'sql=1,sql=2' is no choice"),
        (["swap", "compiled", "sql=nan"], "lorac.ChoiceError: the strength of 'sql' is nan"),
        (["convert", "sql", "out", "--format", "pfet"], "lorac."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_and_exits_with_1(cli, files, words, message):
    code, out, err = cli(*words)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (files.folder / "x").exists()


def test_a_word_typer_does_not_know_exits_with_2(cli):
    code, _, err = cli("swpa")
    assert code == 2
    assert "swpa" in err
