"""A saved model runs elsewhere, bit-identically on the same engine, and nothing in it is trusted."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import lorac
from lorac.testing import assert_close
from tests.limits import assert_apart
from tests.parity import assert_parity, named_outputs
from tests.runtime.artifacts import alone, assert_same_folders, make_adapters, make_compiled, run_python
from tests.zoo import ZOO

CHOICES: tuple[Any, ...] = ("a", None, {"a": 0.7, "b": 0.4})
MEDIUM = pytest.mark.medium("live and fused programs, and fused weights in eager")
SLOW = pytest.mark.slow("a plain model in eager, a Llama on ONNX Runtime")
CASES = [
    ("plain_mlp", "onnxruntime", "live"),
    pytest.param(("plain_mlp", "onnxruntime", "fused"), marks=MEDIUM),
    pytest.param(("plain_mlp", "onnxruntime", "baked"), marks=MEDIUM),
    pytest.param(("tiny_llama", "onnxruntime", "live"), marks=SLOW),
    ("plain_mlp", "eager", "live"),
    ("plain_mlp", "eager", "fused"),
    pytest.param(("plain_mlp", "eager", "baked"), marks=MEDIUM),
    pytest.param(("tiny_gpt2", "eager", "live"), marks=SLOW),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, target, mode = request.param
    compiled, late = make_compiled(name, target, mode)
    folder = tmp_path_factory.mktemp("artifacts") / "it"
    compiled.save(folder)
    return name, mode, compiled, late, folder


def _same(compiled: lorac.Compiled, loaded: lorac.Compiled, inputs: dict[str, Tensor], base: Any = None) -> None:
    """Bits where the engine is the same, the deciding measure where it is not (eager runs a module, then a program)."""
    y, z = compiled(**inputs), loaded(**inputs)
    assert type(y) is type(z)
    if compiled.engine.target == "onnxruntime":
        for key, value in named_outputs(y).items():
            assert torch.equal(value, named_outputs(z)[key])
    elif base is not None:
        assert_parity(z, y, base, names=list(named_outputs(y)))


def test_the_loaded_answers_and_swaps_as_the_saved(saved: Any) -> None:
    name, mode, compiled, _, folder = saved
    loaded = lorac.load(folder)
    inputs = ZOO[name].inputs(seed=1, batch=3)
    base = ZOO[name].model()(**inputs)
    assert loaded.active == compiled.active == {"a": 0.7, "b": 0.4}
    assert loaded.adapters.keys() == {"a", "b"}
    _same(compiled, loaded, inputs, base)
    for choice in CHOICES if mode != "baked" else ():
        compiled.swap(choice)
        loaded.swap(choice)
        _same(compiled, loaded, inputs, base if choice else None)
        if choice is None:
            for key, value in named_outputs(loaded(**inputs)).items():
                assert_close(value.float(), named_outputs(base)[key].float())


def test_an_exported_program_runs_without_lorac(saved: Any, tmp_path: Path) -> None:
    """Without lorac, on the model's own inputs: base, adapters and mixtures are what lorac answers, to the bit."""
    name, mode, compiled, late, folder = saved
    if compiled.engine.target != "onnxruntime":
        with pytest.raises(lorac.Unavailable):
            compiled.save_choice(tmp_path / "a", "a")
        pytest.skip("needs ONNX Runtime")
    inputs, model = ZOO[name].inputs(seed=3, batch=3), folder / "model.onnx"
    if mode == "baked":
        _assert_alone(alone(model, inputs), compiled(**inputs))
        return
    files = {one: folder / "adapters" / f"{one}.onnx_adapter" for one in ("a", "b")}
    assert json.loads((folder / "manifest.json").read_text())["adapters"]["a"]["portable"] == {
        "main": "adapters/a.onnx_adapter"
    }
    loaded = lorac.load(folder)
    loaded.add_adapter(late, "late")
    choices: dict[Any, Any] = {tmp_path / "mixture": {"a": 0.7, "b": 0.4}, tmp_path / "later": "late"}
    for file, choice in choices.items():
        loaded.save_choice(file, choice)
    assert loaded.active == {"a": 0.7, "b": 0.4}
    choices |= {None: None, **{file: one for one, file in files.items()}}
    for file, choice in choices.items():
        loaded.swap(choice)
        _assert_alone(alone(model, inputs, file), loaded(**inputs))


def _assert_alone(found: dict[str, Tensor], wanted: Any) -> None:
    named = named_outputs(wanted)
    if len(named) > 1 or "logits" in named:
        assert found.keys() == named.keys()
    for value, expected in zip(found.values(), named.values(), strict=True):
        assert torch.equal(value, expected)


def test_no_weight_of_the_base_is_there_twice(saved: Any) -> None:
    """Weights of the program are stored once, in its own files; a baked program stores no base weights."""
    _, mode, compiled, _, folder = saved
    if compiled.engine.target != "onnxruntime":
        pytest.skip("needs ONNX Runtime")
    base = folder / "base.safetensors"
    assert base.exists() == (mode != "baked")
    if mode == "baked":
        return
    with safe_open(base, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert all(tensor.nbytes < 1024 for tensor in kept.values())  # small ones lie in the model's own file


def test_the_loaded_takes_further_adapters(saved: Any) -> None:
    """DoRA needs the base weights; they come from the artifact."""
    name, mode, compiled, late, folder = saved
    if mode == "baked":
        pytest.skip("a baked model takes no adapters")
    loaded = lorac.load(folder)
    inputs = ZOO[name].inputs(seed=2)
    for one in (compiled, loaded):
        one.add_adapter(copy.copy(late))
        one.swap("late")
    base = ZOO[name].model()(**inputs)
    _same(compiled, loaded, inputs, base)
    compiled.remove_adapter("late")


def test_saving_again_writes_the_same_bytes(saved: Any, tmp_path: Path) -> None:
    folder = saved[-1]
    lorac.load(folder).save(tmp_path / "again")
    assert_same_folders(folder, tmp_path / "again")


@pytest.mark.medium("ONNX Runtime", cases=["*-eager-*"])
def test_load_accepts_run_options(saved: Any) -> None:
    folder = saved[-1]
    if lorac.load(folder).engine.target == "eager":
        with pytest.raises(lorac.OptionError, match="'threads='"):
            lorac.load(folder, threads=1)
        again = lorac.load(folder, target="onnxruntime", threads=1, self_test=False)
        assert again.engine.options.threads == 1
        return
    loaded = lorac.load(folder, threads=1, spinning=False)
    assert (loaded.engine.options.threads, loaded.engine.options.spinning) == (1, False)
    for graph in loaded.engine.graphs.values():
        assert graph.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(lorac.OptionError, match="'cache='"):
        lorac.load(folder, cache=True)
    with pytest.raises(lorac.OptionError, match="threads cannot be"):
        lorac.load(folder, threads=-1)


def test_no_pickle(saved: Any) -> None:
    suffixes = {path.suffix for path in saved[-1].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".onnx", ".data", ".onnx_adapter"}


TARGETS = ("eager", "onnxruntime")


@pytest.mark.slow("test_killed.py and goldens of dumps")
def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """In two processes that hash strings differently and work in other folders: this one and a new one."""
    (tmp_path / "tmp").mkdir()
    script = (
        "from tests.runtime.artifacts import make_compiled\n"
        f"for t in {TARGETS}: make_compiled('plain_mlp', t, 'live')[0].save({str(tmp_path / 'there')!r} + t)"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    run_python(script, PYTHONHASHSEED=seed, TMPDIR=str(tmp_path / "tmp"))
    for target in TARGETS:
        make_compiled("plain_mlp", target, "live")[0].save(tmp_path / f"here{target}")
        assert_same_folders(tmp_path / f"here{target}", tmp_path / f"there{target}")


@pytest.mark.slow("the same of ONNX Runtime, where less is imported")
def test_loading_needs_neither_transformers_nor_the_model(tmp_path: Path) -> None:
    """In eager; for ONNX Runtime even less is imported (the next test)."""
    inputs = ZOO["plain_mlp"].inputs(seed=1)
    compiled, _ = make_compiled("plain_mlp", "eager", "live")
    compiled.save(tmp_path / "it")
    torch.save((inputs, compiled(**inputs).detach()), tmp_path / "expected.pt")
    script = (
        "import sys\n"
        "for name in ('transformers', 'tests', 'peft'): sys.modules[name] = None\n"
        "import torch, lorac\nfrom lorac.testing import assert_close\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"assert_close(lorac.load({str(tmp_path / 'it')!r})(**inputs), expected)\n"
    )
    run_python(script)


def test_to_load_and_call_imports_nothing_that_compiling_takes(saved: Any, tmp_path: Path) -> None:
    """The output of a transformers model still answers by name, by position and as a mapping."""
    name, _, compiled, _, folder = saved
    if name != "tiny_llama":
        pytest.skip("the other programs load alike")
    compiled.swap({"a": 0.7, "b": 0.4})
    torch.save((inputs := ZOO["tiny_llama"].inputs(seed=1), compiled(**inputs).logits), tmp_path / "expected.pt")
    heavy = ("transformers", "torch._dynamo", "torch._inductor", "torch.onnx", "torch.export._trace")
    heavy += ("onnxscript", "onnx_ir", "sympy", "peft", "lorac.session.lowering", "lorac.backends.onnx.emit")
    script = (
        "import sys, torch, lorac\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "torchs = set(sys.modules)\n"
        f"loaded = lorac.load({str(folder)!r})\n"
        "y = loaded(**inputs)\n"
        "for z in (y.logits, y['logits'], y[0], y.to_tuple()[0], dict(y)['logits']): assert torch.equal(z, expected)\n"
        "assert y.loss is None and loaded(**inputs, return_dict=False)[0].equal(expected)\n"
        "loaded.swap('b'); loaded.swap({'a': 0.5, 'b': 0.5}); loaded(**inputs, adapters='a')\n"
        f"assert not (found := (set(sys.modules) - torchs) & set({heavy!r})), found\n"
        "import transformers\n"
        "y = loaded(**inputs)\n"
        "assert type(y) is transformers.modeling_outputs.CausalLMOutputWithPast, type(y)\n"
    )
    run_python(script)


def test_loads_an_eager_artifact_for_onnxruntime(tmp_path: Path) -> None:
    compiled, late = make_compiled("plain_mlp", "eager", "live")
    compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it", target="onnxruntime")
    inputs = ZOO["plain_mlp"].inputs(seed=1, batch=4)
    base = ZOO["plain_mlp"].model()(**inputs)
    for one in (compiled, loaded):
        one.add_adapter(copy.copy(late))
    for choice in ("late", "b", {"a": 0.7, "b": 0.4}):
        compiled.swap(choice)
        loaded.swap(choice)
        assert_parity(loaded(**inputs), compiled(**inputs), base)
    loaded.swap(None)
    assert_close(loaded(**inputs), base)


@pytest.mark.medium("runtime/test_own_methods.py saves routed methods")
def test_saves_routers_with_their_slots(tmp_path: Path) -> None:
    """A branch's formula is in the program; another adapter of its structure still finds the slot."""
    model, inputs = ZOO["tiny_llama"].fresh(), ZOO["tiny_llama"].inputs(seed=1)
    compiled = lorac.compile(model, {"a": lorac.MeteoRA(r=3, targets=["v_proj", "down_proj"])})
    adapter = compiled.adapters["a"]
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    base = model(**inputs)
    assert_parity(loaded(**inputs), compiled(**inputs), base)
    loaded.remove_adapter("a")
    assert_close(loaded(**inputs).logits, base.logits)
    loaded.add_adapter(adapter, "again")
    loaded.swap("again")
    assert_parity(loaded(**inputs), compiled(**inputs), base)


@pytest.mark.medium("training/test_trained.py: a state dict goes round")
def test_trained_tensors_are_saved(tmp_path: Path) -> None:
    compiled, _ = make_compiled("plain_mlp", "eager", "live")
    inputs = ZOO["plain_mlp"].inputs(seed=1)
    before = compiled(**inputs).detach()
    with torch.no_grad():
        for tensor in compiled.parameters():  # type: ignore[attr-defined]
            tensor.mul_(1.05)
    compiled.save(tmp_path / "it")
    y = compiled(**inputs).detach()
    assert_apart(before, y)
    assert_parity(lorac.load(tmp_path / "it")(**inputs), y, ZOO["plain_mlp"].model()(**inputs))


@pytest.mark.medium("the mistakes of the suite")
def test_rejects_operations_that_need_the_model(tmp_path: Path) -> None:
    make_compiled("plain_mlp", "eager", "live")[0].save(tmp_path / "sound")
    with pytest.raises(lorac.BaseNeeded, match=r"export\(\)"):
        lorac.load(tmp_path / "sound").export()
    compiled, _ = make_compiled("plain_mlp", "onnxruntime", "live")
    compiled.save(tmp_path / "it")
    with pytest.raises(lorac.Unavailable, match="eager"):
        lorac.load(tmp_path / "it", target="eager")
    gc.collect()  # the model went out of scope, in cycles
    with pytest.raises(lorac.BaseNeeded, match=r"export\(\)"):
        compiled.export()


@pytest.mark.medium("test_the_loaded_takes_further_adapters")
def test_finds_the_model_while_it_is_alive() -> None:
    model = ZOO["plain_mlp"].fresh()
    alive, adapters = weakref.ref(model), make_adapters("plain_mlp", model)
    late = adapters.pop("late")
    inputs = ZOO["plain_mlp"].inputs()
    compiled = lorac.compile(model, adapters, target="onnxruntime", active="a", example_inputs=inputs)
    fused = compiled.export(mode="fused")
    assert_close(fused(**inputs), compiled(**inputs))
    base = model(**inputs)
    del model, fused
    gc.collect()
    assert alive() is None
    compiled.add_adapter(late)  # DoRA: the base weights come from the engine's file
    compiled.swap("late")
    compiled.add_adapter(lorac.DoRA(r=1, targets=["up"]), name="fresh")
    assert not torch.equal(compiled(**inputs), base)
    compiled.swap("fresh")
    assert_close(compiled(**inputs), base)
