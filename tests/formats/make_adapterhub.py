"""Make ``tests/formats/adapterhub``: tiny models, adapters of AdapterHub's library away from their start, its answers.

The library pins a transformers of its own; run this where both are found, which may be a folder of their own:

    pip install --no-deps --target LIBRARY adapters==1.3.0 transformers==4.57.6 'huggingface_hub<1' 'tokenizers<=0.23.0'
    PYTHONPATH=LIBRARY python tests/formats/make_adapterhub.py [read FOLDER ...]

Without arguments it makes the folder anew. With ``read FOLDER ...`` it loads adapters that others wrote in that layout,
each at ``<model>/<adapter>`` below some place, and leaves the answer with each in ``answer.safetensors`` beside them.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters import BnConfig
from adapters.heads import CausalLMHead
from safetensors.torch import save_file

HERE = Path(__file__).parent / "adapterhub"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **TOKENS)),
    "bert": ("BertForMaskedLM", transformers.BertConfig(**SIZES, max_position_embeddings=32)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **TOKENS)),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5)),
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
PICKLED = {"normed", "inside"}
"""What the library cannot write as safetensors (a norm under two names), and one that it could."""
INVERTED = {"inverted"}
"""Made in the library's own class, which alone undoes an invertible adapter in front of its head."""


def rounded(module, seed, scale):
    """Values that take two bytes each, far from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((parameter + noise).half().float())


def shrunk(parameters):
    """The same values, three quarters as large."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_((0.75 * parameter).half().float())


def share(found, base):
    """How much of what the base answers an adapter changes."""
    return ((found - base).norm() / base.norm()).item()


def inputs_of(name):
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 40, (3, 5), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4] + 0} if name == "t5" else {})


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
    """The same model in the library's own class, with a head that is the plain model's."""
    model = adapters.LlamaAdapterModel.from_pretrained(HERE / name, dtype=torch.float32).eval()
    model.add_prediction_head(CausalLMHead(model, "head"))
    model.heads["head"][-1].weight.data = plain.lm_head.weight.data.clone()
    return model.eval()


def make(name):
    folder = HERE / name
    plain = model_of(name)
    rounded(plain.parameters(), 1, 0.1)
    plain.half().save_pretrained(folder)
    plain = model_of(name)
    expected = {f"input.{key}": value for key, value in inputs_of(name).items()} | {"base": answer(plain, name)}
    for number, (key, config) in enumerate(ADAPTERS[name].items()):
        model = flexible(name, plain) if key in INVERTED else model_of(name)
        adapters.init(model)
        model.add_adapter(key, config=config)
        model.set_active_adapters(key)
        model.eval()  # layers that the library adds begin in training, where stochastic depth drops rows
        own = [parameter for path, parameter in model.named_parameters() if f".{key}." in path]
        rounded(own, 10 + number, 0.3)
        while share(found := answer(model, name), expected["base"]) > 0.4:
            shrunk(own)
        expected[key] = found
        model.save_adapter(str(folder / key), key, with_head=False, use_safetensors=key not in PICKLED)
        file = folder / key / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_name": name}, indent=2, sort_keys=True))
        print(name, key, share(expected[key], expected["base"]))
    save_file(expected, folder / "expected.safetensors")


def read(folder):
    """Load an adapter of somebody else's and keep what the model answers with it."""
    name, key = folder.parent.name, folder.name
    model = flexible(name, model_of(name)) if key in INVERTED else model_of(name)
    adapters.init(model)
    loaded = model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    assert isinstance(model.adapters_config.get(loaded), BnConfig)
    save_file({"answer": answer(model.eval(), name)}, folder / "answer.safetensors")


if __name__ == "__main__":
    for place in sys.argv[2:]:
        read(Path(place))
    for model_name in MODELS if len(sys.argv) == 1 else ():
        make(model_name)
