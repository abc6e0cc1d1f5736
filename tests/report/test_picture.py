"""The page: what is drawn and folded, where it lies, what boxes say, and that names are shown and never run."""

from __future__ import annotations

import functools
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from torch import nn

import lorac
from lorac.report.dump import Dump, Row, dump
from lorac.report.picture import page as page_module
from lorac.report.picture.boxes import Box, build_boxes
from tests.captured import Stack, captured_stack

EVIL = "<script>alert('x')</script>&\"\N{BULLET}"
INPUTS = (torch.randn(2, 5, 10),)


class Tags(HTMLParser):
    """Tags that are open, what the page refers to, and the text of its elements with an id."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.boxes: dict[str, dict[str, str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.references += [value for name, value in told.items() if name in ("src", "href")]
        if "box" in told.get("class", "").split():
            self.boxes[told["id"]] = told
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> tuple[Tags, Any]:
    """The tags of a page, and the data of its script."""
    tags = Tags()
    tags.feed(text)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return tags, json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three blocks with a DoRA, a LoRA of a name that is code, both active, and a SHiRA that is not."""
    adapters = {
        "style": lorac.DoRA(r=3, targets=["query"]),
        EVIL: lorac.LoRA(r=2, targets=["key", "query"]),
        "thin": lorac.SHiRA(r=1, targets=["out"]),
    }
    compiled = lorac.compile(Stack(), adapters, active={"style": 1.0, EVIL: 0.5}, example_inputs=INPUTS)
    return compiled.graph.to_html(tmp_path_factory.mktemp("page") / "it.html").read_text(encoding="utf-8")


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_it_stands_alone(page: str) -> None:
    tags, _ = read(page)
    assert tags.open == []
    assert tags.references == [], "it needs no other file"
    assert "http" not in page.replace("http-equiv", "")
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.S), "every place of the template is filled"


def test_names_are_shown_and_never_run(page: str) -> None:
    """An adapter's name is a user's input: as text it is escaped, as data it cannot end the element it stands in."""
    assert EVIL not in page
    assert page.count("<script") == 2
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;•" in page
    _, data = read(page)
    assert EVIL in {term["adapter"] for site in data["sites"].values() for term in site["terms"]}


def test_the_summary_says_what_it_costs(page: str) -> None:
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert cards["model"] == "Stack"
    assert cards["runs"] == "eager, live"
    assert cards["sites"] == "9 adapted · 0 bare"
    dora, lora = (3 * (10 + 14) + 14) * 3, 2 * 2 * (10 + 14) * 3
    assert cards["adapters"].startswith(f"3, {dora + lora + 3 * 24} parameters")
    assert re.fullmatch(r"\+[\d.]+ kFLOP per token", cards["cost of what is active"])
    assert re.fullmatch(r"[\d.]+ kB", cards["memory of adapters"])


def test_every_adapted_site_is_marked_with_what_explain_says(page: str) -> None:
    tags, data = read(page)
    boxes = data["graphs"][0]["boxes"]
    marked = {site: n for n, box in enumerate(boxes) for site in box["sites"]}
    assert set(marked) == {f"body.layers.0.{leaf}" for leaf in ("query", "key", "out")}, "identical ones once"
    for number in marked.values():
        assert "adapted" in tags.boxes[f"g0b{number}"]["class"].split()
    assert "; style: low-rank r=3, live" in tags.boxes[f"g0b{marked['body.layers.0.query']}"]["aria-label"]
    (term,) = data["sites"]["body.layers.0.out"]["terms"]
    assert (term["state"], term["strength"]) == ("bound", 0.0)
    assert term["why"], "the reason why it is no cheaper"
    assert term["swap"].startswith("once ")
    assert all(term["means"] for site in data["sites"].values() for term in site["terms"])


def test_every_value_between_boxes_has_its_shape(page: str) -> None:
    _, data = read(page)
    boxes = data["graphs"][0]["boxes"][1:]
    assert all(kind for box in boxes for kind in [*box["gives"], *(kind for kind, _ in box["reads"])])
    assert all(box["reads"] or box["kind"] == "in" for box in boxes)
    (query,) = (box for box in boxes if box["title"] == "query")
    assert query["gives"] == ["f32[b, 5, 14]"]
    assert query["sources"], "and the line it is written at"


def test_each_level_has_the_rows_of_each_module(page: str) -> None:
    _, data = read(page)
    texts, graph = data["texts"], data["graphs"][0]
    assert [level["level"] for level in graph["levels"]] == ["host", "adapted", "expanded"]

    def rows(level: int, call: str) -> list[str]:
        pairs = zip(*[iter(graph["levels"][level]["groups"])] * 2, strict=True)
        found = [group for at, group in pairs if texts["calls"][at] == call]
        return [texts["lines"][line][0] for group in found for line in texts["groups"][group]]

    assert rows(0, "body.layers.2.key") == ["%key = linear %x, W.key[14, 10], b.key[14]"]
    assert any("+ style" in line for line in rows(1, "body.layers.1.query"))
    assert len(rows(2, "body.layers.0.query")) > 3


def test_a_graph_at_a_time(tmp_path: Path) -> None:
    adapters = {"a": lorac.LoRA(r=1, targets=["query", "down"])}
    models = {"one": Stack(), "two": Two()}
    inputs = {"one": INPUTS, "two": (torch.randn(3, 6),)}
    compiled = lorac.compile(models, adapters, example_inputs=inputs)
    _, data = read(compiled.graph.to_html(tmp_path / "all.html").read_text(encoding="utf-8"))
    assert [graph["name"] for graph in data["graphs"]] == ["one", "two"]
    marked = [
        [site for box in graph["boxes"] for site in box["sites"] if site in data["sites"]] for graph in data["graphs"]
    ]
    assert marked == [["one.body.layers.0.query"], ["two.down"]]
    alone = compiled.graph["two"].to_html(tmp_path / "two.html").read_text(encoding="utf-8")
    assert [graph["name"] for graph in read(alone)[1]["graphs"]] == ["two"]


class Two(nn.Module):
    """A linear, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(x)
        return y


def test_a_site_with_room_and_no_adapter_is_told_apart(tmp_path: Path) -> None:
    reserve = lorac.Reserve(targets=("out",), rank=2)
    compiled = lorac.compile(Stack(), [lorac.LoRA(r=1, targets=["key"])], reserve=reserve, example_inputs=INPUTS)
    text = compiled.graph.to_html(tmp_path / "it.html").read_text(encoding="utf-8")
    tags, data = read(text)
    boxes = enumerate(data["graphs"][0]["boxes"])
    words = {box["title"]: tags.boxes[f"g0b{n}"]["class"].split()[2:] for n, box in boxes if box["kind"] == "site"}
    assert words == {"key": ["adapted"], "out": ["reserved"], "query": ["bare"]}
    assert "3 adapted · 3 bare · 3 reserved" in text


@functools.cache
def stack(first_differs: bool = False) -> Dump:
    """Three blocks without adapters."""
    return dump(captured_stack(first_differs=first_differs))


# ── What is drawn ────────────────────────────────────────────────────────────────────────────────────────────────────
def folded(part: Box) -> dict[str, int]:
    """Boxes that stand for several -> for how many."""
    return {inner.call: len(inner.copies) + 1 for inner in part.all() if inner.copies}


def test_identical_layers_are_one_box() -> None:
    found = stack()
    assert folded(build_boxes(found, {})) == {"body.layers.0": 3}
    differs = {"body.layers.1.query": "another adapter"}
    assert folded(build_boxes(found, differs)) == {}
    assert folded(build_boxes(found, {"body.layers.0.query": "another"})) == {"body.layers.1": 2}


def test_calls_of_a_shared_layer_are_one_box() -> None:
    rows = [Row("in", "x", "", type="t")]
    for n, call in enumerate(("net.layer", "net.layer@1", "net.layer@2")):
        inner = call.replace("layer", "layer.norm")
        rows.append(Row("value", "norm", "relu \x00", (n,), "t", modules=("net", call, inner)))
    rows.append(Row("out", "", "\x00", (3,), "t"))
    assert folded(build_boxes(Dump("main", "host", tuple(rows)), {})) == {"net.layer": 3}


def test_a_first_layer_that_computes_more_is_drawn_alone() -> None:
    assert folded(build_boxes(stack(first_differs=True), {})) == {"body.layers.1": 2}


def test_layers_that_are_named_with_a_number_fold() -> None:
    """As torchvision's ViT has them, below ``encoder.layers.encoder_layer_0``; so do printed text and Graphviz's."""
    import torchvision  # type: ignore[import-untyped]

    model = torchvision.models.VisionTransformer(16, 8, 3, 2, 8, 16, num_classes=3).eval()
    adapters = {"a": lorac.LoRA(r=1, targets="all-linear")}
    graph = lorac.compile(model, adapters, example_inputs=(torch.randn(2, 3, 16, 16),)).graph["main"]
    root = build_boxes(graph.after("capture").dump, {})
    assert folded(root) == {"encoder.layers.encoder_layer_0": 3}
    assert "… x 2   encoder.layers.encoder_layer_1 … encoder.layers.encoder_layer_2" in str(graph)
    assert re.findall(r'"cluster_([^"]+)"', graph.to_dot()) == ["encoder.layers.encoder_layer_0"]


def test_a_site_without_a_call_of_its_own_is_marked_on_the_module_that_reads_it() -> None:
    rows = (
        Row("in", "x", "", type="f32[2]"),
        Row("value", "attn.mul", "mul \x00", (0,), "f32[2]", modules=("net", "net.attn")),
        Row("out", "", "\x00", (1,), "f32[2]"),
    )
    root = build_boxes(Dump("main", "host", rows), {"net.attn.in_proj": "something"})
    assert {part.call: part.sites for part in root.all() if part.sites} == {"net.attn": ("net.attn.in_proj",)}


def test_loose_operations_are_together_where_they_depend_on_the_same_modules() -> None:
    """x -> a -> neg -> add <- exp <- b <- x: neg and exp are boxes of their own; what nobody reads is none."""
    rows = (
        Row("in", "x", "", type="t"),
        Row("value", "a", "linear \x00", (0,), "t", modules=("a",), site="a"),
        Row("value", "neg", "neg \x00", (1,), "t"),
        Row("value", "abs", "abs \x00", (2,), "t"),
        Row("value", "b", "linear \x00", (0,), "t", modules=("b",), site="b"),
        Row("value", "exp", "exp \x00", (4,), "t"),
        Row("value", "add", "add \x00, \x00", (3, 5), "t"),
        Row("value", "dead", "mul \x00, \x00", (3, 5), "t"),
        Row("out", "", "\x00", (6,), "t"),
    )
    root = build_boxes(Dump("main", "host", rows), {})
    assert [part.title for part in root.parts] == ["x", "a", "neg · abs", "b", "exp", "add", "output"], "what is read"


# ── In a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")


def opened(path: Path, address: str = "") -> str:
    """The page as Chromium has it once its script has run; it may say nothing on the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [str(CHROMIUM), *flags, "--virtual-time-budget=4000", f"{path.as_uri()}{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "data-ready" in done.stdout, "its script has not come to its end"
    return done.stdout


def shown(text: str, identity: str) -> str:
    """The text of an element."""
    found = re.search(rf'id="{identity}"[^>]*>(.*?)</(?:aside|output|section)>', text, re.S)
    assert found is not None
    return html.unescape(re.sub(r"<[^>]+>", " ", found[1]))


@pytest.mark.slow
@browser
def test_the_script_finds_chooses_and_unfolds(page: str, tmp_path: Path) -> None:
    path = tmp_path / "it.html"
    path.write_text(page, encoding="utf-8")
    found = opened(path, f"#{urlencode({'find': EVIL})}")
    assert shown(found, "found").startswith("2 found")
    assert sorted(re.findall(r'class="box site adapted hit" [^>]*aria-label="(\w+)', found)) == ["key", "query"]
    chosen = opened(path, "#at=body.layers.2.query")
    details = shown(chosen, "details")
    assert "body.layers.2.query" in details and EVIL in details and "low-rank r=3" in details
    assert re.search(r'class="box site adapted chosen"[^>]*data-of="g0b\d+"', chosen), "in the copy of the third layer"
    assert all(f"{level}, after" in shown(chosen, "levels") for level in ("host", "adapted", "expanded"))
    loose = next(n for n, box in enumerate(read(page)[1]["graphs"][0]["boxes"]) if box["kind"] == "ops")
    assert "Operations" in shown(opened(path, f"#at=~{loose}"), "details")


@pytest.mark.slow
@browser
def test_the_script_places_boxes_as_the_page_does(page: str, tmp_path: Path) -> None:
    """Closed and opened again, everything lies where it lay: the rule is the same in both languages."""
    path = tmp_path / "it.html"
    again = "for (const id of ['close-all', 'open-all']) document.getElementById(id).click();"
    path.write_text(page.replace("</body>", f"<script>{again}</script></body>"), encoding="utf-8")
    places = re.compile(r'transform="(translate[^"]+)"|<path class="wire" d="([^"]+)"|<rect class="frame"[^>]*>')
    before, after = (places.findall(text) for text in (page, opened(path)))
    assert len(before) > 20
    assert before == after


class Frames(HTMLParser):
    """Where boxes lie: (those around, left, top, right, bottom) of each, as a browser has them."""

    def __init__(self) -> None:
        super().__init__()
        self.around: list[tuple[str, float, float] | None] = []
        self.found: dict[tuple[str, ...], tuple[float, float, float, float]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        boxes = [box for box in self.around if box is not None]
        if tag == "rect" and told.get("class") == "frame":
            left, top = sum(box[1] for box in boxes), sum(box[2] for box in boxes)
            path = tuple(box[0] for box in boxes)
            self.found[path] = (left, top, left + float(told["width"]), top + float(told["height"]))
        if tag == "g":
            moved = re.findall(r"-?[\d.]+", told.get("transform", ""))
            self.around.append((told["id"], float(moved[0]), float(moved[1])) if moved else None)

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self.around.pop()


@pytest.mark.slow
@browser
def test_what_is_opened_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was closed as too tall is opened: neighbours step aside, and what is around grows."""
    monkeypatch.setattr(page_module, "_MAX_HEIGHT", 100.0)
    compiled = lorac.compile(Stack(True), {"a": lorac.LoRA(r=2, targets=["key"])}, example_inputs=INPUTS)
    path = compiled.graph.to_html(tmp_path / "it.html")
    click = "<script>document.getElementById('open-all').click();</script></body>"
    text = path.read_text(encoding="utf-8")
    assert 'class="box module closed"' in text
    path.write_text(text.replace("</body>", click), encoding="utf-8")
    frames = Frames()
    frames.feed(opened(path))
    assert len(frames.found) > 15
    for (one, a), (other, b) in itertools.combinations(frames.found.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        within = any(inner[: len(outer)] == outer for inner, outer in ((one, other), (other, one)))
        assert apart or within, (one, other)
    for path_, frame in frames.found.items():
        around = frames.found.get(path_[:-1], frame)
        assert around[0] <= frame[0] and frame[2] <= around[2] and around[1] <= frame[1] and frame[3] <= around[3]
