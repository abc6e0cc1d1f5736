"""Commands about adapters' files: ranks, dtypes, and reports of adapters in the words of the Python functions."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorac
from lorac.analysis.entanglement import adapter_entanglement
from lorac.cli import main
from lorac.cli._output import name_options
from lorac.session.adapter_check import AdapterCheck
from lorac.testing import assert_close
from tests.mistakes import Tiny

MODEL = "tests.mistakes:Tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three trained adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {
        "sql": lorac.LoRA(r=4, alpha=6, targets=["q_proj"]),
        "conv": lorac.LoRA(r=2, targets=["conv", "q_proj"]),
        "dora": lorac.DoRA(r=2, targets=["q_proj"]),
    }
    compiled = lorac.compile(Tiny(), methods)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, adapter in compiled.adapters.items():
            for tensor in adapter.parameters():
                tensor.add_(0.1 * torch.randn_like(tensor))
            lorac.save_adapter(adapter, folder / name, model=Tiny())
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """(words) -> (exit code, output, errors), run in the folder."""
    monkeypatch.chdir(folder)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lorac", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.mark.medium("adapters/test_lora_conversion.py")
def test_convert_to_a_rank(cli, folder):
    code, out, _ = cli("convert", "dora", "near", "--model", MODEL, "--rank", 3, "--json")
    assert code == 0
    made, wanted = (
        lorac.load_adapter(folder / "near"),
        lorac.to_lora(lorac.load_adapter(folder / "dora"), Tiny(), rank=3),
    )
    assert json.loads(out)["errors"] == wanted.provenance["errors"]
    for path, tensors in wanted.tensors.items():
        assert all(torch.equal(made.tensors[path][name], tensor) for name, tensor in tensors.items())
    assert "error" in cli("convert", "dora", "near-1", "--model", MODEL, "--rank", 1)[1]


def test_convert_with_a_bound(cli, folder):
    code, out, err = cli("convert", "dora", "bounded", "-m", MODEL, "--rank", 1, "--tolerance", 0.01)
    assert (code, out) == (1, "")
    assert "more than --tolerance 0.01" in err
    assert not (folder / "bounded").exists()


def test_convert_to_a_dtype(cli, folder):
    code, out, _ = cli("convert", "sql", "half.safetensors", "--to", "native", "--dtype", "bfloat16")
    assert (code, out) == (0, "half.safetensors: native\n")
    assert {tensor.dtype for tensor in lorac.load_adapter(folder / "half.safetensors").parameters()} == {torch.bfloat16}
    code, _, err = cli("convert", "sql", "x", "--dtype", "float12")
    assert code == 1
    assert "nearest: float" in err


def test_resize(cli, folder):
    code, out, _ = cli("resize", "sql", "small", "--rank", 2)
    assert code == 0
    assert out.startswith("small: peft\n")
    wanted = lorac.resize(lorac.load_adapter(folder / "sql"), 2)
    made = lorac.load_adapter(folder / "small")
    assert made.variant.r == 2
    for path, tensors in wanted.tensors.items():
        assert all(torch.equal(made.tensors[path][name], tensor) for name, tensor in tensors.items())
    code, _, err = cli("resize", "dora", "small-dora", "--rank", 1)
    assert code == 1
    assert "lorac convert --model MODEL" in err


def test_diff(cli, folder):
    code, out, _ = cli("diff", "sql", "conv", "--json")
    assert code == 0
    found = json.loads(out)
    wanted = lorac.diff(*(lorac.load_adapter(folder / name) for name in ("sql", "conv")))
    assert list(found) == list(wanted)
    assert found["layers.0.q_proj"]["cosine"] == wanted["layers.0.q_proj"].cosine
    table = cli("diff", "sql", "dora", "--model", MODEL)[1]
    assert "overlap of outputs" in table
    assert "layers.1.q_proj" in table
    code, _, err = cli("diff", "sql", "dora")
    assert code == 1
    assert "pass --model," in err


def test_inspect_measures_each_site(cli, folder):
    code, out, _ = cli("inspect", "sql")
    assert code == 0
    assert "effective rank" in out
    found = json.loads(cli("inspect", "conv", "--model", MODEL, "--json")[1])
    wanted = lorac.inspect(lorac.load_adapter(folder / "conv", Tiny()), Tiny())
    assert found["changes"]["conv"]["norm"] == wanted.sites["conv"].norm
    assert found["changes"]["conv"]["rank"] == 2
    assert found["mismatches"] == []


def test_inspect_lists_everything_that_does_not_fit(cli, tmp_path):
    other = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    compiled = lorac.compile(other, {"a": lorac.LoRA(r=1, targets=["0", "1"])})
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "other", model=other)
    code, out, _ = cli("inspect", tmp_path / "other", "--model", MODEL)
    assert code == 1
    assert "does not fit the model:" in out
    assert "has tensors for '0', which is not a module of the model" in out
    assert "has tensors for '1', which is not a module of the model" in out


@pytest.mark.medium("analysis/test_entanglement.py")
def test_analyse_entanglement(cli, folder, tmp_path):
    code, out, _ = cli("analyse", "entanglement", "sql", "--plot", tmp_path / "picture.png")
    assert code == 0
    assert "valley" in out
    assert (tmp_path / "picture.png").stat().st_size
    found = json.loads(cli("analyse", "entanglement", "dora", "--model", MODEL, "--json")[1])
    wanted = adapter_entanglement(lorac.load_adapter(folder / "dora", Tiny()), Tiny())
    assert {site: tuple(one["entropies"]) for site, one in found.items()} == {s: w.entropies for s, w in wanted.items()}
    assert "pass --model," in cli("analyse", "entanglement", "dora")[2]
    code, _, err = cli("analyse", "entangled", "sql")
    assert code == 1
    assert "entanglement" in err


def test_extracts_stacks_of_experts_from_folders(cli, tmp_path):
    """PEFT's names of their tensors depend on the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_local_experts=2, vocab_size=20, num_key_value_heads=1)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj += torch.randn(16, 1) * torch.randn(24)
    model.save_pretrained(tmp_path / "tuned")
    code, _, err = cli("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "made", "--rank", 2)
    assert code == 0, err
    base = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    merged = lorac.merge_into(base, {"a": tmp_path / "made"}).model.layers[0].mlp.experts
    assert_close(merged.down_proj, experts.down_proj)


def test_extract(cli, tmp_path, monkeypatch):
    (tmp_path / "tuned_tiny.py").write_text(
        "import torch\nfrom tests.mistakes import Tiny\n\ndef make():\n    model = Tiny()\n"
        "    with torch.no_grad():\n        model.conv.weight += 0.1 * torch.rand(6, 24, 3)\n"
        "        model.layers[0].q_proj.weight += torch.ones(24)\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = cli("extract", "tuned_tiny:make", MODEL, tmp_path / "made", "--rank", 2, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["format"] == "peft"
    assert found["ranks"]["conv"] == 2
    assert set(lorac.load_adapter(tmp_path / "made", Tiny()).tensors) == {"layers.0.q_proj", "conv"}
    code, out, _ = cli("extract", "tuned_tiny:make", MODEL, tmp_path / "whole")
    assert out.startswith(f"{tmp_path / 'whole'}: native\n")
    assert lorac.load_adapter(tmp_path / "whole", Tiny()).variant.name == "edit"
    code, _, err = cli("extract", MODEL, MODEL, tmp_path / "none")
    assert code == 1
    assert "the same weights" in err
    assert not (tmp_path / "none").exists()


def test_next_steps_name_options(cli):
    assert (
        "use --format native; or `lorac convert --model MODEL`" in cli("convert", "dora", "x.gguf", "--to", "gguf")[2]
    )
    assert "`lorac convert --model MODEL --rank RANK` makes" in cli("resize", "dora", "x", "--rank", 2)[2]
    _, _, err = cli("sites", MODEL, "--targets", "q_pro")
    assert "nearest: q_proj" in err
    assert "targets=" not in err
    options = {"run": {"--inputs"}, "compile": {"--cache", "--target", "--inputs"}}
    for step, wanted in {
        "compile with cache=True for target='onnxruntime'": "compile with --cache for --target onnxruntime",
        "give inputs=, or seed=3": "give --inputs, or seed=3",
        "inputs={'x': 1}": "inputs={'x': 1}",
        "cache=True": "cache=True",
        "give it in adapters=, or add it by add_adapter(source, name=...)": (
            "`lorac inspect FOLDER` lists the adapters; `lorac compile MODEL -o FOLDER -a NAME=PATH` takes others"
        ),
    }.items():
        assert name_options(step, ["run", "x"], options) == wanted


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lorac", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lorac ")


def test_check_prints_a_page_and_exits_by_it(cli):
    code, out, _ = cli("check", "sql", "conv", "--model", MODEL)
    assert code == 0
    assert "sql: fits\n  format: peft\n  method: lora at 2 sites" in out
    assert "conv: fits" in out
    code, out, _ = cli("check", "sql", "nothing", "--model", MODEL, "--json")
    assert code == 1
    assert [(one["adapter"], one["fits"]) for one in json.loads(out)] == [("sql", True), ("nothing", False)]


def test_check_counts_faults_that_differ_by_numbers(cli, folder):
    tensors = load_file(folder / "sql" / "adapter_model.safetensors")
    (folder / "moved").mkdir()
    config = (folder / "sql" / "adapter_config.json").read_text()
    (folder / "moved" / "adapter_config.json").write_text(config)
    moved = {re.sub(r"layers\.(\d)", r"layers.1\1", key): tensor for key, tensor in tensors.items()}
    save_file(moved, folder / "moved" / "adapter_model.safetensors")
    code, out, _ = cli("check", "moved", "--model", MODEL)
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "moved: does not fit"
    assert "'layers.10.q_proj', which is not a module" in lines[1]
    assert lines[1].endswith("(and 1 more like it)")
    assert lines[2].startswith("  mend: load the model that the adapter was trained on")
    assert len(lines) == 3


def test_check_repairs_by_options_of_the_command_line(cli, folder, monkeypatch):
    monkeypatch.setattr(lorac, "check", lambda *_, **__: AdapterCheck("a", fits=False, repairs=("pass model=",)))
    assert "mend: pass --model" in cli("check", "sql")[1]


def test_convert_writes_the_names_of_the_model(cli, folder):
    tensors = load_file(folder / "sql" / "adapter_model.safetensors")
    (folder / "wrapped").mkdir()
    (folder / "wrapped" / "adapter_config.json").write_text((folder / "sql" / "adapter_config.json").read_text())
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()}
    save_file(wrapped, folder / "wrapped" / "adapter_model.safetensors")
    code, out, _ = cli("check", "wrapped", "--model", MODEL)
    assert code == 1
    command = f"`lorac convert wrapped OUT --model {MODEL} --fix-names`"
    assert f"mend: {command} gives it the model's names" in out
    code, _, err = cli("convert", "wrapped", "unwrapped", "--model", MODEL)
    assert code == 1
    assert "`lorac convert ADAPTER OUT --model MODEL --fix-names`" in err
    assert cli("convert", "wrapped", "unwrapped", "--model", MODEL, "--fix-names")[0] == 0
    assert cli("check", "unwrapped", "--model", MODEL)[0] == 0
    assert load_file(folder / "unwrapped" / "adapter_model.safetensors").keys() == tensors.keys()


def test_rejects_an_output_that_exists(cli, folder):
    before = (folder / "sql" / "adapter_config.json").read_bytes()
    for words in ("convert conv sql", "resize conv sql --rank 1", "merge -a conv -o sql"):
        code, _, err = cli(*words.split())
        assert (code, "OptionError: 'sql' exists already\n  give a new path" in err) == (1, True), err
    assert (folder / "sql" / "adapter_config.json").read_bytes() == before


def test_check_exits_by_the_objections_of_an_engine(cli):
    assert cli("check", "dora", "--model", MODEL)[0] == 0
    code, out, _ = cli("check", "dora", "--model", MODEL, "--for", "vllm")
    assert code == 1
    assert "refuses use_dora=True" in out
    assert f"mend: `lorac convert dora OUT --for vllm --model {MODEL}`" in out
    assert "nearest: vllm" in cli("check", "dora", "--for", "vlm")[2]
