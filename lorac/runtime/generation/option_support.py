"""The options of transformers' ``generate`` that a program with a cache refuses, and why.

It honours all other options as transformers does, so that no option is accepted and ignored.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why an option is refused.

    Attributes:
        why: the effect of the option, as the text after "name=".
        next_step: the advice.
        neutral: values other than None that change nothing and are accepted.
    """

    why: str
    next_step: str = "compile with target='eager', or leave it out"
    neutral: tuple[object, ...] = ()

    def applies(self, value: object) -> bool:
        """Return whether a value of the option is refused."""
        return not (value is None or (isinstance(value, bool | int | float | str | dict) and value in self.neutral))


_OTHER_CODE = Refusal("runs something else than the compiled program", neutral=(False,))
_OWN_CACHE = Refusal("is for caches of transformers', and a compiled program has its own, which grows", "leave it out")
_MOVED = Refusal("asks for a search that transformers has moved out of its library", "leave it out")
_DRAFTS_BY_LAYERS = Refusal(
    "drafts by modules of the model, which a compiled program does not have",
    "draft= takes adapters that draft, and assistant_model= a model",
)
_INSIDE = Refusal("asks for values that a compiled program does not return", neutral=(False,))

REFUSED = {
    "custom_generate": _OTHER_CODE,
    "trust_remote_code": _OTHER_CODE,
    "synced_gpus": Refusal("is for models on several devices, and the program runs on one", "leave it out", (False,)),
    "use_cache": Refusal("asks for no cache, and this program has one", neutral=(True,)),
    "cache_implementation": Refusal(_OWN_CACHE.why, _OWN_CACHE.next_step, ("dynamic", "hybrid")),
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "compile_config": Refusal("configures torch.compile, and the program is compiled already", "leave it out"),
    "continuous_batching_config": Refusal("is for transformers' generate_batch", "leave it out"),
    "low_memory": Refusal(
        "asks for a beam search step by step, which transformers has no more", "leave it out", (False,)
    ),
    "penalty_alpha": _MOVED,
    "dola_layers": _MOVED,
    "diversity_penalty": Refusal(_MOVED.why, _MOVED.next_step, (0,)),
    "num_beam_groups": Refusal(_MOVED.why, _MOVED.next_step, (1,)),
    "constraints": _MOVED,
    "force_words_ids": _MOVED,
    "assistant_early_exit": _DRAFTS_BY_LAYERS,
    "use_mtp": Refusal(_DRAFTS_BY_LAYERS.why, _DRAFTS_BY_LAYERS.next_step, (False,)),
    "speculation_type": _DRAFTS_BY_LAYERS,
    "is_assistant": Refusal("marks a model that drafts for another one", "draft= takes adapters that draft", (False,)),
    "output_attentions": _INSIDE,
    "output_hidden_states": _INSIDE,
    # Arguments of a model's forward, which transformers' generate passes on.
    "inputs_embeds": Refusal("takes the place of token ids, and the program begins with these"),
    "position_ids": Refusal("gives tokens other positions, and the program counts the tokens of each row"),
    "labels": Refusal("asks for a loss, and generate computes none", "leave it out"),
    "logits_to_keep": Refusal(
        "is set by generate itself", "output_logits=True, return_dict_in_generate=True returns the logits of each step"
    ),
}
"""Option or input that a compiled program cannot honour -> why."""

MISPLACED = {
    "past_key_values": Refusal(
        "is cache= in transformers", "give the cache of an earlier output of generate, or prompt_cache="
    ),
    "cache_position": Refusal("is computed from the cache", "leave it out"),
    "token_type_ids": Refusal("is not an input of this model", "leave it out of the tokenizer's outputs"),
}
"""Input that users give although transformers' own generation refuses it too -> why."""
