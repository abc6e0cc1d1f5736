"""The page: boxes and their places, details, search, and names that are shown and never run."""

from __future__ import annotations

import functools
import html
import itertools
import json
import random
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
from lorac.report.picture.boxes import Box, build_boxes
from tests.captured import Stack, captured_stack

EVIL = "<script>alert('x')</script>&\"\N{BULLET}"
INPUTS = (torch.randn(2, 5, 10),)


class Tags(HTMLParser):
    """The tags that are open, and the files that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_data(text: str) -> Any:
    """The data of a page's script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


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
def test_the_page_needs_no_other_file(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.references == [], "it needs no other file"
    assert "http" not in page
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.S), "every place of the template is filled"


def test_the_licence_of_the_vendored_library_is_in_the_page(page: str) -> None:
    assert "Permission is hereby granted" in page


def test_names_are_shown_and_never_run(page: str) -> None:
    """An adapter's name is a user's input: as text it is escaped, as data it cannot end the element it stands in."""
    assert EVIL not in page
    assert page.count("<script") == 3
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;•" in page
    assert EVIL in {term["adapter"] for site in read_data(page)["sites"].values() for term in site["terms"]}


def test_the_summary_gives_parameters_and_flops(page: str) -> None:
    assert "<h1>Stack · eager, live</h1>" in page
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert cards["sites"] == "9 adapted · 0 bare"
    dora, lora = (3 * (10 + 14) + 14) * 3, 2 * 2 * (10 + 14) * 3
    assert cards["adapters"].startswith(f"3, {dora + lora + 3 * 24} parameters")
    assert re.fullmatch(r"\+[\d.]+ kFLOP per token", cards["cost of the active adapters"])
    assert re.fullmatch(r"[\d.]+ kB", cards["memory of adapters"])


def test_boxes_hold_all_adapted_sites_with_their_terms(page: str) -> None:
    data = read_data(page)
    marked = [site for box in data["graphs"][0]["boxes"] for site in box["sites"]]
    assert sorted(marked) == [f"body.layers.0.{leaf}" for leaf in ("key", "out", "query")], "identical ones once"
    assert all(data["sites"][site]["terms"] for site in marked)
    terms = data["sites"]["body.layers.0.query"]["terms"]
    assert ("style", "low-rank r=3", "live", 1.0) in [
        (t["adapter"], t["form"], t["state"], t["strength"]) for t in terms
    ]
    (term,) = data["sites"]["body.layers.0.out"]["terms"]
    assert (term["state"], term["strength"]) == ("bound", 0.0)
    assert term["why"], "the reason why it is not cheaper"
    assert term["swap"].startswith("once ")
    assert all(term["means"] for site in data["sites"].values() for term in site["terms"])


def test_every_value_between_boxes_has_its_shape(page: str) -> None:
    graph = read_data(page)["graphs"][0]
    boxes, links = graph["boxes"], [link for box in graph["boxes"] for link in box["links"]]
    assert all(graph["types"][str(value)] for value, _, _ in links)
    read = {target for _, _, target in links}
    assert all(number in read or box["kind"] == "in" for number, box in enumerate(boxes) if number)
    (number,) = (number for number, box in enumerate(boxes) if box["title"] == "query")
    assert {graph["types"][str(value)] for value, source, _ in links if source == number} == {"f32[b, 5, 14]"}
    assert boxes[number]["sources"], "and the line it is written at"


def test_each_level_has_the_rows_of_each_module(page: str) -> None:
    data = read_data(page)
    texts, graph = data["texts"], data["graphs"][0]
    assert [level["level"] for level in graph["levels"]] == ["host", "adapted", "expanded"]

    def rows(level: int, call: str) -> list[str]:
        pairs = zip(*[iter(graph["levels"][level]["pairs"])] * 2, strict=True)
        found = [group for at, group in pairs if texts["modules"][at] == call]
        return [texts["lines"][line][0] for group in found for line in texts["groups"][group]]

    assert rows(0, "body.layers.2.key") == ["%key = linear %x, W.key[14, 10], b.key[14]"]
    assert any("+ style" in line for line in rows(1, "body.layers.1.query"))
    assert len(rows(2, "body.layers.0.query")) > 3


@pytest.mark.medium("test_the_page_needs_no_other_file")
def test_a_page_of_several_graphs(tmp_path: Path) -> None:
    adapters = {"a": lorac.LoRA(r=1, targets=["query", "down"])}
    models = {"one": Stack(), "two": Two()}
    inputs = {"one": INPUTS, "two": (torch.randn(3, 6),)}
    compiled = lorac.compile(models, adapters, example_inputs=inputs)
    data = read_data(compiled.graph.to_html(tmp_path / "all.html").read_text(encoding="utf-8"))
    assert [graph["name"] for graph in data["graphs"]] == ["one", "two"]
    marked = [
        [site for box in graph["boxes"] for site in box["sites"] if site in data["sites"]] for graph in data["graphs"]
    ]
    assert marked == [["one.body.layers.0.query"], ["two.down"]]
    alone = compiled.graph["two"].to_html(tmp_path / "two.html").read_text(encoding="utf-8")
    assert [graph["name"] for graph in read_data(alone)["graphs"]] == ["two"]


class Two(nn.Module):
    """A linear, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(x)
        return y


@pytest.fixture(scope="module")
def reserved_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sites with an adapter, with reserved slots, and without either."""
    reserve = lorac.Reserve(targets=("out",), rank=2)
    compiled = lorac.compile(Stack(), [lorac.LoRA(r=1, targets=["key"])], reserve=reserve, example_inputs=INPUTS)
    return compiled.graph.to_html(tmp_path_factory.mktemp("page") / "it.html").read_text(encoding="utf-8")


def test_a_site_with_reserved_slots_and_no_adapter_is_distinct(reserved_page: str) -> None:
    sites = read_data(reserved_page)["sites"]
    assert "3 adapted · 3 bare · 3 reserved" in reserved_page
    assert sites["body.layers.0.key"]["terms"] and "body.layers.0.query" not in sites
    assert not sites["body.layers.0.out"]["terms"] and "reserved" in sites["body.layers.0.out"]["note"]


@functools.cache
def stack(first_differs: bool = False) -> Dump:
    """Three blocks without adapters."""
    return dump(captured_stack(first_differs=first_differs))


# ── What is drawn ────────────────────────────────────────────────────────────────────────────────────────────────────
def folded(root: Box) -> dict[str, int]:
    """Boxes that stand for several -> for how many."""
    return {inner.call: len(inner.copies) + 1 for inner in root.all() if inner.copies}


def test_folds_identical_layers_into_one_box() -> None:
    found = stack()
    assert folded(build_boxes(found, {})) == {"body.layers.0": 3}
    differs = {"body.layers.1.query": "another adapter"}
    assert folded(build_boxes(found, differs)) == {}
    assert folded(build_boxes(found, {"body.layers.0.query": "another"})) == {"body.layers.1": 2}


def test_folds_calls_of_a_shared_layer_into_one_box() -> None:
    rows = [Row("in", "x", "", type="t")]
    for n, call in enumerate(("net.layer", "net.layer@1", "net.layer@2")):
        inner = call.replace("layer", "layer.norm")
        rows.append(Row("value", "norm", "relu \x00", (n,), "t", modules=("net", call, inner)))
    rows.append(Row("out", "", "\x00", (3,), "t"))
    assert folded(build_boxes(Dump("main", "host", tuple(rows)), {})) == {"net.layer": 3}


def test_a_first_layer_that_computes_more_is_drawn_alone() -> None:
    assert folded(build_boxes(stack(first_differs=True), {})) == {"body.layers.1": 2}


@pytest.mark.medium("test_folds_identical_layers_into_one_box")
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


def test_marks_a_site_without_a_call_on_its_module() -> None:
    rows = (
        Row("in", "x", "", type="f32[2]"),
        Row("value", "attn.mul", "mul \x00", (0,), "f32[2]", modules=("net", "net.attn")),
        Row("out", "", "\x00", (1,), "f32[2]"),
    )
    root = build_boxes(Dump("main", "host", rows), {"net.attn.in_proj": "something"})
    assert {part.call: part.sites for part in root.all() if part.sites} == {"net.attn": ("net.attn.in_proj",)}


def test_loose_operations_are_together_where_they_depend_on_the_same_modules() -> None:
    """x -> a -> neg -> add <- exp <- b <- x: neg and exp are separate boxes; unread rows are not drawn."""
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
    assert "style: low-rank r=3, live" in found
    chosen = opened(path, "#at=body.layers.2.query")
    details = shown(chosen, "details")
    assert "body.layers.2.query" in details and EVIL in details and "low-rank r=3" in details
    assert re.search(r'class="box site adapted chosen"[^>]*data-path="body.layers.2.query"', chosen), (
        "in the third layer"
    )
    assert all(f"{level}, after" in shown(chosen, "levels") for level in ("host", "adapted", "expanded"))
    loose = next(n for n, box in enumerate(read_data(page)["graphs"][0]["boxes"]) if box["kind"] == "ops")
    assert "Operations" in shown(opened(path, f"#at=~{loose}"), "details")


@pytest.mark.slow
@browser
def test_boxes_are_marked_adapted_reserved_or_bare(reserved_page: str, tmp_path: Path) -> None:
    path = tmp_path / "it.html"
    path.write_text(reserved_page, encoding="utf-8")
    found = re.findall(r'class="box site (\w+)"[^>]*aria-label="(\w+)', opened(path))
    assert dict((name, kind) for kind, name in found) == {"key": "adapted", "out": "reserved", "query": "bare"}


class Frames(HTMLParser):
    """The rectangle (left, top, right, bottom) of each box, by the boxes around it; the labels of values."""

    def __init__(self) -> None:
        super().__init__()
        self.around: list[tuple[str, float, float] | None] = []
        self.found: dict[tuple[str, ...], tuple[float, float, float, float]] = {}
        self.labels: dict[tuple[str, ...], list[tuple[float, float]]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        boxes = [box for box in self.around if box is not None]
        left, top = sum(box[1] for box in boxes), sum(box[2] for box in boxes)
        path = tuple(box[0] for box in boxes)
        if tag == "rect" and values.get("class") == "frame":
            self.found[path] = (left, top, left + float(values["width"]), top + float(values["height"]))
        if tag == "text" and values.get("class") == "shape":
            self.labels.setdefault(path, []).append((left + float(values["x"]), top + float(values["y"])))
        if tag == "g":
            moved = re.findall(r"-?[\d.]+", values.get("transform", ""))
            name = f"{values.get('data-box')} {values.get('data-path')}"
            self.around.append((name, float(moved[0]), float(moved[1])) if moved else None)

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self.around.pop()

    def check(self) -> None:
        """Neighbours are apart, what is inside is inside, and no label lies on a box next to it."""
        for path, (left, top, right, bottom) in self.found.items():
            outer = self.found.get(path[:-1])
            if outer is not None:
                assert outer[0] <= left and right <= outer[2] and outer[1] <= top and bottom <= outer[3], path
            assert not any(left < x < right and top < y < bottom for x, y in self.labels.get(path[:-1], ())), path
        for (one, a), (other, b) in itertools.combinations(self.found.items(), 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart or one[:-1] != other[:-1] or one == other, (one, other)


def draw(text: str, path: Path, *clicks: str) -> Frames:
    """The places of the boxes after clicks on some buttons."""
    script = "".join(f"document.getElementById('do-{name}').click();" for name in clicks)
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    frames = Frames()
    frames.feed(opened(path))
    return frames


@pytest.mark.slow
@browser
def test_a_picture_that_would_be_too_tall_is_closed_and_opening_makes_room(page: str, tmp_path: Path) -> None:
    low = page.replace("MAX_HEIGHT = 3000", "MAX_HEIGHT = 100")
    assert low != page
    closed, all_open = draw(low, tmp_path / "closed.html"), draw(low, tmp_path / "open.html", "open-all")
    assert 3 < len(closed.found) < len(all_open.found)
    for frames in (closed, all_open):
        frames.check()
    assert draw(low, tmp_path / "again.html", "open-all", "close-all").found == closed.found
    assert draw(page, tmp_path / "page.html").found == all_open.found


def make_random_graph(generator: random.Random) -> dict[str, Any]:
    """Boxes in one another to a depth of four, with random links downwards and across their borders."""
    boxes: list[dict[str, Any]] = []

    def add(depth: int, call: str) -> int:
        number = len(boxes)
        count = generator.randint(1, 6) if depth and (not call or generator.random() < 0.7) else 0
        texts: dict[str, Any] = {"call": call, "title": call or "graph", "about": "x" * generator.randrange(20)}
        lists: dict[str, Any] = {name: [] for name in ("sites", "ops", "sources")}
        copies = [f"{call}-copy"] if call and not generator.randrange(3) else []
        kind = "module" if count else "site" if call else "graph"
        boxes.append({**texts, **lists, "class": "", "type": "", "copies": copies, "kind": kind if call else "graph"})
        parts = [add(depth - 1, f"{call}.{n}".lstrip(".")) for n in range(count)]
        ends = [sorted(generator.sample(range(-1, count + 1), 2)) for _ in range(generator.randint(0, 12))]
        numbers = dict(enumerate(parts))
        links = [(value, numbers.get(a, -1), numbers.get(b, -1)) for value, (a, b) in enumerate(ends)]
        boxes[number] |= {"parts": parts, "links": [link for link in links if call or -1 not in link[1:]]}
        return number

    add(4, "")
    return {"name": "main", "boxes": boxes, "types": dict.fromkeys(map(str, range(12)), "f32[b, 5, 14]"), "levels": []}


@pytest.mark.slow
@browser
@pytest.mark.parametrize("seed", range(6))
def test_no_box_lies_on_another_however_they_are_linked(seed: int, page: str, tmp_path: Path) -> None:
    graph = make_random_graph(random.Random(seed))
    data = json.dumps({"graphs": [graph], "sites": {}, "texts": {"lines": [], "groups": [], "modules": []}})
    text = re.sub(r'(id="data">).*?(</script>)', lambda match: match[1] + data + match[2], page, flags=re.S)
    frames = draw(text, tmp_path / "it.html", "open-all")
    assert len(frames.found) == len(graph["boxes"])
    frames.check()
