"""Families that generated on ONNX Runtime only without a cache, or not at all, when they were first tried, and why."""

from __future__ import annotations

_HYBRID = "answers otherwise where its text comes in parts"
_SIZES = "torch: Constraints violated (length)"
_ITSELF = "attends by itself"
_MASK = "a mask or bias of its own"
ONCE_REFUSED = {
    **dict.fromkeys(("bamba", "qwen3_next", "lfm2", "nemotron_h", "falcon_h1"), _HYBRID),
    **dict.fromkeys(("granitemoehybrid", "kimi_linear"), _HYBRID),
    **dict.fromkeys(("jamba", "recurrent_gemma"), _SIZES),
    **dict.fromkeys(("xglm", "gpt_neo", "hy_v4", "qwen4_exp_text", "deepseek_v32"), _ITSELF),
    **dict.fromkeys(("llama4_text", "doge", "inkling_text"), _MASK),
    "deepseek_v2": "no op for aten::unsqueeze",
    "longcat_flash": "a loop over data",
    "pegasus_x": "counts positions",
    **dict.fromkeys(("longt5", "speech_to_text"), "reads something of all rows"),
    **dict.fromkeys(("prophetnet", "mvp", "t5gemma2"), _ITSELF),
    **dict.fromkeys(("dia", "led"), "the capture"),
}
"""Family -> the reason then; models of transformers."""
