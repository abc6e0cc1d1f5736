"""The models that ``make test`` takes through lorac too: of twenty families, each in a few seconds."""

SHOWN = (
    "diffusers/dit",
    "peft/lora-02-linears",
    "torchvision/squeezenet1_1",
    "transformers/audio-spectrogram-transformer",
    "transformers/albert",
    "transformers/apertus",
)
