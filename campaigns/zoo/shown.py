"""The models that ``make test`` takes through lorac too: of as many families, each in a few seconds."""

SHOWN = (
    "diffusers/dit",
    "peft/lora-02-linears",
    "torchvision/squeezenet1_1",
    "transformers/aimv2_vision_model",
    "transformers/apertus",
    "transformers/audio-spectrogram-transformer",
    "transformers/bert",
    "transformers/clip",
    "transformers/convnextv2",
    "transformers/ctrl",
    "transformers/dinov2",
    "transformers/esm",
    "transformers/evolla",
    "transformers/granitemoe",
    "transformers/lfm2",
    "transformers/omniasr",
    "transformers/qwen3",
    "transformers/timesformer",
    "transformers/vitdet",
    "transformers/wav2vec2-bert",
)
