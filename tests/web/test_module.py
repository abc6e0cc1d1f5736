"""The module lorac-web in Node.js, whose onnxruntime-web computes in WebAssembly as browsers do."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from tests.web.conftest import IDS
from tests.web.serving import serve

pytestmark = pytest.mark.medium("npm downloads 140 MB; test_export.py computes with the same program")

STEPS = [
    {"choice": None},
    {"choice": "lora"},
    {"choice": "dora"},
    {"choice": "ia3"},
    {"choice": {"lora": 0.6, "dora": 0.5}},
    {"choice": {"lora": -1.5}},
    {"choice": {"dora": 0.4, "ia3": 0.7, "lora": 1}},
    {"choice": {"lora": 1, "ia3": 0}},
]
SCRIPT = """
import {{ load, LoracWebError }} from "lorac-web";
const PAGE = {url};
const IDS = {ids};
const model = {loaded} && (await load(PAGE, {{ backend: "wasm" }}));
const write = async (prompt, options) => {{
  const [tokens, pieces] = [[], []];
  for await (const {{ token, text }} of model.generate(prompt, options)) tokens.push(token), pieces.push(text);
  return {{ tokens, text: pieces.join("") }};
}};
const refusal = async (work) => {{
  try {{
    await work();
  }} catch (error) {{
    return error instanceof LoracWebError ? error.message : `${{error.stack}}`;
  }}
  return "no error";
}};
{body}
process.exit(0);
"""


def run(node_modules: Path, page: Path, body: str, *, loaded: bool = True) -> Any:
    """Return the JSON that a script prints, behind a page that is loaded or not."""
    with serve(page) as (url, _):
        script = SCRIPT.format(url=json.dumps(url), ids=json.dumps(IDS), loaded=json.dumps(loaded), body=body)
        command = [str(shutil.which("node")), "--input-type=module", "--eval", script]
        done = subprocess.run(command, cwd=node_modules.parent, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def expected(compiled: Any, choice: Any, ids: list[int], new: int) -> list[int]:
    given = torch.tensor([ids])
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "adapters": choice}
    found: list[int] = compiled.generate(given, attention_mask=torch.ones_like(given), **options)[
        0, len(ids) :
    ].tolist()
    return found


def test_writes_pythons_tokens_for_adapters_and_mixtures(artifact: Path, page: Path, node_modules: Path) -> None:
    """A later text takes up an earlier one's keys and values, or begins anew where other adapters computed these."""
    body = """
    const found = [];
    for (const { choice } of STEPS) {
      await model.swap(choice);
      const first = await write(IDS, { maxNewTokens: 70, eos: [] });
      const second = await write([...IDS, ...first.tokens.slice(0, 9), 7], { maxNewTokens: 9, eos: [] });
      found.push([first.tokens, second.tokens, model.choice, model.decode(first.tokens) === first.text]);
    }
    console.log(JSON.stringify(found));
    """.replace("STEPS", json.dumps(STEPS))
    compiled = lorac.load(artifact)
    seen = set()
    for (first, second, active, streamed), step in zip(run(node_modules, page, body), STEPS, strict=True):
        choice = step["choice"]
        assert first == expected(compiled, choice, IDS, 70), choice
        assert second == expected(compiled, choice, [*IDS, *first[:9], 7], 9), choice
        given = choice if isinstance(choice, dict) else {choice: 1} if choice else {}
        assert active == {name: strength for name, strength in given.items() if strength} and streamed
        seen.add(str(first))
    assert len(seen) > 5


def test_a_swap_counts_from_the_next_text_on(artifact: Path, page: Path, node_modules: Path) -> None:
    body = """
    await model.swap("lora");
    const [one, two] = [[], []];
    for await (const { token } of model.generate(IDS, { maxNewTokens: 12, eos: [] })) {
      one.push(token);
      if (one.length === 4) {
        await model.swap("dora");
        for await (const { token } of model.generate(IDS, { maxNewTokens: 12, eos: [] })) two.push(token);
      }
    }
    console.log(JSON.stringify([one, two]));
    """
    compiled = lorac.load(artifact)
    assert run(node_modules, page, body) == [expected(compiled, name, IDS, 12) for name in ("lora", "dora")]


def test_draws_tokens_by_a_seed_and_ends_at_a_token(page: Path, node_modules: Path) -> None:
    body = """
    const drawn = (options) => write(IDS, { maxNewTokens: 20, temperature: 1.3, eos: [], ...options });
    const ended = new AbortController();
    const cut = [];
    for await (const { token } of model.generate(IDS, { eos: [], signal: ended.signal })) {
      cut.push(token);
      if (cut.length === 3) ended.abort();
    }
    const greedy = (await write(IDS, { maxNewTokens: 20, eos: [] })).tokens;
    console.log(JSON.stringify({
      seeds: [await drawn({ seed: 1 }), await drawn({ seed: 1 }), await drawn({ seed: 2 })],
      best: [await drawn({ topK: 1 }), await drawn({ topP: 0 })],
      greedy, cut, eos: (await write(IDS, { eos: greedy[5] })).tokens,
      penalised: (await write(IDS, { maxNewTokens: 40, eos: [], repetitionPenalty: 1e9 })).tokens,
      limited: (await write(IDS, { maxNewTokens: 1000, eos: [] })).tokens.length,
      turns: model.encodeTurns([{ role: "user", content: "ab" }]), chats: model.chats, adapters: model.listAdapters(),
    }));
    """
    found = run(node_modules, page, body)
    first, again, other = found["seeds"]
    assert first == again != other
    assert all(one["tokens"] == found["greedy"] for one in found["best"])
    assert found["cut"] == found["greedy"][:3]
    assert found["eos"] == found["greedy"][: found["greedy"].index(found["greedy"][5]) + 1]
    assert len({*IDS, *found["penalised"]}) == len(IDS) + 40
    assert found["limited"] == 128 - len(IDS)  # the model's positions
    assert found["turns"] == list(b"u:ab;a:") and found["chats"]
    assert [(one["name"], one["method"], one["loaded"]) for one in found["adapters"]] == [
        (name, name, False) for name in ("dora", "ia3", "lora")
    ]


def test_takes_files_that_lorac_writes_later(artifact: Path, page: Path, node_modules: Path, tmp_path: Path) -> None:
    compiled = lorac.load(artifact)
    choice = {"lora": 0.5, "dora": 1.0}
    compiled.save_choice(tmp_path / "both.onnx_adapter", choice)
    bad = bytearray((tmp_path / "both.onnx_adapter").read_bytes())
    (tmp_path / "cut.onnx_adapter").write_bytes(bad[: len(bad) // 2])
    (tmp_path / "text").write_bytes(b"not a file of tensors")
    shape = {"model.layers.0.self_attn.q_proj:a": torch.zeros(1, 7, 2)}
    strange, odd = {"nowhere:a": torch.zeros(1, 7, 2)}, {"model.layers.0.self_attn.q_proj:a": torch.zeros(1, 64, 2)}
    from safetensors.torch import save_file

    for name, tensors in {"shape": shape, "strange": strange, "odd": odd}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    body = """
    import { readFileSync } from "node:fs";
    const file = (name) => new Uint8Array(readFileSync(FOLDER + "/" + name));
    const refusals = {};
    for (const name of ["cut.onnx_adapter", "text", "shape.safetensors", "strange.safetensors", "odd.safetensors"])
      refusals[name] = await refusal(async () => model.addAdapter(name, file(name)));
    refusals.twice = await refusal(async () => model.addAdapter("lora", file("both.onnx_adapter")));
    const names = model.listAdapters().map((one) => one.name);
    model.addAdapter("both", file("both.onnx_adapter"));
    await model.swap("both");
    console.log(JSON.stringify({ refusals, names, tokens: (await write(IDS, { maxNewTokens: 20, eos: [] })).tokens }));
    """.replace("FOLDER", json.dumps(str(tmp_path)))
    found = run(node_modules, page, body)
    assert found["names"] == ["dora", "ia3", "lora"]
    assert found["tokens"] == expected(compiled, choice, IDS, 20)
    reasons = {
        "cut.onnx_adapter": "is not a file of slots",
        "text": "is not a file of slots",
        "shape.safetensors": "is for another program: 'model.layers.0.self_attn.q_proj:a' is float32 [1,7,2]",
        "strange.safetensors": "is for another program: this one has no slot 'nowhere:a'",
        "odd.safetensors": "has slots of several ranks at 'model.layers.0.self_attn.q_proj'",
        "twice": "there is an adapter 'lora' already",
    }
    for name, reason in reasons.items():
        assert reason in found["refusals"][name], found["refusals"][name]


def test_says_in_words_how_a_call_is_wrong(page: Path, node_modules: Path) -> None:
    body = """
    await model.swap("lora");
    const calls = {
      "no adapter 'nobody'": () => model.swap("nobody"),
      "the strength of 'dora' is NaN": () => model.mix({ dora: NaN }),
      "no option 'max_new_tokens'": () => write(IDS, { max_new_tokens: 4 }),
      "temperature is -1": () => write(IDS, { temperature: -1 }),
      "the prompt has no token": () => write([], {}),
      "130 tokens, and the model positions for 128": () => write(Array(130).fill(5), {}),
      "load() has no option 'device'": () => load("http://127.0.0.1:9/", { device: "gpu" }),
      "there is no backend 'cuda'": () => load(PAGE, { backend: "cuda" }),
      "this browser has no WebGPU": () => load(PAGE, { backend: "webgpu" }),
      "cannot be fetched": () => load("http://127.0.0.1:9/"),
      "the server answers 404": () => load(PAGE + "files/"),
    };
    const found = {};
    for (const [words, call] of Object.entries(calls)) found[words] = await refusal(call);
    console.log(JSON.stringify([found, model.choice]));
    """
    found, choice = run(node_modules, page, body)
    for words, message in found.items():
        assert words in message, message
    assert choice == {"lora": 1}


@pytest.mark.parametrize("change", ["damaged", "missing", "short", "version", "tokenizer", "numbers"])
def test_rejects_a_page_whose_files_do_not_belong_together(
    page: Path, node_modules: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(page, tmp_path / "page")
    contents = json.loads((tmp_path / "page" / "web.json").read_text("utf-8"))
    part = tmp_path / "page" / "files" / contents["weights"]["weights0"][0]["sha256"]
    reason = {
        "damaged": "was changed or damaged",
        "missing": "the server answers 404",
        "short": "bytes instead of",
        "version": "is version 99 of the format",
        "tokenizer": "the tokenizer reads",
        "numbers": "computes other numbers than Python does",
    }[change]
    if change == "damaged":
        part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    elif change == "missing":
        part.unlink()
    elif change == "short":
        part.write_bytes(part.read_bytes()[:-1])
    elif change == "version":
        contents["lorac_web"] = 99
    elif change == "tokenizer":
        contents["tokenizer"]["samples"][0]["ids"][0] += 1
    else:
        contents["check"]["logits"].reverse()
    (tmp_path / "page" / "web.json").write_text(json.dumps(contents), encoding="utf-8")
    report = "await load(PAGE).catch((error) => console.log(JSON.stringify(error.message)));"
    assert reason in run(node_modules, tmp_path / "page", report, loaded=False)
