"""``prepacked=``: a folder with the weights of sessions as the processor's kernels read them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorac
from lorac import LoracWarning
from lorac.storage.artifact import read_manifest, write_manifest
from lorac.storage.atomic_folders import MANIFEST

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
ONE_THREAD: Mapping[str, object] = {"threads": 1, "spinning": False}
LOAD = "import sys, lorac; lorac.load(sys.argv[1], prepacked=sys.argv[2], threads=1, spinning=False)"


@pytest.fixture(scope="module", params=["float32", "int4"])
def artifact(request: pytest.FixtureRequest, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a cache and two adapters."""
    if request.param == "float32":
        return llama_folder
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    adapters = {"one": lorac.LoRA(r=3, targets="all-linear"), "two": lorac.LoRA(r=5, targets=["q_proj", "down_proj"])}
    trained = lorac.compile(model, adapters).adapters
    for adapter in trained.values():
        for tensor in adapter.parameters():
            tensor.data.normal_(0, 0.1)
    compiled = lorac.compile(
        model, trained, target="onnxruntime", cache=True, weights=request.param, self_test=False, **ONE_THREAD
    )
    folder = tmp_path_factory.mktemp("artifact") / "saved"
    compiled.save(folder)
    return folder


def _answers(compiled: lorac.Compiled) -> list[torch.Tensor]:
    """Return a program's answers: generated text for every choice, after swaps, and with a choice for each row."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    answers = []
    for choice in ("one", "two", None, {"one": 0.5, "two": 0.25}, "one"):
        compiled.swap(choice)
        answers += compiled.generate(input_ids=IDS, **options).logits
    return [*answers, compiled(input_ids=IDS, adapters=["two", None]).logits]


def _sessions(folder: Path) -> list[Path]:
    return [path.parent for path in folder.rglob(MANIFEST)]


def _expect_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [True] * len(one)


@contextmanager
def _written_anew(reason: str) -> Iterator[None]:
    with pytest.warns(LoracWarning, match=f"written anew.*{reason}"):
        yield


@pytest.mark.medium("float weights", cases=["int4"])
def test_prepacked_weights_change_no_bit(artifact: Path, tmp_path: Path) -> None:
    plain = _answers(lorac.load(artifact, **ONE_THREAD))
    for threads in (1, 2):  # the first load writes the files
        mapped = lorac.load(artifact, prepacked=tmp_path, threads=threads, spinning=False)
        assert f"prepacked weights are mapped from '{tmp_path}'" in str(mapped.explain())
        _expect_equal(_answers(mapped), plain)
    (session,) = _sessions(tmp_path)
    packed = onnx.load(session / "model.onnx", load_external_data=False).graph.initializer
    assert any(entry.key.startswith("prepacked") for tensor in packed for entry in tensor.external_data)
    shutil.rmtree(tmp_path)  # what is mapped stays
    _expect_equal(_answers(mapped), plain)
    mapped.save(tmp_path / "again")
    assert "prepacked" not in (tmp_path / "again" / MANIFEST).read_text()
    _expect_equal(_answers(lorac.load(tmp_path / "again", **ONE_THREAD)), plain)


@pytest.mark.medium("float weights", cases=["int4"])
def test_rewrites_files_that_are_damaged_or_from_another_machine(artifact: Path, tmp_path: Path) -> None:
    plain = _answers(lorac.load(artifact, prepacked=str(tmp_path), **ONE_THREAD))
    (session,) = _sessions(tmp_path)
    weights = session / "model.onnx.data"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with _written_anew("has the hash"):
        _expect_equal(_answers(lorac.load(artifact, prepacked=tmp_path, **ONE_THREAD)), plain)
    fields = read_manifest(session / MANIFEST)
    write_manifest(session / MANIFEST, {**fields, "machine": {**fields["machine"], "processor": "another"}})
    with _written_anew("by another processor"):
        lorac.load(artifact, prepacked=tmp_path, **ONE_THREAD)
    (session / MANIFEST).unlink()
    with _written_anew("cannot be read"):
        lorac.load(artifact, prepacked=tmp_path, **ONE_THREAD)
    assert _sessions(tmp_path) == [session]
    _expect_equal(_answers(lorac.load(artifact, prepacked=tmp_path, **ONE_THREAD)), plain)


@pytest.mark.medium("float weights; one load writes the files")
def test_threads_that_load_at_once_write_the_files_once(artifact: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: lorac.load(artifact, prepacked=tmp_path, **ONE_THREAD), range(4)))
    (session,) = _sessions(tmp_path)
    assert {path.name for path in session.parent.iterdir()} == {session.name}
    for compiled in loaded:
        _expect_equal(_answers(compiled), _answers(loaded[0]))


@pytest.mark.medium("float weights", cases=["int4"])
def test_a_folder_that_cannot_be_written_is_not_used(artifact: Path, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    with pytest.warns(LoracWarning, match="is not used"):
        compiled = lorac.load(artifact, prepacked=taken, **ONE_THREAD)
    _expect_equal(_answers(compiled), _answers(lorac.load(artifact, **ONE_THREAD)))
    assert "mapped" not in str(compiled.explain())
    assert taken.read_text() == "mine"


@pytest.mark.medium("float weights")
@pytest.mark.slow
def test_ignores_and_removes_files_of_a_killed_process(artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(artifact), str(tmp_path)]
    process = subprocess.Popen(command)
    while process.poll() is None and not [*tmp_path.glob("*/.session*")]:
        pass
    process.kill()
    process.wait()
    assert subprocess.run([*command], check=True, capture_output=True).returncode == 0
    (session,) = _sessions(tmp_path)
    assert {path.name for path in session.parent.iterdir()} == {session.name}
