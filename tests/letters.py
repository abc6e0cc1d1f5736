"""A tokenizer for tiny models: its tokens are the 128 characters of ASCII."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

CHAT = "{% for turn in messages %}{{ turn.role[0] }}:{{ turn.content }};{% endfor %}a:"
"""A chat format: ``u:…;a:…;``."""


def letters(chat: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, with a chat template or without."""
    model = Tokenizer(models.BPE(vocab={chr(i): i for i in range(128)}, merges=[]))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=chat)
