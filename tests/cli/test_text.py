"""Text on the command line: a prompt, a chat, and timings; transformers is the oracle."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import lorac
from lorac.cli import main
from lorac.cli._generation import TextStreamer
from lorac.testing.parity import FLOAT32
from tests import peft_files
from tests.letters import CHAT, letters
from tests.zoo import SMALL_LLAMA

ENTRY = SMALL_LLAMA
NEW = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder with a tokenizer, one without, two adapters, and the model compiled with both."""
    folder = tmp_path_factory.mktemp("text")
    model = ENTRY.fresh()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    for name in ("model", "mute", "plain"):
        model.save_pretrained(folder / name)
    letters(CHAT).save_pretrained(folder / "model")
    letters().save_pretrained(folder / "plain")
    oracles = {
        name: peft_files.make_peft(
            model, folder / name, LoraConfig(r=rank, target_modules=targets), inputs=ENTRY.inputs(), seed=rank
        )
        for name, rank, targets in (("sql", 3, ["q_proj", "v_proj"]), ("style", 1, ["down_proj"]))
    }
    return SimpleNamespace(folder=folder, oracles={**oracles, None: model})


@pytest.fixture
def cli(files, monkeypatch, capsys):
    """(words, typed) -> (exit code, output, errors), run in the files' folder."""
    monkeypatch.chdir(files.folder)

    def call(*words, typed=""):
        monkeypatch.setattr(sys, "argv", ["lorac", *words])
        given = io.TextIOWrapper(io.BytesIO(typed), "utf-8") if isinstance(typed, bytes) else io.StringIO(typed)
        monkeypatch.setattr(sys, "stdin", given)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def written(files, adapter, text, **settings):
    """The continuation by transformers."""
    ids = torch.tensor([[ord(letter) for letter in text]])
    options = {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids), **settings}
    answer = files.oracles[adapter].generate(input_ids=ids, **options)
    return letters().decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def chat(files, *parts):
    """The output of turns (adapter, line), as transformers answers them, and of the texts between them."""
    turns, printed = "", ""
    for part in parts:
        if isinstance(part, tuple):
            turns += f"u:{part[1]};a:"
            answer = written(files, part[0], turns)
            turns += f"{answer};"
        printed += part if isinstance(part, str) else f"{answer}\n"
    return printed


BOTH = ("-a", "sql", "-a", "style", "--max-new-tokens", str(NEW))


@pytest.mark.medium("one adapter", keep=["sql"])
@pytest.mark.parametrize("adapter", ["sql", "style", None])
def test_a_prompt_is_continued(cli, files, adapter):
    code, out, err = cli("run", "model", *BOTH, "--adapters", adapter or "none", "--prompt", "hello")
    assert (code, err) == (0, "")
    assert out == written(files, adapter, "hello") + "\n"


def test_a_prompt_as_json(cli, files):
    code, out, _ = cli("run", "model", *BOTH, "--adapters", "sql", "--prompt", "hello", "--json", "--temperature", "0")
    assert code == 0
    assert json.loads(out) == {"text": written(files, "sql", "hello"), "tokens": NEW, "active": {"sql": 1.0}}


def test_a_temperature_samples_tokens(cli, files):
    torch.manual_seed(3)
    code, out, _ = cli("run", "model", *BOTH, "--adapters", "none", "--prompt", "hello", "--temperature", "5")
    assert code == 0
    torch.manual_seed(3)
    assert out == written(files, None, "hello", do_sample=True, temperature=5.0) + "\n"


def test_a_chat_continues_with_another_adapter(cli, files):
    typed = "one\n/adapters\n/adapter style\n\ntwo\n/adapter none\nthree\n/exit\nnever read\n"
    code, out, err = cli("run", "model", *BOTH, "--adapters", "sql", typed=typed)
    assert (code, err) == (0, "")
    shown = "* sql\n  style\n  none\nadapter: style\n"
    assert out == chat(files, ("sql", "one"), shown, ("style", "two"), "adapter: none\n", (None, "three"))


def test_a_compiled_folder_writes_and_is_timed_without_its_model(cli, files, monkeypatch):
    pytest.importorskip("onnxruntime", reason="a cache is kept by ONNX Runtime")
    code, out, err = cli("compile", "model", "-a", "sql", "-a", "style", "--active", "none", "--cache", "-o", "cached")
    assert (code, err) == (0, "")
    find, found = lorac.PromptCache.find, []
    monkeypatch.setattr(lorac.PromptCache, "find", lambda *args: found.append(find(*args)) or found[-1])
    typed = "one\n/adapter style\ntwo\n/adapter sql\nthree"
    code, out, err = cli("run", "cached", "--max-new-tokens", str(NEW), "--adapters", "sql", typed=typed)
    assert (code, err) == (0, "")
    assert out == chat(files, ("sql", "one"), "adapter: style\n", ("style", "two"), "adapter: sql\n", ("sql", "three"))
    assert [begun is not None for begun in found] == [False, False, True], "what sql has read it does not read again"
    code, out, _ = cli("bench", "cached", "--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "2", "--json")
    assert code == 0
    assert [row["adapters"] for row in json.loads(out)] == ["none", "sql", "style"]
    code, out, err = cli("run", "cached", "-a", "sql", "--prompt", "hello")
    assert (code, out) == (1, "")
    assert "lorac.OptionError: 'cached' is compiled, and holds adapters of its own" in err


def test_a_chat_continues_after_errors(cli, files):
    typed = "/adapter slq\n/adapter\n/adaptr sql\none\n"
    code, out, err = cli("run", "model", *BOTH, "--adapters", "sql", typed=typed)
    assert code == 0
    assert out == written(files, "sql", "u:one;a:") + "\n"
    assert "lorac.AdapterNotFound: no adapter is called 'slq'\n  nearest: sql" in err
    assert "lorac.OptionError: /adapter needs a name" in err
    assert "lorac.OptionError: there is no command '/adaptr'\n  nearest: /adapter" in err


def test_new_starts_without_the_old_messages(cli, files):
    code, out, err = cli("run", "model", *BOTH, "--adapters", "sql", typed="one\n/new\none\n")
    assert (code, err) == (0, "")
    assert out == f"{written(files, 'sql', 'u:one;a:')}\n" * 2


def test_undecodable_bytes_do_not_end_a_chat(cli, files):
    code, out, err = cli("run", "model", *BOTH, "--adapters", "none", typed=b"o\xffne\n/new\none\n")
    assert (code, err) == (0, "")
    assert out.endswith(f"{written(files, None, 'u:one;a:')}\n")


def test_a_failing_chat_template_is_reported_and_does_not_end_a_chat(cli, files, tmp_path):
    model = ENTRY.fresh()
    model.save_pretrained(tmp_path)
    letters(
        "{% if '!' in messages[-1].content %}{{ raise_exception('no shouting') }}{% endif %}" + CHAT
    ).save_pretrained(tmp_path)
    code, out, err = cli("run", str(tmp_path), "--max-new-tokens", str(NEW), typed="one!\none\n")
    assert code == 0
    assert "lorac.InputMismatch: the model's chat template fails: no shouting" in err
    assert len(out) > 1


@pytest.mark.medium("runtime/generation/test_cached_generation.py bounds texts")
def test_a_text_ends_where_positions_do(cli, files, tmp_path):
    """Also where it may get longer; what was read does not fit in is refused."""
    model = ENTRY.fresh()
    model.config.max_position_embeddings = 16
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path / "short")
    letters(CHAT).save_pretrained(tmp_path / "short")
    short = str(tmp_path / "cached")
    assert cli("compile", str(tmp_path / "short"), "--cache", "-o", short)[0] == 0
    code, out, _ = cli("run", short, "--prompt", "hello", "--temperature", "0", "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 12
    code, _, err = cli("run", short, "--prompt", "hello" * 4)
    assert code == 1
    assert "give a prompt of 16 tokens or less" in err
    code, out, err = cli("run", short, "--max-new-tokens", "2", typed="a\nb\nc\n/new\na\n")
    assert code == 0
    assert "lorac.InputMismatch: the conversation is longer than the model has positions for\n  /new begins" in err
    assert out.startswith(out.splitlines()[-1]), "the first answer, and the one after /new"


def test_an_answer_interrupted_before_its_first_token_leaves_no_turn(cli, files, monkeypatch):
    put, stop = TextStreamer.put, iter([True] + [False] * 20)

    def interrupted(self, value):
        put(self, value)
        if next(stop):
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    code, out, err = cli("run", "model", *BOTH, "--adapters", "none", typed="one\ntwo\n")
    assert (code, err) == (0, "")
    assert out == f"{written(files, None, 'u:two;a:')}\n"


def test_an_interrupted_answer_stays_in_the_conversation(cli, files, monkeypatch):
    put, stop = TextStreamer.put, iter([False] * 4 + [True] + [False] * 20)

    def interrupted(self, value):
        put(self, value)
        if next(stop):
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    code, out, _ = cli("run", "model", *BOTH, "--adapters", "none", typed="one\ntwo\n")
    assert code == 0
    first = written(files, None, "u:one;a:", max_new_tokens=4)
    assert out == f"{first}\n{written(files, None, f'u:one;a:{first};u:two;a:')}\n"


def test_shows_a_character_once_all_its_tokens_are_there():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    pieces = []
    shown = TextStreamer(Bytes(), pieces.append)
    shown.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in "aé€".encode():
        shown.put(torch.tensor([byte]))
    assert pieces == ["a", "é", "€"]
    shown.put(torch.tensor([0xE2]))
    shown.end()
    assert (shown.text, shown.tokens) == ("aé€\ufffd", 7)


@pytest.mark.medium("test_a_compiled_folder_writes_and_is_timed_without_its_model")
def test_bench_times_generation(cli):
    words = ("--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "2")
    code, out, err = cli("bench", "model", "-a", "sql", *words, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["adapters"] for row in rows] == ["none", "sql"]
    assert all(row[name] > 0 for row in rows for name in ("first_ms", "read_per_s", "written_per_s", "ratio"))
    assert rows[0]["ratio"] == 1
    code, out, _ = cli("bench", "model", *words)
    assert code == 0
    assert all(header in out for header in ("first token ms", "read tokens/s", "written tokens/s", "ratio"))
    code, out, err = cli("bench", "model", "-a", "sql", "-a", "style", *words, "--rows", "3", "--json")
    assert err == ""
    assert code == 0
    assert [row["adapters"] for row in json.loads(out)] == ["none", "sql", "style", "each row its own"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "mute", "--prompt", "hello"], 1, "lorac.OptionError: the model has no tokenizer"),
        (["run", "plain"], 1, "lorac.OptionError: the tokenizer has no chat template"),
        (["run", "model", "--prompt", "hello", "--image", "x.png"], 1, "the model has no processor for images"),
        (["run", "model", "--prompt", "hello", "-i", "x.npz"], 2, "give one"),
        (["run", "model", "--prompt", "hello", "-o", "x.npz"], 2, "--out writes the outputs of a call with --inputs"),
        (["run", "model", "--json"], 2, "not for a chat"),
        (["run", "model", "--prompt", "hello", "--adapters", "sql"], 1, "lorac.AdapterNotFound"),
        (["run", "modle", "--prompt", "hello"], 1, "is neither a compiled folder nor a model\n  nearest: model"),
        (["run", "sql", "--prompt", "hello"], 1, "sql' is an adapter, not a compiled model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(cli, words, code, message):
    found, out, err = cli(*words)
    assert (found, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split()) or message in err
    assert "Traceback" not in err


@pytest.mark.medium("test_demo_needs_a_tokenizer_that_pads")
def test_demo_swaps_its_adapters_and_returns_to_the_base(cli, files):
    ENTRY.fresh().save_pretrained(files.folder / "demo")
    tokenizer = letters(CHAT)
    tokenizer.pad_token, tokenizer.eos_token = "~", "}"
    tokenizer.save_pretrained(files.folder / "demo")
    code, out, err = cli("demo", "demo")
    assert code == 0, err
    assert re.search(r"pirate: LoRA, [\d,]+ trained values", out)
    assert "base before and after: the same" in out
    differences = re.findall(r"│ (?:pirate|loud|both) +│ (\S+e-\d+) +│", out)
    assert len(differences) == 3
    assert max(map(float, differences)) < FLOAT32


@pytest.mark.parametrize("folder", ["mute", "model"])
def test_demo_needs_a_tokenizer_that_pads(cli, folder):
    code, _, err = cli("demo", folder)
    assert code == 1
    assert f"'{folder}' has no tokenizer with tokens for padding" in err
