"""docs/without-lorac.md, followed: PEFT adapters of one base in plain onnxruntime, from Python, C++ and JavaScript."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, ShiraConfig
from torch import Tensor

import lorac
from lorac.testing import assert_close
from tests.parity import assert_parity, named_outputs
from tests.peft_files import make_peft, quiet
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "without-lorac.md"
BLOCK = re.compile(r"^```(?:python|cpp|js)\n((?:#|//) (\w+\.\w+): .*?)^```$", re.DOTALL | re.MULTILINE)
CODE = {name: text for text, name in BLOCK.findall(PAGE.read_text(encoding="utf-8"))}
SCRIPTS = ("slots.mjs", "serve.mjs", "web.mjs")
SITES = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=3, target_modules=SITES),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=SITES),
    "shira": lambda: ShiraConfig(r=1, target_modules=["q_proj", "down_proj"]),
    "ia3": lambda: IA3Config(target_modules=SITES, feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(r=2, alpha=3, target_modules=SITES),
}
IDS = [[5, 17, 99, 3, 64, 8]]


@dataclass
class Served:
    """A folder made as the page says, and what PEFT answers: None is the base."""

    folder: Path
    wanted: dict[str | None, Tensor]


def test_the_service_fits_a_screen() -> None:
    python, others = {"make.py", "server.py", "more.py", "generate.py", "portable.py"}, {"serve.cpp", *SCRIPTS}
    assert CODE.keys() == python | others
    assert len(CODE["server.py"].splitlines()) <= 60
    for name in ("server.py", "generate.py"):
        assert not re.search(r"\b(lorac|torch|transformers)\b", CODE[name])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    place = tmp_path_factory.mktemp("served")
    model, inputs = ZOO["tiny_llama"].fresh(), {"input_ids": torch.tensor(IDS)}
    with torch.no_grad():
        wanted: dict[str | None, Tensor] = {None: model(**inputs).logits}
        for name, config in CONFIGS.items():
            oracle = make_peft(model, place / name, config(), inputs=ZOO["tiny_llama"].inputs(), outputs=("logits",))
            wanted[name] = oracle(**inputs).logits
    with quiet():
        model.save_pretrained(place / "model")
    _run("make.py", place, place / "model", place / "folder", *(place / name for name in CONFIGS))
    return Served(place / "folder", wanted)


def _run(name: str, place: Path, *arguments: object) -> str:
    (place / name).write_text(CODE[name], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, name, *map(str, arguments)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def _assert_served(served: Served, answer: Callable[[str | None], Tensor]) -> None:
    """Every adapter, in another order than they were added and the base between, answers as PEFT and as lorac does."""
    loaded = lorac.load(served.folder)
    for name in (*reversed(CONFIGS), None, *CONFIGS):
        found = answer(name)
        mine = named_outputs(loaded(input_ids=torch.tensor(IDS), adapters=name))["logits"]
        assert torch.equal(found, mine)
        if name is not None:
            assert_parity(found, served.wanted[name], served.wanted[None])


# --- Python ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def server(served: Served, tmp_path: Path) -> Iterator[str]:
    """The address of the page's service, in a process that has neither lorac nor torch."""
    (tmp_path / "server.py").write_text(CODE["server.py"], encoding="utf-8")
    hidden = "import sys; sys.modules.update(dict.fromkeys(['lorac', 'torch', 'transformers'])); sys.argv.pop(0); "
    port = _free_port()
    command = [sys.executable, "-c", f"{hidden}exec(open('server.py').read())", "server.py", served.folder, str(port)]
    process = subprocess.Popen([str(part) for part in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}/"
    try:
        _await(process, address)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _free_port() -> int:
    import socket

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
    return port


def _await(process: subprocess.Popen[str], address: str) -> None:
    for _ in range(600):
        assert process.poll() is None, process.communicate()[1]
        try:
            _post(address, {})
        except urllib.error.HTTPError:
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("the service does not answer")


def _post(address: str, inputs: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(inputs).encode())
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_a_service_switches_per_request(served: Served, server: str) -> None:
    inputs = {"input_ids": IDS, "attention_mask": [[1] * len(IDS[0])]}
    _assert_served(served, lambda name: torch.tensor(_post(server + (name or ""), inputs)["logits"]))
    with pytest.raises(urllib.error.HTTPError) as error:
        _post(server + "nobody", inputs)
    assert json.loads(error.value.read())["adapters"] == sorted(CONFIGS)


@pytest.mark.slow
def test_files_for_a_program_that_is_deployed(served: Served, tmp_path: Path) -> None:
    from tests.runtime.artifacts import alone

    model, fresh = ZOO["tiny_llama"].fresh(), LoraConfig(r=2, target_modules=["q_proj"])
    make_peft(model, tmp_path / "new", fresh, inputs=ZOO["tiny_llama"].inputs(), seed=7, outputs=("logits",))
    _run("more.py", tmp_path, served.folder, tmp_path / "new")
    loaded = lorac.load(served.folder)
    loaded.add_adapter(tmp_path / "new", "later")
    inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones_like(torch.tensor(IDS))}
    first = next(iter(loaded.adapters))
    for file, choice in {"later": "later", "both": {first: 0.7, "later": 0.3}}.items():
        found = alone(served.folder / "model.onnx", inputs, tmp_path / f"{file}.onnx_adapter")
        assert torch.equal(found["logits"], loaded(**inputs, adapters=choice).logits)


@pytest.mark.slow
def test_a_loop_over_a_cache(served: Served, tmp_path: Path) -> None:
    """Rows of unequal lengths get the tokens that lorac gives them."""
    loaded = lorac.load(served.folder)
    made = lorac.compile(ZOO["tiny_llama"].model(), dict(loaded.adapters), target="onnxruntime", cache=True)
    made.save(tmp_path / "cached")
    rows = [IDS[0], [7, 5, 23], [41]]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(len(IDS[0])) < torch.tensor([[len(row)] for row in rows])).long()
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    seen = set()
    for name in (None, *CONFIGS):
        text = [",".join(map(str, row)) for row in rows]
        found = json.loads(_run("generate.py", tmp_path, tmp_path / "cached", name or "-", 8, *text))
        expected = made.generate(ids, attention_mask=mask, adapters=name, **told)
        assert found == expected[:, len(IDS[0]) :].tolist()
        seen.add(str(found))
    assert len(seen) > 1


# --- C++ -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ONNX Runtime's C++ headers are: the system's, or those of Debian's package, unpacked aside."""
    below, name = Path("usr/include/onnxruntime"), "onnxruntime_cxx_api.h"
    if (Path("/") / below / name).exists():
        return Path("/") / below
    folder = tmp_path_factory.mktemp("headers")
    package = "libonnxruntime-dev"
    tools = [shutil.which(tool) for tool in ("apt-get", "dpkg")]
    if all(tools):
        subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, check=False)
        for file in folder.glob(f"{package}*.deb"):
            subprocess.run(["dpkg", "-x", str(file), str(folder)], capture_output=True, check=False)
    if not (folder / below / name).exists():
        pytest.skip(f"needs {name} of the Debian package {package}")
    return folder / below


@pytest.mark.slow
def test_a_program_in_cpp(served: Served, headers: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs the compiler g++")
    # The very library that Python uses, by the name that programs look for.
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    (tmp_path / "serve.cpp").write_text(CODE["serve.cpp"], encoding="utf-8")
    build = ["g++", "-std=c++17", "-Wall", "-Werror", "serve.cpp", "-I", str(headers), "-o", "serve"]
    build += ["libonnxruntime.so.1", f"-Wl,-rpath,{tmp_path}"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]

    def answer(name: str | None) -> Tensor:
        command = [str(tmp_path / "serve"), str(served.folder), name or "-", *map(str, IDS[0])]
        printed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not printed.stderr
        return torch.tensor([float(line) for line in printed.stdout.split()]).reshape(1, len(IDS[0]), -1)

    _assert_served(served, answer)


# --- JavaScript ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the page's modules and ONNX Runtime for them."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js with npm")
    folder = tmp_path_factory.mktemp("scripts")
    for name in SCRIPTS:
        (folder / name).write_text(CODE[name], encoding="utf-8")
    # The scripts of the packages would download libraries for GPUs.
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-node", "onnxruntime-web"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm has no onnxruntime-node: {done.stderr[-200:]}")
    return folder


@pytest.fixture(scope="module")
def portable(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the same adapters that any runtime switches."""
    place, made = tmp_path_factory.mktemp("portable"), served.folder.parent
    _run("portable.py", place, made / "model", place / "folder", *(made / name for name in CONFIGS))
    return place / "folder"


def _node(folder: Path, *words: object) -> Tensor:
    done = subprocess.run(["node", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return torch.tensor([float(line) for line in done.stdout.split()]).reshape(1, len(IDS[0]), -1)


@pytest.mark.slow
def test_node_switches_a_portable_program(served: Served, scripts: Path, portable: Path) -> None:
    for name in (None, *CONFIGS):
        found = _node(scripts, "serve.mjs", portable, name or "-", *IDS[0])
        if name is None:
            assert_close(found, served.wanted[None])
        else:
            assert_parity(found, served.wanted[name], served.wanted[None])


@pytest.mark.slow
def test_a_browser_switches_a_portable_program(served: Served, scripts: Path, portable: Path) -> None:
    """onnxruntime-web computes in WebAssembly, here in Node.js, with files from a server."""
    handler = functools.partial(QuietHandler, directory=str(portable))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in (None, *CONFIGS):
            call = f"(await open({json.dumps(address)}))({json.dumps(name)}, {IDS[0]})"
            page = f"import {{ open }} from './web.mjs'; console.log((await {call}).data.join(' '))"
            found = _node(scripts, "--input-type=module", "--eval", page)
            if name is None:
                assert_close(found, served.wanted[None])
            else:
                assert_parity(found, served.wanted[name], served.wanted[None])
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and writes no log."""

    def log_message(self, *args: object) -> None:
        """Do nothing."""
