"""Which modules a pattern names: PEFT's own functions are the oracle, on random paths."""

import hashlib
import threading
import time

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.sites import patterns
from lorac.ir.sites.patterns import find_first_pattern, match_pattern, select_sites
from tests.refusing import refuses

WORDS = st.sampled_from(["layers", "h", "mlp", "q_proj", "k_proj", "xq_proj", "experts", "attn", "0", "1", "2", "11"])
PATHS = st.lists(WORDS, min_size=1, max_size=7).map(".".join)
SUFFIXES = st.sampled_from(["q_proj", "proj", "attn.q_proj", "mlp", "k_proj", "layers.1.q_proj", "0", "experts.0.mlp"])
EXPRESSIONS = st.sampled_from(
    [
        r".*q_proj",
        r".*\.(q|k)_proj",
        r"layers\.[01]\..*",
        "q_proj",
        r".*layers\.\d+\.mlp",
        r"(h|layers)\..*",
        r".*\.1\b.*",
    ]
)


def site(path):
    return Site(path, SiteKind.LINEAR, 3, 2, torch.float32, f"{path}.weight")


@given(
    paths=st.lists(PATHS, min_size=1, max_size=6),
    targets=EXPRESSIONS | st.lists(SUFFIXES | PATHS, min_size=1, max_size=3),
    exclude=st.none() | EXPRESSIONS | st.lists(SUFFIXES, max_size=2),
    layers=st.none() | st.lists(st.sampled_from([0, 1, 11]), max_size=2),
    layers_pattern=st.none() | st.sampled_from([["layers"], ["h"], ["h", "experts"]]),
    saved=st.none() | st.lists(st.sampled_from(["mlp", "attn", "k_proj", "layers.1"]), max_size=2),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_select_is_pefts(paths, targets, exclude, layers, layers_pattern, saved):
    if isinstance(targets, str):
        layers = layers_pattern = None  # PEFT's config refuses them beside an expression
    if not layers:
        layers_pattern = None
    config = LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        modules_to_save=saved,
    )
    expected = [path for path in dict.fromkeys(paths) if check_target_module_exists(config, path)]
    found = select_sites(
        {path: site(path) for path in paths},
        targets,
        exclude=exclude or (),
        layers=layers or (),
        layers_pattern=layers_pattern or (),
        saved=saved or (),
    )
    assert [s.path for s in found] == expected


@given(
    path=PATHS,
    patterns=st.lists(SUFFIXES | st.sampled_from([r"q_proj", r"layers\.[01]\..*", r"^mlp", r".*\.k_proj"]), max_size=4),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_first_match_is_pefts(path, patterns):
    # PEFT answers with the path itself where no pattern matches.
    assert find_first_pattern(patterns, path) == next((p for p in patterns if get_pattern_key([p], path) == p), None)


def test_the_first_of_several_patterns_wins():
    variant = lorac.LoRA(
        r=4, rank_pattern={"q_proj": 1, r"layers\.0\.q_proj": 2}, alpha_pattern={r"layers\.\d+\.q_proj": 3}
    )
    at = variant.at(site("model.layers.0.q_proj"))
    assert (at.r, at.alpha) == (1, 3)
    assert variant.at(site("model.q_proj_b")) is variant


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*a){20}$"])
def test_a_pattern_that_backtracks_without_end_is_stopped(pattern):
    started = time.monotonic()
    with refuses("pattern_too_slow", match="did not finish"):
        match_pattern(pattern, "a" * 50_000 + "b")
    assert time.monotonic() - started < 30


def test_the_time_of_other_threads_does_not_count(monkeypatch):
    class Busy:
        """A pattern in a process whose other threads use up the first tenth of a second of the engine's clock."""

        def fullmatch(self, path, timeout):
            if timeout <= patterns.TIMEOUT_SECONDS:
                raise TimeoutError
            return regex.fullmatch(".*proj", path)

    monkeypatch.setattr(patterns, "_compile", lambda _: Busy())
    assert match_pattern(".*proj", "layers.0.q_proj") is not None


def test_the_engines_clock_runs_with_all_threads():
    """``_match_in_time`` relies on it; if it fails, the engine counts one thread alone and the second try can go."""
    stop, block = threading.Event(), bytes(1 << 24)

    def work():
        while not stop.is_set():
            hashlib.sha256(block).digest()

    others = [threading.Thread(target=work) for _ in range(3)]
    for other in others:
        other.start()
    begun = time.thread_time()
    with pytest.raises(TimeoutError):
        regex.compile("(a|aa)+$").fullmatch("a" * 50_000 + "b", timeout=0.3)
    own = time.thread_time() - begun
    stop.set()
    for other in others:
        other.join()
    assert own < 0.3


def test_compile_rejects_a_pattern_that_backtracks():
    model = nn.ModuleDict({"a" * 5000 + "b": nn.Linear(3, 2)})
    with refuses("pattern_too_slow", match="write the module names out"):
        lorac.compile(model, {"x": lorac.LoRA(targets=r"(.*a){20}$")})


def test_a_broken_pattern_is_a_typed_error():
    with pytest.raises(lorac.FormatError, match="not a regular expression"):
        match_pattern("(q_proj", "q_proj")


def test_all_linear_leaves_the_output_layer_out():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "lm_head": nn.Linear(3, 5), "embed": nn.Embedding(5, 3)})
    assert [s.path for s in select_sites(lorac.sites(model), "all-linear")] == ["body"]
    assert [s.path for s in select_sites(lorac.sites(model), "all-linear", heads=["body"])] == []


def test_all_conv_selects_convolutions_and_empty_keywords_are_rejected():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "line": nn.Conv1d(4, 4, 1), "norm": nn.BatchNorm2d(4)})
    assert [s.path for s in select_sites(lorac.sites(model), "all-conv")] == ["stem", "line"]
    assert [s.path for s in select_sites(lorac.sites(model), "all-conv", exclude=["stem"])] == ["line"]
    assert list(lorac.compile(model, {"a": lorac.LoRA(r=2, targets="all-conv")}).plans) == ["stem", "line"]
    for compiling in (
        lambda: lorac.compile(model, {"a": lorac.LoRA()}),
        lambda: lorac.compile(model, reserve=lorac.Reserve(rank=2)),
    ):
        with refuses("site_not_found", match="targets 'all-linear', and the model has no such site") as caught:
            compiling()
        assert caught.value.nearest == "all-conv (2 sites)"


def test_an_attentions_name_selects_its_weights():
    """As PEFT's target of an nn.MultiheadAttention means its output layer too."""
    sites = lorac.sites(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "line": nn.Linear(4, 4)}))
    assert [s.path for s in select_sites(sites, ["attn"])] == ["attn", "attn.out_proj"]
    assert [s.path for s in select_sites(sites, "attn")] == ["attn", "attn.out_proj"]
    assert [s.path for s in select_sites(sites, ["out_proj"])] == ["attn.out_proj"]
    assert [s.path for s in select_sites(sites, ["attn"], exclude=["out_proj"])] == ["attn"]
    assert [s.path for s in select_sites(sites, "all-linear")] == ["attn", "attn.out_proj", "line"]


def test_rejects_unmatched_patterns_and_names_the_nearest():
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 96), "down": nn.Linear(3, 2)})
    with refuses("site_not_found") as caught:
        lorac.compile(model, {"style": lorac.LoRA(targets=("q_prj",))})
    assert "adapter 'style' targets 'q_prj', which matches no site" in str(caught.value)
    assert "nearest: q_proj (1 sites, linear 64 -> 96)" in str(caught.value)
