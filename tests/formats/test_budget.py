"""A file that asks for disproportionate time or memory is refused before it gets either."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac import context_values
from lorac import limits as spending
from lorac.formats.reading import AdapterFile
from lorac.ir.sites.patterns import match_pattern
from lorac.storage.strict_json import parse_json
from tests.limits import within_budget
from tests.peft_files import CONFIG, WEIGHTS, change_tensors, configure, save_small
from tests.refusing import refuses
from tests.runtime.interrupts import interrupted
from tests.zoo import ZOO

ENDLESS = "((?:up){65000}){65000}"
MODEL = ZOO["plain_mlp"].model
HUGE = (10**7, 2**31 - 1, 2**31, 2**62)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a LoRA as PEFT saves it."""
    adapter = lorac.compile(MODEL(), {"a": lorac.LoRA(r=2, targets=["up", "down"])}).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a", model=MODEL())
    weights = tmp_path / "a" / WEIGHTS
    save_file(load_file(weights), weights)  # without the seal
    return tmp_path / "a"


def refuse(folder: Path, kinds: type[Exception] | tuple[type[Exception], ...], match: str | None = None) -> None:
    """Assert that a folder is refused with and without the model, in time."""
    for model in (None, MODEL()):
        with within_budget(), pytest.raises(kinds, match=match):
            lorac.load_adapter(folder, model)


def pickled(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Move the tensors to a .bin file, after a change."""
    tensors: dict[str, Any] = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")


# ── Tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
UP = "base_model.model.up.lora_A.weight"


@pytest.mark.parametrize(
    ("strange", "match"),
    [
        (torch.ones(1).expand(40_000, 40_000), r"is torch.float32 \(40000, 40000\), but has 4 bytes"),
        (torch.ones(2, 10, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.ones(2, 10).to_sparse(), "_rebuild_sparse_tensor"),
        (bytearray(10), "bytearray"),
        ([torch.ones(2, 10)], "is not a dense tensor"),
    ],
    ids=["expanded", "meta", "sparse", "bytes", "list"],
)
def test_tensors_that_do_not_lie_in_the_file(folder: Path, strange: Any, match: str) -> None:
    pickled(folder, lambda tensors: tensors.update({UP: strange}))
    refuse(folder, lorac.FormatError, match)


def test_storages_larger_than_the_file(folder: Path) -> None:
    """Many views of one storage would each become a tensor of its own."""
    one = torch.ones(1 << 22)
    pickled(folder, lambda tensors: tensors.update({f"x{i}": one[i:] for i in range(40)}))
    with within_budget(), refuses("over_budget", match="its tensors are larger than the file"):
        lorac.load_adapter(folder)


def test_a_view_under_two_names_is_one_tensor(folder: Path) -> None:
    pickled(folder, lambda tensors: tensors.update({UP.replace("up", "down"): tensors[UP].t().t()}))
    found = AdapterFile(folder / "adapter_model.bin").read_tensors()
    assert found[UP] is found[UP.replace("up", "down")]


def packed(write: Callable[[zipfile.ZipFile], None]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        write(archive)
    return written.getvalue()


def _one_large(archive: zipfile.ZipFile) -> None:
    with archive.open("archive/data.pkl", "w") as member:
        for _ in range(300):
            member.write(b"\x80\x02" + bytes(1 << 20))


def _many_steps(archive: zipfile.ZipFile) -> None:
    archive.writestr("archive/data.pkl", b"\x80\x02}" + b"]0" * 600_000 + b".")


def _two_pickles(archive: zipfile.ZipFile) -> None:
    archive.writestr("archive/data.pkl", b"\x80\x02}.")
    archive.writestr("other/data.pkl", b"\x80\x02}.")


@pytest.mark.medium(
    "a bomb of one large member; the two other bombs", cases=["_many_steps-*", "_one_large-it is packed"]
)
@pytest.mark.parametrize(
    ("write", "match"),
    [
        (_one_large, "it is packed"),
        (_many_steps, "takes more than 1000000 steps"),
        (_two_pickles, "2 members called data.pkl"),
        (lambda archive: None, "0 members called data.pkl"),
    ],
)
def test_bombs(folder: Path, write: Callable[[zipfile.ZipFile], None], match: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(packed(write))
    refuse(folder, (lorac.FormatError), match)


def test_a_directory_of_a_million_files_is_not_read(folder: Path) -> None:
    """The end of the file states the number; nothing is allocated for each before it is known."""
    content = bytearray(packed(_two_pickles))
    at = content.rfind(b"PK\5\6")
    content[at + 8 : at + 12] = b"\xff\xff\xff\xff"
    content[at:at] = b"PK\6\6" + bytes(28) + (10**6).to_bytes(8, "little") + bytes(36)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    refuse(folder, lorac.FormatError, "its directory")


def test_groups_that_make_a_matrix_of_gigabytes(folder: Path) -> None:
    """The factor of a grouped convolution is one matrix in lorac, and blocks in its file."""
    rank = 60_000
    change_tensors(
        folder, {"model.up.lora_A.weight": torch.ones(rank, 1, 1), "model.up.lora_B.weight": torch.ones(rank, 1, 1)}
    )
    change_tensors(folder, {f"model.down.lora_{x}.weight": None for x in "AB"})
    configure(folder, r=rank, target_modules=["up"])
    refuse(folder, lorac.FormatError, "groups as one matrix")


def test_names_that_patterns_would_be_matched_against(folder: Path) -> None:
    change_tensors(folder, {"model." + "up." * 1000 + "lora_A.weight": torch.ones(2, 10)})
    refuse(folder, lorac.FormatError, "more than 1000")


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_configuration_of_gigabytes_of_nothing(folder: Path) -> None:
    os.truncate(folder / CONFIG, 3 << 30)
    refuse(folder, lorac.FormatError, "its JSON")


def test_a_header_of_gigabytes_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 3 << 30)
    with within_budget(), pytest.raises(lorac.LoracError):
        lorac.load_adapter(path)


@pytest.mark.parametrize("text", ["[" + "[]," * 6_000_000 + "0]", '{"a":' * 5_000_000])
def test_very_many_values(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with within_budget(), pytest.raises(lorac.FormatError):
        lorac.load_adapter(folder)


@pytest.mark.parametrize("text", ["1" + "0" * 400, "-1e400", "[" * 150 + "]" * 150, "NaN", "1" * 100_000])
def test_numbers_and_depths_of_other_planets(folder: Path, text: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for field in ("lora_alpha", "alpha_pattern", "base_model_name_or_path"):
        changed = json.dumps({**config, field: "@"}).replace('"@"', text)
        (folder / CONFIG).write_text(changed)
        refuse(folder, lorac.FormatError, "not JSON")


# ── Patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "pattern",
    [ENDLESS, "|".join(f"layer{i}" for i in range(20_000)), "a{1000}" * 1000, "(?:" * 4000 + "up" + ")" * 4000],
    ids=["repeats of repeats", "alternatives", "repeats", "nesting"],
)
def test_patterns_that_take_long_to_compile(folder: Path, pattern: str) -> None:
    for field, value in (("target_modules", pattern), ("rank_pattern", {pattern: 2}), ("exclude_modules", pattern)):
        configure(
            folder, **{"target_modules": ["up", "down"], "rank_pattern": {}, "exclude_modules": None, field: value}
        )
        refuse(folder, (lorac.FormatError))


def test_limits_the_repetitions_of_a_pattern() -> None:
    assert match_pattern(r"layers\.\d{1,3}\.up", "layers.12.up")
    assert match_pattern(r"(?:a{100}){100}", "a" * 10_000)
    assert match_pattern(r"x{}\{3\}", "x{}{3}")
    with refuses("pattern_too_slow", match="repeats up to 10201 times"):
        match_pattern(r"(?:a{101}){101}", "a")


@pytest.mark.medium("test_peft_strict.py: one field whose pattern backtracks without end")
def test_patterns_share_the_time_of_their_file(folder: Path) -> None:
    """Each alone is in time on every path; two thousand are not."""
    configure(folder, rank_pattern={f"(.|..){{12}}x{i}y": 2 for i in range(2000)})
    with lorac.budget(seconds=0.01):
        refuse(folder, lorac.FormatError, "takes longer than 0.01 s")

    def match_for_ever() -> None:
        while True:
            match_pattern("((.|..)+)+", "abcdefgh")

    with within_budget(), refuses("over_budget"):
        spending.charge_reading(folder, match_for_ever)


# ── Hyper-parameters ─────────────────────────────────────────────────────────────────────────────────────────────────
TOLD_BY_TENSORS = {
    ("OFT", "num_cayley_neumann_terms"),
    ("LOKR", "decompose_factor"),
    ("BOFT", "boft_n_butterfly_factor"),
}
"""Numbers that the tensors tell, or that cost nothing: the configuration's is not acted on."""


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize(
    ("kind", "field", "settings"),
    [
        ("LORA", "r", {}),
        ("OFT", "r", {"oft_block_size": 0}),
        ("OFT", "oft_block_size", {}),
        ("OFT", "r", {"oft_block_size": 0, "block_share": True}),
        ("OFT", "num_cayley_neumann_terms", {}),
        ("BOFT", "boft_block_size", {}),
        ("BOFT", "boft_n_butterfly_factor", {}),
        ("VERA", "r", {"save_projection": False}),
        ("RANDLORA", "r", {"save_projection": False}),
        ("VBLORA", "num_vectors", {}),
        ("VBLORA", "vector_length", {}),
        ("FOURIERFT", "n_frequency", {}),
        ("WAVEFT", "n_frequency", {}),
        ("DEFT", "r", {}),
        ("PEANUT", "r", {}),
        ("PEANUT", "depth", {}),
        ("PSOFT", "r", {}),
        ("PSOFT", "num_cayley_neumann_terms", {"use_cayley_neumann": True}),
        ("PSOFT", "psoft_svd_lowrank_niter", {"psoft_svd": "lowrank"}),
        ("TINYLORA", "r", {}),
        ("TINYLORA", "u", {}),
        ("UNILORA", "r", {}),
        ("UNILORA", "theta_d_length", {}),
        ("HRA", "r", {}),
        ("SHIRA", "r", {}),
        ("LOKR", "decompose_factor", {}),
    ],
)
def test_hyper_parameters_are_compared_with_the_tensors(
    kind: str, field: str, settings: dict[str, Any], size: int, peft_files: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(peft_files(kind), tmp_path / "it")
    drawn = settings.get("save_projection") is False  # what all sites share lies right below base_model then
    stored = load_file(folder / WEIGHTS)
    save_file({key: t for key, t in stored.items() if not drawn or key.count(".") > 1}, folder / WEIGHTS)
    configure(folder, **settings, **{field: size})
    for model in (None, MODEL()):
        with within_budget():
            try:
                lorac.load_adapter(folder, model)
            except lorac.LoracError:
                continue
            assert (kind, field) in TOLD_BY_TENSORS or model is None


def test_rejects_a_factor_without_values_in_time(peft_files: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(peft_files("LOKR"), tmp_path / "it")
    change_tensors(folder, {"model.up.lokr_w2_a": torch.zeros(7, 0), "model.up.lokr_w2_b": torch.zeros(0, 1 << 40)})
    change_tensors(folder, {"model.up.lokr_w1": torch.zeros(1, 1)})
    with within_budget(), refuses("shape_mismatch", match="'up' do not belong together"):
        lorac.load_adapter(folder)


def test_millions_of_positions_are_checked_in_time(peft_files: Callable[[str], Path], tmp_path: Path) -> None:
    """They are distinct and within their bounds, which sorting whole columns would take five seconds to tell."""
    folder = copied(peft_files("UNILORA"), tmp_path / "it")
    widths = sum(site.in_features + site.out_features for site in lorac.sites(MODEL()).values())
    configure(folder, r=spending.ReadBudget().bytes // 32 // widths - 1)
    with within_budget():
        lorac.load_adapter(folder, MODEL())


@pytest.fixture(scope="module")
def peft_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a checkpoint of a PEFT type, once."""
    found: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in found:
            found[kind] = save_small(tmp_path_factory.mktemp(kind) / "it", kind)
        return found[kind]

    return make


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# ── The setting ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_budget_is_a_setting() -> None:
    text = "[" + "0," * 10_000 + "0]"
    with lorac.budget(bytes=1000), refuses("over_budget", match=r"lorac\.budget\(bytes=…\)"):
        parse_json(text, lorac.ArtifactError)
    with lorac.budget(bytes=1 << 20) as budget:
        assert (budget.seconds, budget.bytes) == (2.0, 1 << 20)
        parse_json(text, lorac.ArtifactError)
        with lorac.budget(seconds=9.0) as inner:
            assert (inner.seconds, inner.bytes) == (9.0, 1 << 20)


def test_time_that_grows_with_the_tensors_is_not_counted(tmp_path: Path) -> None:
    def read() -> None:
        with spending.pause_clock():
            spending.check_time()
        with refuses("over_budget", match=r"lorac\.budget\(seconds=…\)"):
            sum(range(10_000))
            spending.check_time()

    with lorac.budget(seconds=0.0):
        spending.charge_reading(tmp_path, read)
    spending.check_time()  # nothing is read


def test_memory_is_added_up(tmp_path: Path) -> None:
    def read() -> None:
        spending.claim_memory(200 << 20, "one")
        with refuses("over_budget", match=r"would take more than 256 MiB beyond its size: another, \d+ bytes"):
            spending.claim_memory(100 << 20, "another")

    spending.charge_reading(tmp_path, read)


def test_files_that_a_file_names_are_charged_to_its_account() -> None:
    """Else a folder of many experts would cost many times what one file may."""

    def claim() -> None:
        spending.claim_memory(400, "a part")

    def read() -> None:
        for inner in ("first", "second"):
            spending.charge_reading(inner, claim)
        with refuses("over_budget", match="'outer' would take more"):
            spending.charge_reading("third", claim)

    with lorac.budget(bytes=1000):
        spending.charge_reading("outer", read)


def test_after_an_interrupt_nothing_is_charged_to_the_file_any_more() -> None:
    runs = 0
    with lorac.budget(seconds=0.0):
        for _ in interrupted(
            lambda: spending.charge_reading("a file", object), where=(spending.__file__, context_values.__file__)
        ):
            sum(range(10_000))
            spending.check_time()  # nothing is read
            runs += 1
    assert runs > 5
