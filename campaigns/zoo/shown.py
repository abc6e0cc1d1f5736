"""The models that ``make test`` takes through lorac too: of as many families, each in a few seconds."""

SHOWN = (
    "peft/lora-02-linears",
    "torchvision/squeezenet1_1",
    "transformers/aimv2_vision_model",
    "transformers/apertus",
    "transformers/audio-spectrogram-transformer",
    "transformers/bert",
    "transformers/clip",
    "transformers/convnextv2",
    "transformers/esm",
    "transformers/timesformer",
)
