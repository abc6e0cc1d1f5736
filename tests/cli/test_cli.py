"""The command line on a model saved by transformers and adapters made by PEFT."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig

import lorac
from lorac.cli import main
from tests import peft_files
from tests.runtime.generation.test_artifacts import words
from tests.zoo import SMALL_LLAMA

ENTRY = SMALL_LLAMA


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folders of a model and two adapters, inputs, and an eager artifact of them."""
    folder = tmp_path_factory.mktemp("cli")
    ENTRY.model().save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    oracles = {
        name: peft_files.make_peft(
            ENTRY.model(), folder / name, LoraConfig(r=rank, target_modules=targets), inputs=ENTRY.inputs(), seed=rank
        )
        for name, rank, targets in (("sql", 3, ["q_proj", "v_proj"]), ("style", 1, ["down_proj"]))
    }
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in ENTRY.inputs().items()})
    adapters = {name: folder / name for name in oracles}
    lorac.compile(ENTRY.model(), adapters, active=None).save(folder / "compiled")
    write_odd(folder)
    return SimpleNamespace(folder=folder, oracles=oracles)


def write_odd(folder):
    """Write modules and folders that are not models, and inputs that do not fit the model."""
    (folder / "own.py").write_text(
        "number = 3\ndef obj(): return None\ndef raises(): raise RuntimeError('mine')\ndef empty(): return ()\n"
    )
    (folder / "broken.py").write_text("1 / 0\n")
    for index, text in enumerate(
        ('"x"', '["__dict__"]', "[3]", '["logging"]', '["A", ', '["LlamaForCausalLM"], "hidden_size": "much"')
    ):
        (folder / f"odd{index}").mkdir()
        (folder / f"odd{index}" / "config.json").write_text(f'{{"model_type": "llama", "architectures": {text}}}')
    ids = np.array([[1, 2, 3]])
    arrays = {"high": ids + 125, "negative": ids - 2, "text": np.array([["hello"]]), "flat": ids[0], "none": ids[:, :0]}
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", input_ids=array)
    np.savez(folder / "wide.npz", input_ids=ids, attention_mask=np.ones((1, 9), dtype=ids.dtype))


@pytest.fixture
def cli(files, monkeypatch, capsys):
    """(words) -> (exit code, output, errors), run in the files' folder."""
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
    code, out, err = cli("sites", "model", "--targets", "q_proj")
    assert (code, err) == (0, ""), "what transformers says while it loads is nobody's to act on"
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
    assert "model.layers.*.self_attn.v_proj (2 sites)" in out
    assert "lora_A" in out
    changes = json.loads(cli("inspect", "sql", "--model", "model", "--json")[1])["changes"]
    norms = sorted(one["norm"] for site, one in changes.items() if site.endswith("v_proj"))
    assert len(norms) == 2 and f"{norms[0]:.3g} - {norms[1]:.3g}" in out


def test_explain(cli, files):
    code, out, _ = cli("explain", "model", "-a", "sql", "-a", "other=style", "--html", "page.html")
    assert code == 0
    assert out.endswith("page.html: the picture\n")
    assert "LlamaForCausalLM · eager, live" in (files.folder / "page.html").read_text(encoding="utf-8")
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
    assert "bound: 6 sites, " in out
    assert lorac.load(files.folder / "compiled").active == {}
    code, _, _ = cli("swap", "compiled", "style", "--save")
    assert code == 0
    assert lorac.load(files.folder / "compiled").active == {"style": 1.0}
    code, _, _ = cli("swap", "compiled", "none", "--save")
    assert lorac.load(files.folder / "compiled").active == {}


@pytest.mark.medium("benchmarks/ and cli/test_reports.py, which prints its report as JSON")
@pytest.mark.parametrize("model", [["compiled"], ["model", "-a", "sql", "-a", "style"]], ids=["artifact", "model"])
def test_bench(cli, model):
    code, out, _ = cli("bench", *model, "-i", "inputs.npz", "--rounds", "2")
    assert code == 0
    assert all(name in out for name in ("none", "sql", "style", "ratio"))


@pytest.mark.medium(
    "backends/onnxruntime/test_quantised_algorithms.py; test_compile_for_onnxruntime compiles by the command"
)
def test_codes_are_chosen_by_a_text(cli, files):
    (files.folder / "some.txt").write_text("w3 w4 w9 w7 " * 30)
    words = ["compile", "model", "-o", "small", "--weights", "int4", "--head", "int4", "--algorithm", "gptq"]
    assert cli(*words, "--calibration", "some.txt")[0] == 0
    loaded = lorac.load(files.folder / "small")
    assert (loaded.engine.options.algorithm, loaded.engine.options.head) == ("gptq", "int4")
    assert "stored as int4" in str(loaded.explain())
    (files.folder / "none.txt").touch()
    for file, message in (
        ("none.txt", "has no text"),
        ("nowhere.txt", "cannot be read"),
        ("wide.npz", "cannot be read"),
    ):
        code, _, err = cli(*words, "--calibration", file)
        assert (code, message in err) == (1, True)


def test_compile_for_onnxruntime(cli, files):
    code, out, _ = cli("compile", "model", "-a", "sql", "-o", "for_ort")
    assert (code, out) == (0, "for_ort: onnxruntime, auto, adapters sql, active {'sql': 1.0}\n")
    loaded = lorac.load(files.folder / "for_ort")
    assert loaded.engine.target == "onnxruntime"
    assert loaded.tokenizer("w3 w4")["input_ids"] == [3, 4], "the tokenizer that lies beside the model"
    code, _, _ = cli("swap", "for_ort", "sql=0.5", "--out", "half.onnx_adapter")
    assert code == 0
    assert (files.folder / "half.onnx_adapter").read_bytes()[4:8] == b"TORT"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sites", "nowhere"], "lorac.OptionError: 'nowhere' is not a model\n  give a folder"),
        (["sites", "sql"], "lorac.OptionError: 'sql' has no config.json"),
        (["sites", "no.such:thing"], "lorac.OptionError: 'no.such:thing' cannot be loaded"),
        (["sites", "model", "--targets", "q_prj"], "lorac.SiteError: "),
        (["inspect", "nowhere"], "lorac."),
        (["compile", "model", "-a", "sql", "-a", "sql=style", "-o", "x"], "lorac.AdapterError: two adapters"),
        (["compile", "model", "-a", "sql", "-o", "x", "--target", "onnx"], "lorac.OptionError: there is no target"),
        (
            ["compile", "model", "-a", "sql", "-o", "x", "--target", "eager", "--mode", "l"],
            "lorac.OptionError: there",
        ),
        (["compile", "model", "-o", "x", "--dtype", "flaot16"], "lorac.OptionError: --dtype cannot be 'flaot16'"),
        (
            ["compile", "model", "-a", "sql", "-o", "x", "--active", "slq"],
            "lorac.AdapterNotFound: no adapter is called",
        ),
        (
            ["run", "nowhere", "-i", "inputs.npz"],
            "lorac.OptionError: 'nowhere' is neither a compiled folder nor a model",
        ),
        (["run", "compiled", "-i", "nowhere.npz"], "lorac.OptionError: 'nowhere.npz' cannot be read"),
        (["run", "compiled", "-i", "model/config.json"], "lorac.OptionError: 'model/config.json' cannot be read"),
        (["swap", "compiled", "slq"], "lorac.AdapterNotFound: no adapter is called 'slq'\n  nearest: sql"),
        (["swap", "compiled", "sql=much"], "lorac.ChoiceError: 'sql=much' is not a choice"),
        (["swap", "compiled", "sql=1,sql=2"], "lorac.ChoiceError: 'sql=1,sql=2' is not a choice"),
        (["swap", "compiled", "sql=nan"], "lorac.ChoiceError: the strength nan of 'sql' is not finite"),
        (["convert", "sql", "out", "--format", "pfet"], "lorac."),
        (["sites", "own:obj"], "lorac.OptionError: 'own:obj' returns a NoneType, not an nn.Module"),
        (["sites", "own:number"], "lorac.OptionError: 'own:number' cannot be loaded: TypeError"),
        (["sites", "own:nothing"], "lorac.OptionError: 'own:nothing' cannot be loaded: AttributeError"),
        (["sites", "own:raises"], "lorac.OptionError: 'own:raises' cannot be loaded: RuntimeError: mine"),
        (["sites", "own:empty"], "lorac.OptionError: 'own:empty' returns a tuple, not an nn.Module"),
        (["sites", "broken:model"], "lorac.OptionError: 'broken:model' cannot be loaded: ZeroDivisionError"),
        (["sites", ":"], "lorac.OptionError: ':' is not a model"),
        (["sites", "own:"], "lorac.OptionError: 'own:' is not a model"),
        (["sites", "..own:model"], "lorac.OptionError: '..own:model' is not a model"),
        (["sites", "odd0"], "lorac.OptionError: 'odd0/config.json' names no known architecture by architectures='x'"),
        (["sites", "odd1"], "names the architecture '__dict__', unknown to transformers"),
        (["sites", "odd2"], "lorac.OptionError: 'odd2/config.json' names no known architecture by architectures=[3]"),
        (["sites", "odd3"], "names the architecture 'logging', unknown to transformers"),
        (["sites", "odd4"], "lorac.OptionError: 'odd4/config.json' is not JSON"),
        (["sites", "odd5"], "lorac.OptionError: 'odd5' cannot be loaded"),
        (["compile", "model", "--target", "eager", "-o", "inputs.npz/x"], "lorac.ArtifactError: "),
        (["convert", "sql", "inputs.npz/x", "-f", "native"], "lorac.FormatError: "),
        (["run", "compiled", "-i", "inputs.npz", "-o", "nowhere/out.npz"], "lorac.OptionError: 'nowhere/out.npz'"),
        (["run", "compiled", "-i", "high.npz"], "lorac.ChoiceError: input 'input_ids' holds the id 128;"),
        (["run", "compiled", "-i", "negative.npz"], "lorac.ChoiceError: input 'input_ids' holds the id -1;"),
        (
            ["run", "compiled", "-i", "text.npz"],
            "lorac.ChoiceError: the program cannot compute with input_ids <U5[1, 1]",
        ),
        (
            ["run", "compiled", "-i", "flat.npz"],
            "lorac.InputMismatch: input 'input_ids' has shape [3]; the program was captured for [any, any]",
        ),
        (
            ["run", "compiled", "-i", "none.npz"],
            "lorac.InputMismatch: the program was not captured for size 0 on axis 1",
        ),
        (
            ["run", "compiled", "-i", "wide.npz"],
            "lorac.InputMismatch: the model joins inputs that differ: size 9 on axis 1 of 'attention_mask' and size 3",
        ),
        (["bench", "compiled", "-i", "negative.npz"], "lorac.ChoiceError: input 'input_ids' holds the id -1;"),
        (
            ["bench", "compiled", "-i", "inputs.npz", "--settle"],
            "lorac.Unavailable: there is nothing to settle in eager",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_printed_and_exits_with_1(cli, files, words, message):
    code, out, err = cli(*words)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (files.folder / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swpa"], "swpa"),
        (["bench", "compiled", "-i", "inputs.npz", "--rounds", "0"], "--rounds"),
        (["bench", "compiled", "-i", "inputs.npz", "--rows", "2"], "--rows is for generation"),
    ],
)
def test_a_wrong_command_line_exits_with_2(cli, words, message):
    code, _, err = cli(*words)
    assert code == 2
    assert message in err


def test_a_fault_of_lorac_exits_with_3_and_traceback_shows_where(cli, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lorac.load", fail)
    code, out, err = cli("swap", "compiled", "sql")
    assert (code, out) == (3, "")
    assert err == "lorac itself failed: ZeroDivisionError: ours\n  `lorac --traceback …` shows where\n"
    code, _, err = cli("--traceback", "swap", "compiled", "sql")
    assert code == 3
    assert "Traceback" in err and "in fail" in err
    code, _, err = cli("--traceback", "inspect", "nowhere")
    assert code == 1
    assert "Traceback" in err


def test_an_interrupt_exits_with_130(cli, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorac.load", interrupt)
    code, _, err = cli("swap", "compiled", "sql")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.slow("test_an_interrupt_exits_with_130, in-process")
def test_a_closed_pipe_causes_no_traceback():
    """As ``lorac variants --markdown | head -0``: the output meets a closed pipe when Python ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from lorac.cli import main; main()", "variants", "--markdown"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.medium("the command without arguments", keep=["arguments0"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compile", "--help"], ["run", "--help"]])
def test_help_imports_no_library_of_arrays(arguments):
    script = (
        "import sys\nfrom lorac.cli import main\n"
        f"sys.argv[1:] = {arguments}\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_exit_codes_are_documented(cli):
    import lorac.cli

    _, out, _ = cli("--help")
    for code in (0, 1, 2, 3, 130):
        assert re.search(rf"\b{code}\b", out.partition("Exits with")[2])
        assert re.search(rf"^    {code} +\w", lorac.cli.__doc__, re.MULTILINE)


def test_trust_takes_a_strangers_eager_folder(cli, files):
    class Polynomial(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            return torch.special.laguerre_polynomial_l(self.layer(x), 3)

    x = torch.ones(2, 4)
    lorac.compile(Polynomial(), {"a": lorac.LoRA(r=2, targets=["layer"])}, "eager", (x,)).save(files.folder / "odd_ops")
    np.savez(files.folder / "x.npz", x=x.numpy())
    for call in (("run", "odd_ops", "-i", "x.npz"), ("bench", "odd_ops", "-i", "x.npz"), ("swap", "odd_ops", "a")):
        code, _, said = cli(*call)
        assert (code, "give --trust if you made the artifact, or trust its maker" in said) == (1, True), said
        assert cli(*call, "--trust")[0] == 0
    assert "give --trust if you made" in cli("explain", "odd_ops")[2]
    assert cli("explain", "odd_ops", "--trust")[0] == 0
    assert "give --trust if you made" in cli("serve", "odd_ops")[2]
    code, _, said = cli("run", "model", "--trust", "--prompt", "a")
    assert (code, "--trust is for compiled folders" in said) == (1, True)
