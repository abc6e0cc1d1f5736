# %% [markdown]
# # Pictures that a pipeline paints
#
# A tiny text-to-image network paints coloured shapes. Two LoRAs teach it colours that it has no word for, and the compiled
# network paints a batch in which each picture has its own. Then the same words on a whole pipeline of diffusers.
#
# The network is trained once, by `make denoiser` (15 minutes); the rest takes two.

# %%
import torch

import lorac
from examples import denoiser

base = denoiser.load()
prompts = ["a red square", "a blue circle", "a red circle and a green square"]
noise = denoiser.noise(len(prompts), seed=4)
painted = base.sample(noise, *prompts)

# %%
import matplotlib.pyplot as plt


def show(pictures, titles):
    figure, axes = plt.subplots(1, len(pictures), figsize=(1.9 * len(pictures), 2.1))
    for place, picture, title in zip(axes, pictures, titles):
        place.imshow((picture.detach().permute(1, 2, 0).clamp(-1, 1) + 1) / 2)
        place.set_title(title.replace(" and ", "\nand "), fontsize=8)
        place.axis("off")
    figure.tight_layout()


show(painted, prompts)

# %% [markdown]
# ## Two LoRAs
#
# Each learns that what the prompt calls red has another colour. The network is diffusers' own class, and the loop is the
# usual one; LoRA acts at cross-attention alone.

# %%
compiled = lorac.compile(
    base.unet,
    {
        name: lorac.LoRA(
            r=4, alpha=4, targets=["attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
        )
        for name in ("yellow", "magenta")
    },
)
shown = [
    objects
    for objects in denoiser.SEEN
    if any(colour == "red" for colour, _ in objects)
]


def drawing(colour):
    def draw(generator):
        chosen = [
            shown[i] for i in torch.randint(0, len(shown), (16,), generator=generator)
        ]
        repainted = [
            [(colour if word == "red" else word, shape) for word, shape in objects]
            for objects in chosen
        ]
        images = torch.stack(
            [denoiser.draw(objects, generator)[0] for objects in repainted]
        )
        return denoiser.to_latents(images), denoiser.encode(
            *map(denoiser.make_prompt, chosen)
        )

    return draw


for name in ("yellow", "magenta"):
    compiled.swap(name)
    compiled.train()
    trained = [
        tensor
        for tensor in compiled.adapters[name].parameters()
        if tensor.requires_grad
    ]
    loss = denoiser.learn(
        lambda z, t, ids: compiled(z, t, base.text_encoder(ids)).sample,
        trained,
        drawing(name),
        steps=300,
        rate=1e-2,
    )
    compiled.eval()
    print(
        f"{name}: {sum(tensor.numel() for tensor in trained):,} values, loss {loss:.3f}"
    )

# %% [markdown]
# ## One program, a choice per picture
#
# The compiled network takes the place of the network in any sampling loop. `adapters=` has a choice for each row; the same
# noise and the same words become four pictures.

# %%
example = (noise[:2], torch.tensor(10), base.states(*prompts[:2]))
engine = compiled.export(target="onnxruntime", active=None, example_inputs=example)
choices = [None, "yellow", "magenta", {"yellow": 0.5, "magenta": 0.5}]
same = denoiser.noise(1, seed=4).expand(4, -1, -1, -1)
rows = base.sample(
    same, "a red square", unet=lambda *given: engine(*given, adapters=choices)
)
show(rows, [str(choice) for choice in choices])

# %% [markdown]
# ## A pipeline of diffusers
#
# `lorac.diffusion.compile` takes a whole pipeline and files as people share them. This one is a toy SDXL that paints
# noise; yours comes from `from_pretrained`.

# %%
import lorac.diffusion
from examples import pipelines

original = pipelines.build("stable_diffusion_xl", ".")
models = {
    name: getattr(original, name) for name in ("unet", "text_encoder", "text_encoder_2")
}
style = lorac.compile(
    models, {"style": lorac.LoRA(r=4, targets=["to_q", "to_k", "to_v", "q_proj"])}
)
with torch.no_grad():
    for tensor in style.adapters["style"].parameters():
        tensor.normal_(0, 0.3)
lorac.save_adapter(
    style.adapters["style"], "style.safetensors", format="kohya", model=models
)

pipeline = lorac.diffusion.compile(
    original, {"style": "style.safetensors"}, target="onnxruntime"
)
print(pipeline.compiled)
for adapters in ("style", {"style": 0.5}, None):
    picture = pipeline(
        "a cat", num_inference_steps=4, height=32, width=32, adapters=adapters
    ).images[0]
    print(adapters, picture.size, picture.getpixel((0, 0)))

# %% [markdown]
# Next: [image generation](../diffusion.md), with regions, CLoRA and files of sd-scripts and LyCORIS, and
# [what was tried](../experiments.md) of the papers on composing LoRAs.
