"""The tokenizer of a page, with examples that the page must encode and decode as Python does."""

import json
from collections.abc import Mapping
from typing import Any

from lorac.errors import Unavailable, warn
from lorac.runtime.generation.tokenizers import TOKENIZER_FOLDER, TokenizerFiles
from lorac.storage.open_file import OpenFile

_SAMPLES = (
    "Hello, world!  It's 2026-12-01; x_1 = 3.14 + 1000000?",
    "\n\n\tdef f(a):\n        return a**2  # don't",
    "déjà vu — Straße, 你好 мир 🙂👍🏽 İi  ½",
    "",
)
_TURNS = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "I."), ("user", "Why?"))]


def describe_tokenizer(files: Mapping[str, OpenFile]) -> dict[str, Any]:
    """Return the description of an artifact's tokenizer for a page.

    Raises:
        MissingExtra: transformers is not installed.
        ArtifactError: transformers cannot read the tokenizer.
        Unavailable: the artifact has no tokenizer, or none that JavaScript can read.
    """
    found, name = TokenizerFiles.among(files), f"{TOKENIZER_FOLDER}/tokenizer.json"
    if found is None or name not in files:
        raise Unavailable(
            "the artifact has no tokenizer" if found is None else "the artifact's tokenizer has no tokenizer.json",
            next_step="compiled.save(folder, tokenizer=...) with a fast tokenizer of transformers",
        )
    tokenizer: Any = found.load()
    config = files.get(f"{TOKENIZER_FOLDER}/tokenizer_config.json")
    encoded = {text: tokenizer(text)["input_ids"] for text in _SAMPLES}
    decoded = {text: tokenizer.decode(ids, skip_special_tokens=True) for text, ids in encoded.items()}
    return {
        "json": name,
        "config": json.loads(config.read()) if config is not None else {},
        "samples": [{"text": text, "ids": ids, "decoded": decoded[text]} for text, ids in encoded.items()],
        "tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "chat": _describe_chat(tokenizer),
    }


def _describe_chat(tokenizer: Any) -> dict[str, Any] | None:
    """Return the chat template, and the text that it makes of an example; None without a template."""
    if tokenizer.chat_template is None:
        return None
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model author's code, and may raise any exception
        warn(f"the chat template fails and is left out: {error}", next_step="the page continues texts")
        return None
    # A template that names the day by this function makes another text tomorrow.
    return {"template": template, "turns": _TURNS, "text": None if "strftime_now" in template else text}
