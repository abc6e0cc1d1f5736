"""``--import``: methods of the user on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lorac
from lorac import OptionError
from lorac.cli import app, main
from lorac.cli._user_modules import import_user_module

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

import lorac
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class Shifted(lorac.WeightVariant):
    """``W' = W + s``, s (out,)."""

    name: ClassVar[str] = "shifted"

    def params(self, site):
        return {"s": lorac.ParamSpec((site.out_features,), zeros)}

    def weight(self, W, p):
        return W + p.s[:, None]
'''

RECORD = {
    "version": 1,
    "name": "mine",
    "variant": "shifted",
    "config": {},
    "left_out": [],
    "shared": {},
    "provenance": {},
    "base": None,
    "modules": {"shifted": "shifted_method"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a method, and the file of an adapter of it."""
    folder = tmp_path_factory.mktemp("method")
    (folder / "shifted_method.py").write_text(METHOD)
    save_file({"tensors/0/s": torch.ones(6)}, folder / "mine.safetensors", {"lorac": json.dumps(RECORD)})
    return folder


def _lorac(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["lorac", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_an_adapter_of_a_users_method_needs_its_class(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli = {"monkeypatch": monkeypatch, "capsys": capsys}
    code, _, err = _lorac("inspect", "mine.safetensors", **cli)
    assert code == 1
    assert "lorac.UnknownMethod: the method 'shifted' has no class in this process" in err
    assert "import shifted_method, on the command line by --import shifted_method" in err

    code, out, err = _lorac("inspect", "mine.safetensors", "--import", "shifted_method", **cli)
    assert (code, err) == (0, "")
    assert "mine: Shifted(" in out
    assert Path(sys.modules["shifted_method"].__file__ or "") == folder / "shifted_method.py"
    # The same file by its path is the module that is there.
    assert import_user_module(str(folder / "shifted_method.py")) is sys.modules["shifted_method"]
    assert "shifted" in lorac.variants()
    # The same class again, as a file of it is written: it names the module.
    lorac.save_adapter(lorac.load_adapter("mine.safetensors"), "again.safetensors", format="native")
    with safe_open("again.safetensors", "pt") as opened:
        assert {**json.loads(opened.metadata()["lorac"]), "config": {}} == RECORD


def test_every_command_has_the_option_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__.replace("_", "-")
        code, out, _ = _lorac(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0
        assert "--import" in out


def test_rejects_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("")
    (tmp_path / "wrong_code.py").write_text("1 / 0\n")
    for module, message in (
        ("absent_module", "'absent_module' cannot be imported: ModuleNotFoundError"),
        ("absent_file.py", "the file 'absent_file.py' does not exist"),
        ("wrong_code.py", "ZeroDivisionError: division by zero in .*wrong_code.py:1: 1 / 0"),
        ("json.py", "cannot be imported as 'json': another module has the name"),
    ):
        with pytest.raises(OptionError, match=message) as error:
            import_user_module(module)
        assert error.value.next_step
    assert "wrong_code" not in sys.modules
