"""The files of examples/serving: their names exist and their steps run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lorac.cli import app
from lorac.serving import ServingSettings
from lorac.serving.guard import OPEN_PATHS

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
ROOT = FOLDER.parents[1]


def documents(name: str) -> dict[str, Any]:
    found = yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
    return {document["kind"]: document for document in found}


def steps(word: str) -> list[str]:
    """What follows a word of the Dockerfile, line by line."""
    return re.findall(rf"^{word} (.*)", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), re.M)


def test_the_objects_of_the_cluster_know_each_other() -> None:
    found = {**documents("kubernetes.yaml"), **documents("gateway.yaml")}
    pod = found["Deployment"]["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["InferencePool"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (port,) = (port["containerPort"] for port in server["ports"])
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == server["args"][-1] == str(port)
    assert found["InferencePool"]["spec"]["targetPorts"] == [{"number": port}]
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert {mount["name"] for mount in server["volumeMounts"]} == {each["name"] for each in pod["spec"]["volumes"]}


def test_a_pod_has_the_time_to_finish_its_requests() -> None:
    pod = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    waits = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + ServingSettings().grace
    assert server["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_metrics_that_are_read_exist() -> None:
    source = (ROOT / "lorac" / "serving" / "metrics.py").read_text(encoding="utf-8")
    named = re.findall(r"vllm:\w+", (FOLDER / "gateway.yaml").read_text(encoding="utf-8"))
    hpa = documents("kubernetes.yaml")["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert len(named) == 4
    assert all(f'"{name}"' in source for name in [*named, hpa.replace("vllm_", "vllm:")])


def test_the_image_and_the_pod_start_the_server_as_its_command_line_is() -> None:
    (entry,), (command,) = map(json.loads, steps("ENTRYPOINT")), map(json.loads, steps("CMD"))
    (server,) = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert entry == ["lorac", "serve"] and server["args"] == command
    shown = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).output
    assert all(option in shown for option in command if option.startswith("--"))


def test_the_image_is_built_by_commands_and_options_that_exist() -> None:
    known = {
        "FROM",
        "WORKDIR",
        "RUN",
        "COPY",
        "USER",
        "ENV",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([A-Z]+) ", text, re.M)) == known
    for run in steps("RUN"):
        words = [word for word in run.split() if not re.search("[$:/]", word)]
        if "pip" in run:
            command = [sys.executable, "-m", "pip", words[0], "--help"]
        else:
            command = [sys.executable, "-m", "venv", "--help"] if "venv" in run else ["useradd", "--help"]
        if command[0] == "useradd" and shutil.which("useradd") is None:
            continue
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [option for option in re.findall(r"--[a-z-]+", run) if option not in shown] == []
    # The wheel that the first stage builds is the one that it installs, with an extra that exists.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert re.findall(r"\$\(ls /wheels/\*\.whl\)\[(\w+)\]", text) == ["serve"] and "serve" in extras


def test_the_image_runs_as_a_user_of_its_own_and_says_whether_it_is_well() -> None:
    (user,), (command,) = steps("USER"), map(json.loads, steps("CMD"))
    assert user != "0" and f"--uid {user} " in " ".join(steps("RUN"))
    (check,) = steps("HEALTHCHECK")
    _, option, code = json.loads(check.partition("CMD ")[2])
    address = urllib.parse.urlsplit(re.findall(r"http://[^']+", code)[0])
    assert option == "-c" and compile(code, "HEALTHCHECK", "exec")
    assert address.path in OPEN_PATHS and address.path != "/"
    assert str(address.port) == command[command.index("--port") + 1] == steps("EXPOSE")[0]


@pytest.mark.slow
def test_the_image_copies_all_files_of_the_package(tmp_path: Path) -> None:
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason=f"{name} is not installed: the image's pip would fetch it")
    source = tmp_path / "source"
    source.mkdir()
    for step in steps("COPY"):
        *names, target = step.split()
        for name in [] if step.startswith("--from") else names:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / target / name if target == "./" else source / target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"lorac/serving/page/index.html", "lorac/cli/serving.py"} <= set(zipfile.ZipFile(wheel).namelist())
