"""Make ``tests/formats/adapterhub``: tiny models, adapters of AdapterHub's library away from their start, its answers.

The library pins a transformers of its own; run this where both are found, which may be a folder of their own:

    pip install --no-deps --target LIBRARY adapters==1.3.0 transformers==4.57.6 'huggingface_hub<1' 'tokenizers<=0.23.0'
    PYTHONPATH=LIBRARY python tests/formats/make_adapterhub.py [add | read FOLDER ...]

Without arguments it makes the folder anew. With ``add`` it adds what it lacks. With ``read FOLDER ...`` it loads what
others wrote in that layout, each at ``<model>/<adapter>`` below some place, and leaves the answer with each in
``answer.safetensors`` next to them.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters import ConfigUnion, DoRAConfig, IA3Config, LoRAConfig, MTLLoRAConfig, SeqBnConfig, VeraConfig
from adapters.heads import CausalLMHead, Seq2SeqLMHead
from safetensors.torch import load_file, save_file

LEAST, MOST = 0.06, 0.4
"""Return how much of the base's output an adapter changes."""
HERE = Path(__file__).parent / "adapterhub"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
BART = {
    **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 24))},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **TOKENS)),
    "bert": ("BertForMaskedLM", transformers.BertConfig(**SIZES, max_position_embeddings=32)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **TOKENS)),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5)),
    "bart": (
        "BartForConditionalGeneration",
        transformers.BartConfig(40, max_position_embeddings=32, d_model=16, **BART, **TOKENS, decoder_start_token_id=0),
    ),
    "vit": ("ViTModel", transformers.ViTConfig(**EYES, image_size=16, patch_size=8)),
}
ADAPTERS = {
    "llama": {
        "houlsby": "double_seq_bn[reduction_factor=4]",
        "seq": "seq_bn[reduction_factor={'0': 8, 'default': 4}]",
        "parallel": "scaled_par_bn[reduction_factor=4]",
        "language": "seq_bn_inv[reduction_factor=4]",
        "inverted": "double_seq_bn_inv[reduction_factor=4]",
    },
    "bert": {
        "houlsby": "double_seq_bn[reduction_factor=4]",
        "seq": "seq_bn[reduction_factor=4]",
        "parallel": "par_bn[reduction_factor=4]",
        "compacter": "compacter[reduction_factor=2]",
        "plus": adapters.AdapterPlusConfig(reduction_factor=4),
        "normed": "double_seq_bn[reduction_factor=4,ln_before=True,ln_after=True,use_gating=True]",
        "inside": "seq_bn[reduction_factor=4,ln_after=True,adapter_residual_before_ln=True,residual_before_ln=False]",
        "post": "seq_bn[reduction_factor=4,residual_before_ln='post_add',leave_out=[0],scaling='channel']",
    },
    "gpt2": {"houlsby": "double_seq_bn[reduction_factor=4]", "parallel": "par_bn[reduction_factor=8,mh_adapter=True]"},
    "t5": {
        "crossed": "double_seq_bn[reduction_factor=4,cross_adapter=True]",
        "seq": "seq_bn[reduction_factor=4,leave_out=[1,2]]",
    },
    "vit": {
        "houlsby": "double_seq_bn[reduction_factor=4]",
        "plus": adapters.AdapterPlusConfig(reduction_factor=4),
        "compacter": "compacter++[reduction_factor=2,phm_dim=2]",
    },
}
EVERYWHERE = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
LAYERS = {
    "llama": {
        "lora": LoRAConfig(r=2, alpha=3, **EVERYWHERE),
        "dora": DoRAConfig(r=2, alpha=2, attn_matrices=["q", "k"], output_lora=True, leave_out=[0]),
        "dvora": adapters.DvoRAConfig(r=2, alpha=2, attn_matrices=["q"]),
        "tasks": MTLLoRAConfig(r=2, alpha=4, n_up_projection=3, weights_sharpness=0.7),
    },
    "bert": {
        "lora": LoRAConfig(r=3, alpha=2, dropout=0.1, attn_matrices=["k"], output_lora=True, leave_out=[1]),
        "ia3": IA3Config(alpha=2, output_lora=True),
        "vera": VeraConfig(r=2, alpha=5, attn_matrices=["q", "v"]),
        "union": ConfigUnion(
            LoRAConfig(r=2, alpha=3, intermediate_lora=True, init_weights="bert"), SeqBnConfig(reduction_factor=4)
        ),
    },
    "gpt2": {
        "lora": LoRAConfig(r=2, alpha=3, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True),
        "part": LoRAConfig(r=2, alpha=1, attn_matrices=["k"], leave_out=[0]),
        "ia3": IA3Config(),
        "scaled": IA3Config(alpha=2, intermediate_lora=False, attn_matrices=["v"]),
        "union": ConfigUnion(
            SeqBnConfig(reduction_factor=4, scaling="learned"), LoRAConfig(r=2, alpha=3, output_lora=True)
        ),
    },
    "t5": {
        "lora": LoRAConfig(r=2, alpha=3, attn_matrices=["q", "v"], output_lora=True, leave_out=[1]),
        "ia3": IA3Config(),
        "union": ConfigUnion(
            adapters.DoubleSeqBnConfig(reduction_factor=4, output_adapter=False),
            SeqBnConfig(reduction_factor=8, leave_out=[1]),
            LoRAConfig(r=2, attn_matrices=["k"]),
        ),
    },
    "vit": {"lora": LoRAConfig(r=2, alpha=3, intermediate_lora=True, output_lora=True), "ia3": IA3Config()},
}
"""Adapters of layers, whose outputs are stored next to those of bottlenecks, so that no run changes another's."""
PICKLED = {"normed", "inside"}
"""What the library cannot write as safetensors (a norm under two names), and one that it could."""
INVERTIBLE = {
    name: {"spoken": "seq_bn_inv[reduction_factor=4]", "inverted": "double_seq_bn_inv[reduction_factor=4]"}
    for name in ("t5", "bart")
}
"""Adapters of encoder-decoders, where an invertible one follows the encoder's embeddings."""
INVERTED = {"inverted"}
"""Made in the library's own class, the only one that inverts an invertible adapter in front of its head."""


def rounded(module, seed, scale):
    """Draw values that take two bytes each, far from their initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((parameter + noise).half().float())


def moved(parameters, starts, times):
    """Move values so many times as far from their initialisation."""
    with torch.no_grad():
        for path, parameter in parameters.items():
            parameter.copy_((starts[path] + times * (parameter - starts[path])).half().float())


def share(found, base):
    """Return how much of the base's output an adapter changes."""
    return ((found - base).norm() / base.norm()).item()


def inputs_of(name):
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 40, (3, 5), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4] + 0} if name in INVERTIBLE else {})


def answer(model, name):
    given = inputs_of(name)
    with torch.no_grad():
        output = model(**given)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).contiguous()


def model_of(name):
    kind, config = MODELS[name]
    if (HERE / name / "config.json").exists():
        return getattr(transformers, kind).from_pretrained(HERE / name, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def flexible(name, plain):
    """Return the model in the library's own class, with the head of the plain model."""
    model = adapters.AutoAdapterModel.from_pretrained(HERE / name, dtype=torch.float32).eval()
    model.add_prediction_head((Seq2SeqLMHead if plain.config.is_encoder_decoder else CausalLMHead)(model, "head"))
    model.heads["head"][-1].weight.data = plain.lm_head.weight.data.clone()
    return model.eval()


def adapters_of(name):
    """Return the adapters of a model, those added later at the end, so that no draw changes another's."""
    return {**ADAPTERS.get(name, {}), **LAYERS.get(name, {}), **INVERTIBLE.get(name, {})}


def make(name):
    folder = HERE / name
    plain = model_of(name)
    rounded(plain.parameters(), 1, 0.1)
    plain.half().save_pretrained(folder)
    plain = model_of(name)
    expected = {f"input.{key}": value for key, value in inputs_of(name).items()} | {"base": answer(plain, name)}
    for number, (key, config) in enumerate(adapters_of(name).items()):
        record(name, number, key, config, expected)
    save_file(expected, folder / "expected.safetensors")


def add(name):
    """Add adapters without a recorded output to the model that is there."""
    file = HERE / name / "expected.safetensors"
    expected = load_file(file)
    for number, (key, config) in enumerate(adapters_of(name).items()):
        if key not in expected:
            record(name, number, key, config, expected)
    save_file(expected, file)


def record(name, number, key, config, expected):
    """Save one adapter, and the output of its model among those that are expected."""
    folder = HERE / name
    model = flexible(name, model_of(name)) if key in INVERTED else model_of(name)
    adapters.init(model)
    model.add_adapter(key, config=config)
    model.set_active_adapters(key)
    model.eval()  # layers that the library adds begin in training, where stochastic depth drops rows
    own = {path: parameter for path, parameter in model.named_parameters() if f".{key}." in f".{path}"}
    if getattr(config, "composition_mode", None) == "scale":  # what starts as the base, whatever its alpha
        for parameter in own.values():
            parameter.data.fill_(1 / config.alpha)
    starts = {path: parameter.detach().clone() for path, parameter in own.items()}
    rounded(own.values(), 10 + number, 0.3)
    while not LEAST < (changed := share(answer(model, name), expected["base"])) < MOST:
        moved(own, starts, 0.75 if changed >= MOST else 1.5)
    expected[key] = answer(model, name)
    model.save_adapter(str(folder / key), key, with_head=False, use_safetensors=key not in PICKLED)
    file = folder / key / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_name": name}, indent=2, sort_keys=True))
    print(name, key, share(expected[key], expected["base"]))


def read(folder):
    """Load an adapter that others trained and record the model's output with it."""
    name, key = folder.parent.name, folder.name
    model = flexible(name, model_of(name)) if key in INVERTED else model_of(name)
    adapters.init(model)
    loaded = model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    assert loaded == key
    save_file({"answer": answer(model.eval(), name)}, folder / "answer.safetensors")


if __name__ == "__main__":
    for place in sys.argv[2:]:
        read(Path(place))
    for model_name in MODELS if sys.argv[1:] in ([], ["add"]) else ():
        (add if sys.argv[1:] and (HERE / model_name).exists() else make)(model_name)
