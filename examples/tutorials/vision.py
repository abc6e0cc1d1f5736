# %% [markdown]
# # Pictures: one network, several domains
#
# A vision transformer of timm learns handwritten digits. Two adapters then teach it digits that are turned and digits that
# are negative, and one program reads a batch in which each picture needs another. A detector follows, whose backbone is
# compiled. Data and networks come out of Python packages; the page takes about a minute on two cores.

# %%
import timm
import torch
import torchvision

import lorac
from examples import recipe_data

torch.manual_seed(0)
if not recipe_data.DIGITS.is_dir():
    recipe_data.write_digits()  # scikit-learn's, out of its wheel
resize = torchvision.transforms.Compose(
    [
        torchvision.transforms.Grayscale(),
        torchvision.transforms.Resize(16),
        torchvision.transforms.ToTensor(),
    ]
)
digits = torchvision.datasets.ImageFolder(recipe_data.DIGITS / "images", resize)
pictures = torch.stack([picture for picture, _ in digits])
labels = torch.tensor(digits.targets)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]


def turned(x):
    return x.rot90(1, (2, 3))


def negative(x):
    return 1 - x


# %% [markdown]
# ## The base
#
# A small ViT, trained from nothing, as nobody's pretrained weights fit digits of this size.

# %%
vit = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=16,
    patch_size=4,
    in_chans=1,
    num_classes=10,
    embed_dim=64,
    depth=4,
    num_heads=4,
)


def learn(module, parameters, view, steps, lr):
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    module.train()
    for _ in range(steps):
        rows = train[torch.randint(len(train), (64,))]
        loss = torch.nn.functional.cross_entropy(
            module(view(pictures[rows])), labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()


@torch.no_grad()
def share_right(module, view, **given):
    return (
        (module(view(pictures[test]), **given).argmax(-1) == labels[test])
        .float()
        .mean()
        .item()
    )


learn(vit, vit.parameters(), lambda x: x, steps=600, lr=2e-3)
for view in (lambda x: x, turned, negative):
    print(f"{share_right(vit, view):.3f}")

# %% [markdown]
# Turned and negative digits are beyond it.
#
# ## Two adapters
#
# A LoRA at the linear layers for one, and a bottleneck behind each block for the other: two methods, one program.

# %%
compiled = lorac.compile(
    vit,
    {
        "turned": lorac.LoRA(r=8, alpha=16, targets="all-linear"),
        "negative": lorac.AdapterTune(targets="all-blocks"),
    },
    example_inputs=(pictures[:2],),
)
for name, view in {"turned": turned, "negative": negative}.items():
    compiled.swap(name)
    trained = [
        tensor
        for tensor in compiled.adapters[name].parameters()
        if tensor.requires_grad
    ]
    learn(compiled, trained, view, steps=500, lr=4e-3)
    print(
        f"{name}: {share_right(compiled, view):.3f} with {sum(tensor.numel() for tensor in trained):,} values"
    )
print(f"without: {share_right(compiled, lambda x: x, adapters=None):.3f}")

# %% [markdown]
# ## In ONNX Runtime, by the row
#
# `adapters=` may have one choice for each picture.

# %%
engine = compiled.export(target="onnxruntime", active=None)
some = pictures[test[:6]]
batch = torch.cat([some[:2], turned(some[2:4]), negative(some[4:])])
choices = [None, None, "turned", "turned", "negative", "negative"]
found = engine(batch, adapters=choices).argmax(-1)
print(found.tolist(), labels[test[:6]].tolist())

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 6, figsize=(7, 1.8))
for place, picture, choice, number in zip(axes, batch, choices, found):
    place.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
    place.set_title(f"{choice}\n{int(number)}", fontsize=9)
    place.axis("off")
figure.tight_layout()

# %% [markdown]
# ## A detector's backbone
#
# A detector chooses among its boxes by their scores, which an ONNX program does not hold. Its backbone holds the adapters,
# and compiles; the detector runs it in the place of its own.

# %%
detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=5
).eval()
backbone = lorac.compile(
    detector.backbone,
    {"night": lorac.LoRA(r=2, targets="all-conv")},
    target="onnxruntime",
    example_inputs=(torch.randn(2, 3, 320, 320),),
)
detector.backbone.forward = backbone.__call__
backbone.swap("night")
print(backbone)
print(
    {
        name: tuple(value.shape)
        for name, value in detector([torch.rand(3, 240, 320)])[0].items()
    }
)

# %% [markdown]
# Next: [layers, blocks and convolutions](../images.md), the [models that were compared](../models.md) with PEFT.
