"""The zoo: models of many families through lorac, shrunk configurations, and the journal's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from campaigns.zoo import __main__ as zoo
from campaigns.zoo import adapting, checking, generating, journal, pages, running, shrinking
from campaigns.zoo.entries import Entry, entries, entry
from campaigns.zoo.generating import FORMS
from campaigns.zoo.once_refused import ONCE_REFUSED
from campaigns.zoo.shown import SHOWN
from lorac import LoracError, SiteError

HERE = (("eager", "live"), ("onnxruntime", "live"))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.medium("end_to_end/test_peft_eager.py and test_zoo.py")
@pytest.mark.slow(
    "a model of experts and one of PEFT's own cases", keep=["peft/lora-02-linears", "transformers/granitemoe"]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHOWN)
def test_matches_peft(name: str) -> None:
    record = checking.check(entry(name), plain=False, ways=HERE)
    assert {way: found["outcome"] for way, found in record["ways"].items()} == {
        "eager live": "ok",
        "onnxruntime live": "ok",
    }, record


@pytest.mark.medium("runtime/generation/test_onnxruntime.py")
@pytest.mark.filterwarnings("ignore")
def test_generates_as_peft() -> None:
    record = checking.check(entry("transformers/gpt_neo"), plain=False, ways=(), generates=True)
    found = {form: record["generation"][form]["outcome"] for form in generating.FORMS}
    assert found.pop("images") == generating.NONE
    assert {*found.values()} <= {"ok", "ties"}, record
    assert "ways" not in record


def test_a_form_is_wrong_where_tokens_part_at_no_tie() -> None:
    tokens, scores = torch.tensor([[3, 4]]), torch.tensor([[[0.0, 1.0, 9.0], [0.0, 9.0, 8.999]]])
    outcomes = {
        text: generating.compare([(tokens, scores)], lambda text=text: (torch.tensor([text]), None))["outcome"]
        for text in ((3, 4), (3, 5), (5, 4))
    }
    assert outcomes == {(3, 4): "ok", (3, 5): "ties", (5, 4): "wrong"}


def test_names_are_unique_and_families_alternate() -> None:
    found = entries()
    assert len({one.name for one in found}) == len(found)
    assert len({one.family for one in found[:10]}) == 10
    with pytest.raises(SystemExit, match="no family 'fish'"):
        entries(family=["fish"])


# --- what comes of a model -------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return answer


def _call(model: nn.Module, batch: int, length: int, seed: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed))}


def _check(**changes: Any) -> dict[str, Any]:
    given = {"name": "here/pair", "family": "here", "build": Pair, "inputs": _call, **changes}
    return checking.check(Entry(**given), plain=False, ways=HERE[:1])


def test_blames_the_host_or_peft_for_their_errors() -> None:
    def unbuilt() -> nn.Module:
        raise ImportError("a library is missing")

    def no_such_layer(model: nn.Module) -> Any:
        from peft import LoraConfig

        return LoraConfig(target_modules=["third"])

    assert _check(build=unbuilt)["outcome"] == "host-cannot"
    assert _check(adapter=no_such_layer)["outcome"] == "peft-cannot"
    dropped = _check(build=lambda: nn.Sequential(Pair(), _Noise()), inputs=lambda *a: {"input": _call(*a)["x"]})
    assert dropped["outcome"] == "host-cannot" and "differently" in dropped["message"]


class Steps(nn.Module):
    """A linear layer and a loop over time, as state-space models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        state, states = torch.zeros_like(y[:, 0]), []
        for step in range(y.shape[1]):
            state = torch.tanh(state + y[:, step])
            states.append(state)
        return torch.stack(states, 1)


@pytest.mark.medium("test_fidelity.py: a size that the trace fixed")
@pytest.mark.filterwarnings("ignore::lorac.LoracWarning")
def test_a_model_that_loops_over_time_is_right_at_its_length() -> None:
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    given = Entry("here/steps", "here", Steps, _call, shapes=lambda call: shapes)
    found = checking.check(given, plain=False, ways=(("onnxruntime", "live"),))["ways"]["onnxruntime live"]
    assert (found["outcome"], found["free"]) == ("fixed", "rows")
    assert "for step in range(y.shape[1])" in found["message"]


class Reads(nn.Module):
    """A convolution whose stride its forward reads, which PEFT's wrapper does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.last = nn.Conv1d(6, 9, 3, padding=1), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.kernel(x.transpose(1, 2)) * self.kernel.stride[0]
        answer: torch.Tensor = self.last(hidden.mean(-1))
        return answer


def test_adapts_only_linears_where_peft_rejects_convolutions() -> None:
    assert _check(build=Reads)["ways"]["eager live"]["outcome"] == "ok"


class Aside(Pair):
    """Keeps a layer in a list as well, and calls that one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.first]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(torch.tanh(self.layers[0](x)))
        return answer


def test_decides_nothing_where_the_model_bypasses_pefts_layers() -> None:
    found = _check(build=Aside)
    assert (found["outcome"], found["class"]) == ("peft-cannot", "PassedBy")
    assert "first" in found["message"]


def test_decides_nothing_where_peft_loads_only_part_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    load = adapting.load_peft

    def lose(model: nn.Module, folder: Path) -> Any:
        loaded = load(model, folder)
        loaded.get_parameter("base_model.model.first.lora_B.default.weight").data.zero_()
        return loaded

    monkeypatch.setattr(adapting, "load_peft", lose)
    found = _check()
    assert (found["outcome"], found["class"]) == ("peft-cannot", "LosesTensors")


def test_decides_nothing_where_an_adapter_has_no_effect(tmp_path: Path) -> None:
    subject = checking._subject(Entry("here/pair", "here", Pair, _call))
    checking._adapt(subject, tmp_path, adapting.lora)
    assert checking._decides(subject)
    subject.reference = subject.base
    assert not checking._decides(subject)


class Chooses(Pair):
    """Takes one of its positions, by scores."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = (self.step * torch.arange(x.shape[1])).expand(x.shape[:2]).topk(1).indices
        return super().forward(x) + x.sum(-1).gather(1, best)[..., None]


def test_decides_nothing_where_a_model_chooses_among_equal_numbers() -> None:
    assert _check(build=lambda: Chooses(-1.0))["ways"]["eager live"]["outcome"] == "ok"
    found = _check(build=lambda: Chooses(0.0))
    assert found["outcome"] == "host-cannot" and "equal numbers" in found["message"]


class _Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(SiteError("no", next_step="leave it"), "refused"), (KeyError("first"), "untyped")],
)
def test_classifies_the_errors_of_lorac(error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checking.lorac, "compile", compile)
    found = _check()["ways"]["eager live"]
    assert (found["outcome"], found["class"]) == (outcome, type(error).__name__)
    assert found["lines"][-1].startswith("tests/campaigns/test_zoo.py:") and "raise error" in found["lines"][-1]
    assert found.get("next") == getattr(error, "next_step", None)
    assert isinstance(error, LoracError) == (outcome == "refused")


def test_other_numbers_and_a_touched_host_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    compile = checking.lorac.compile
    assert _check()["ways"]["eager live"]["outcome"] == "ok"

    def weaker(*args: Any, **kwargs: Any) -> Any:
        compiled = compile(*args, **kwargs)
        compiled.swap({"a": 0.9})
        return compiled

    def touching(host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = compile(host, *args, **kwargs)
        next(host.parameters()).requires_grad_(True)
        return compiled

    for worse, message in ((weaker, "off by"), (touching, "flags")):
        monkeypatch.setattr(checking.lorac, "compile", worse)
        found = _check()["ways"]["eager live"]
        assert found["outcome"] == "wrong" and message in found["message"]


# --- shrinking -------------------------------------------------------------------------------------------------------


def test_shrinks_nested_configurations() -> None:
    from transformers import CLIPConfig, Qwen2Config

    config = shrinking.tiny(CLIPConfig())
    for part in (config.text_config, config.vision_config):
        assert (part.hidden_size, part.num_attention_heads, part.num_hidden_layers) == (32, 4, 2)
    assert config.text_config.vocab_size == 128
    given = Qwen2Config()
    text = shrinking.tiny(given, intermediate_size=40)
    assert (text.hidden_size, text.intermediate_size, len(text.layer_types)) == (32, 40, 2)
    assert given.hidden_size == Qwen2Config().hidden_size


def test_a_layer_of_every_kind_is_left() -> None:
    assert shrinking._list("layer_types", ["a", "a", "b", "a", "a", "b", "c"], 3) == ["a", "b", "c"]
    assert shrinking._number("image_token_id", 32000, 2) >= shrinking.SPECIAL
    assert shrinking._number("pad_token_id", 1, 2) == 1


def test_lists_the_layers_that_peft_adapts() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "dilated": nn.Conv2d(4, 6, 3, dilation=2),
            "named": nn.Conv2d(4, 6, 3, padding="same"),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    assert adapting.lora(model).target_modules == {"linear", "named", "attention"}
    assert adapting.lora(model, plain=True).target_modules == {"linear"}


# --- the journal -----------------------------------------------------------------------------------------------------


def _record(model: str, **changes: Any) -> dict[str, Any]:
    found = {"outcome": "ok", "seconds": 4.0}
    ways = {way: dict(found) for way in pages.WAYS}
    about = {"code": "c0de", "versions": {"torch": "2"}, "at": "2026-01-01", "plain": {"outcome": "ok", "seconds": 2.0}}
    return {"model": model, "family": model.partition("/")[0], "ways": ways, **about, **changes}


def _failing(model: str, message: str, outcome: str = "untyped") -> dict[str, Any]:
    failure = {"outcome": outcome, "class": "KeyError", "message": message, "lines": ["lorac/x.py:3: y[z]"]}
    return _record(model, ways={**{way: {"outcome": "ok", "seconds": 1.0} for way in pages.WAYS}, pages.LIVE: failure})


def test_the_newest_record_of_a_model_counts_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "zoo.jsonl"
    assert journal.read(path) == {}
    for record in (_record("a/x", code="old"), _record("a/y"), _record("a/x", code="new")):
        journal.append(path, record)
    with path.open("a") as file:
        file.write('{"model": "a/z", "wa')
    assert {name: record["code"] for name, record in journal.read(path).items()} == {"a/x": "new", "a/y": "c0de"}


def test_groups_failures_by_cause() -> None:
    records = [
        _failing("a/x", "no op for 'one.layer.3' of size 17"),
        _failing("a/y", "no op for 'other' of size 2.5"),
        _failing("a/z", "something else"),
        _record("a/w", outcome="host-cannot", **{"class": "ImportError", "message": "scipy", "lines": []}, ways={}),
    ]
    first, second = pages.found_causes(records)
    assert (first.models, first.ways) == ({"a/x", "a/y"}, {pages.LIVE})
    assert (second.models, second.message) == ({"a/z"}, "something else")
    assert "host-cannot" in pages.causes(records)


def test_lists_the_families_that_once_did_not_generate() -> None:
    forms = {form: {"outcome": "ok"} for form in FORMS}
    error = {"outcome": "refused", "class": "Unavailable", "message": "no op for 'x'", "lines": []}
    records = [
        _record("transformers/bamba", generation=forms, ways={}),
        _record("transformers/led", generation={**forms, "int4": error}, ways={}),
    ]
    text = pages.once_refused(records)
    assert "| bamba | answers otherwise where its text comes in parts | ok | ok | ok | ok | ok | ok |  |" in text
    assert "| led | the capture | ok | ok | ok | ok | refused | ok | Unavailable: no op for … |" in text
    assert "| dia | the capture | – |" in text
    names = {one.name for one in entries(["transformers/*"])}
    assert {f"transformers/{name}" for name in ONCE_REFUSED} <= names


def test_the_page_compares_counts_with_goals() -> None:
    records = [_record("a/x"), _failing("b/y", "k"), _record("b/z", outcome="peft-cannot", ways={})]
    records[2] |= {"class": "ValueError", "message": "m", "lines": []}
    records.append(_record("b/u", outcome=pages.NOT_RUN, ways={}))
    text = pages.page(records, {"b/v": "needs a GPU"})
    assert "3 models, 2 of which PEFT runs" in text
    assert "| untyped | 1 | 0 |" in text
    assert "| ONNX Runtime live, of what eager runs | 1 of 2 (50.0%) | 92 % |" in text
    assert "| a/x | 2.0 | 4.0 | 2.00 |" in text
    assert "| y | ok | untyped | ok | KeyError: k |" in text
    assert "| b/v | the zoo | needs a GPU |\n| b/z | PEFT | ValueError: m |" in text
    assert "\n## Not run\n\nb/u.\n" in text


def test_the_page_is_of_the_records_that_are_kept() -> None:
    assert (journal.ROOT / "docs" / "models.md").read_text() == pages.kept_page()


def test_keeps_generation_next_to_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, models = tmp_path / "models.jsonl", [Entry(f"a/{name}", "a", Pair, _call) for name in "xyz"]
    monkeypatch.setattr(journal, "KEPT", kept)
    monkeypatch.setattr(zoo, "entries", lambda: models)
    refused = {"outcome": "refused", "class": "Unavailable", "message": "no cache", "lines": []}
    forms = {form: {"outcome": "ok"} for form in generating.FORMS} | {"images": {"outcome": generating.NONE}}
    for name, found in (("a/x", forms), ("a/y", {**forms, "beams": refused})):
        journal.append(tmp_path / "one.jsonl", {"model": name, "family": "a", "generation": found})
    journal.append(tmp_path / "one.jsonl", _record("a/x"))
    zoo.main(["keep", "--journal", str(tmp_path / "one.jsonl")])
    found = journal.read(kept)
    assert found["a/x"] == {**_record("a/x"), "generation": forms}
    assert found["a/y"]["outcome"] == pages.NOT_RUN
    text = pages.page(found.values(), {})
    assert "| a | 2 | 2 of 2 | 2 of 2 | 2 of 2 | 1 of 2 | 2 of 2 | – | 1 |" in text
    assert "| y | ok | ok | ok | refused | ok | – | Unavailable: no cache |" in text


def test_keeps_further_targets_next_to_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, models = tmp_path / "models.jsonl", [Entry(f"a/{name}", "a", Pair, _call) for name in "xyz"]
    monkeypatch.setattr(journal, "KEPT", kept)
    monkeypatch.setattr(zoo, "entries", lambda: models)
    made = {"code": "c0de", "versions": {"openvino": "3"}, "at": "2026-01-02"}
    refused = {"outcome": "refused", "class": "Unavailable", "message": "no op 'x'", "lines": [], **made}
    blamed = {**refused, "outcome": "host-cannot"}
    one, other = pages.ENGINES
    for model, engines in (
        ("a/x", {one: {"outcome": "ok", **made}}),
        ("a/y", {one: refused}),
        ("a/x", {other: {"outcome": "ok", **made}}),
        ("a/z", {one: blamed}),
    ):
        journal.append(tmp_path / "one.jsonl", {"model": model, "family": "a", "engines": engines})
    journal.append(tmp_path / "one.jsonl", _record("a/x"))
    zoo.main(["keep", "--journal", str(tmp_path / "one.jsonl")])
    found = journal.read(kept)
    assert found["a/x"]["engines"].keys() == {*pages.ENGINES} and found["a/x"]["ways"] == _record("a/x")["ways"]
    text = pages.page(found.values(), {})
    assert "3 on openvino live, 1 on aoti live" in text and "openvino 3; 2026-01-02" in text
    assert "| a | 1 of 2 | 1 of 1 |\n| all | 1 of 2 | 1 of 1 |" in text
    assert "| y | refused | – | Unavailable: no op … |" in text
    assert zoo._has(found["a/x"], "c0de", [*pages.ENGINES]) and not zoo._has(found["a/y"], "c0de", [other])


def test_records_of_several_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of each model; models that left the zoo go, and those that were never run are named."""
    kept, models = tmp_path / "models.jsonl", [Entry(f"a/{name}", "a", Pair, _call) for name in "xyz"]
    monkeypatch.setattr(journal, "KEPT", kept)
    monkeypatch.setattr(zoo, "entries", lambda: models)
    for run, records in enumerate([[_record("a/x", code="old"), _record("a/gone")], [_record("a/x"), _record("a/y")]]):
        for record in records:
            journal.append(tmp_path / f"{run}.jsonl", record | {"peak": 17})
        zoo.main(["keep", "--journal", str(tmp_path / f"{run}.jsonl")])
    found = journal.read(kept)
    assert [*found] == ["a/x", "a/y", "a/z"]
    assert (found["a/x"], found["a/z"]["outcome"]) == (_record("a/x"), pages.NOT_RUN)


def test_does_not_count_a_way_that_did_not_run() -> None:
    partial = _record("a/x", ways={pages.EAGER: {"outcome": "ok", "seconds": 1.0}})
    text = pages.page([partial], {})
    assert "1 all right: x." in text
    assert "| ONNX Runtime live, of what eager runs | 0 of 0 | 92 % |" in text


def test_distinguishes_crashes_from_timeouts() -> None:
    assert running._ended("a/x", -9)["outcome"] == "timeout"
    assert running._ended("a/x", -24)["outcome"] == "timeout"
    assert running._ended("a/x", -11) == {
        "model": "a/x",
        "ways": {},
        "outcome": "untyped",
        "class": "process",
        "message": "ended by SIGSEGV",
        "lines": [],
    }
