"""Images in conversations: OpenAI's client gets the tokens of ``generate``, and wrong images a sentence."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

import lorac
from tests.image_models import FEATURES, batch, made, make_processor
from tests.serving.models import make_app, serve

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    return Image.frombytes(
        "RGB", size, bytes((seed * 37 + 11 * i) % 256 for i in range(3 * size[0] * size[1]))
    ).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, format, **options)
    return written.getvalue()


def address(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def turn(*contents: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*contents]}]


def parts(*contents: str | bytes) -> list[dict[str, Any]]:
    """A message of texts and PNGs."""
    return turn(*map(part, contents))


def part(content: str | bytes, **more: Any) -> dict[str, Any]:
    if isinstance(content, str):
        return {"type": "text", "text": content}
    return {"type": "image_url", "image_url": {"url": address(content), **more}}


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a few kilobytes with many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + width // 8) * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def compiled(images: Any) -> Any:
    return images


@pytest.fixture(scope="module")
def url(compiled: Any) -> Iterator[str]:
    with serve(make_app(compiled, max_images=3, max_image_pixels=1 << 20)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def expect(compiled: Any, choice: Any, *contents: str | Image.Image) -> tuple[str, int]:
    """What generate answers to a message, and the tokens of the prompt."""
    turn = [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in contents
    ]
    given = compiled.processor.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    count = given["input_ids"].shape[1]
    inputs = dict(given) if "pixel_values" in given else {name: given[name] for name in ("input_ids", "attention_mask")}
    found = compiled.generate(**inputs, adapters=choice, **GREEDY)
    return compiled.tokenizer.decode(found[0, count:]).removesuffix("</s>"), count


def ask(client: openai.OpenAI, messages: Any, model: str = "one", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8, **more)


def test_an_image_is_answered_as_generate_does(client: openai.OpenAI, compiled: Any) -> None:
    one, other = picture(1), picture(2, (20, 20))
    cases: list[tuple[str, Any, list[Any]]] = [
        ("one", "one", ["say ", one]),
        ("base", None, [one, "say "]),
        ("one:0.5+two:0.5", {"one": 0.5, "two": 0.5}, [one, " or ", other, "?"]),
        ("two", "two", ["say"]),
    ]
    for model, choice, contents in cases:
        sent = [one if isinstance(one, str) else encode(one) for one in contents]
        text, count = expect(compiled, choice, *contents)
        found = ask(client, parts(*sent), model)
        assert (found.choices[0].message.content, found.usage.prompt_tokens) == (text, count), model
        assert count >= FEATURES * sum(isinstance(one, bytes) for one in sent)
    assert (
        ask(client, parts("say ", encode(one))).choices[0].message.content
        != ask(client, parts("say ", encode(picture(9)))).choices[0].message.content
    )


@pytest.mark.medium("test_an_image_is_answered_as_generate_does")
def test_a_model_whose_images_see_later_tokens_is_served(tmp_path: Path) -> None:
    """Gemma 3, whose processor gives types of tokens."""
    whole = lorac.compile(
        made("gemma3"), target="onnxruntime", active=None, cache=True, example_inputs=batch("gemma3", (3, 3), seed=7)
    )
    whole.save(tmp_path / "saved", tokenizer=make_processor("gemma3"))
    gemma = lorac.load(tmp_path / "saved")
    with serve(make_app(gemma)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answers = []
        for model, choice, contents in (
            ("one", "one", ["say ", picture(1), " it"]),
            ("two", "two", [picture(1), picture(2, (20, 20))]),
            ("one", "one", ["say ", picture(9), " it"]),
            ("base", None, ["say"]),
        ):
            text, count = expect(gemma, choice, *contents)
            found = ask(client, parts(*[one if isinstance(one, str) else encode(one) for one in contents]), model)
            assert (found.choices[0].message.content, found.usage.prompt_tokens) == (text, count), model
            answers.append(text)
        assert answers[0] != answers[2]
        _refused(client, parts("<|vision_start|>", PNG), "messages", "do not fit the model's chat template")


def test_streams_stop_strings_and_several_answers(client: openai.OpenAI, compiled: Any) -> None:
    whole, count = expect(compiled, "one", picture(1), "say")
    messages = parts(encode(picture(1)), "say")
    events = list(ask(client, messages, stream=True, n=2, stream_options={"include_usage": True}))
    texts = ["", ""]
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [whole, whole]
    assert events[-1].usage.prompt_tokens == count
    stop = whole[2:4]
    stopped = ask(client, messages, stop=[stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("format", "mode"), [("JPEG", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("PNG", "L"), ("PNG", "I;16")]
)
def test_formats_are_read_as_transformers_reads_files(
    format: str, mode: str, client: openai.OpenAI, compiled: Any
) -> None:
    content = encode(picture(5, mode="I").convert(mode) if mode == "I;16" else picture(5, mode=mode), format)
    seen = Image.open(io.BytesIO(content)).convert("RGB")
    turn = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": address(content, f"image/{format.lower()}")}}],
        }
    ]
    assert ask(client, turn).choices[0].message.content == expect(compiled, "one", seen)[0]


def test_turned_photographs_are_upright(client: openai.OpenAI, compiled: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture(6), exif=exif)
    found = ask(client, parts(content)).choices[0].message.content
    assert found == expect(compiled, "one", picture(6).transpose(Image.Transpose.ROTATE_270))[0]


PNG = encode(picture(1))
WRONG: list[tuple[Any, str | None, str]] = [
    (parts(PNG[:60]), "messages", "image 1 is not a whole PNG file"),
    (
        parts(PNG, bomb()),
        "messages",
        "image 2 has 30000 x 30000 pixels, and all images of a request together may have 1048576",
    ),
    (parts(encode(picture(1, (1100, 1000)))), "messages", "1100 x 1000 pixels"),
    (parts(*[encode(picture(1, (800, 800)))] * 3), "messages", "image 2 has 800 x 800"),
    (parts(*[PNG] * 4), "messages", "holds 4 images, and a request has at most 3"),
    (parts(encode(picture(1), "JPEG")), "messages", "image 1 is not a whole PNG file"),
    (parts(encode(picture(1), "PNG", save_all=True, append_images=[picture(2)])), "messages", "image 1 is animated"),
    (parts(b""), "messages", "image 1 is not a whole PNG file"),
    (parts("<|image_pad|>", PNG), "messages", "Found total 2 <|image_pad|> tokens and 1 images"),
    (parts(encode(picture(1, (32, 8)))), None, "the program was captured with image_grid_thw=[[1, 4, 4]]"),
]
URLS = [
    ("http://example.org/a.png", "and the server opens no addresses"),
    ("file:///etc/passwd", "and the server opens no addresses"),
    ("/etc/passwd", "and the server opens no addresses"),
    ("data:text/plain;base64,QUJD", "holds text/plain; send one of image/gif"),
    ("data:image/png,abc", "and the server opens no addresses"),
    (address(PNG)[:-3], "is not whole"),
    (address(PNG) + "\n", "is not whole"),
    ("data:image/png;base64,ä", "is not whole"),
]


def _refused(client: openai.OpenAI, messages: Any, field: str | None, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages)
    assert text in caught.value.body["message"]  # type: ignore[index]  # an object
    assert caught.value.body["param"] == field  # type: ignore[index]  # an object


@pytest.mark.parametrize(("messages", "field", "text"), WRONG)
def test_rejects_wrong_images(messages: Any, field: str | None, text: str, client: openai.OpenAI) -> None:
    _refused(client, messages, field, text)


@pytest.mark.parametrize(("sent", "text"), URLS)
def test_rejects_addresses_that_hold_no_image(sent: str, text: str, client: openai.OpenAI) -> None:
    _refused(client, turn({"type": "image_url", "image_url": {"url": sent}}), "image_url", text)


def test_rejects_fields_of_parts(client: openai.OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (part(PNG, detail="high"), "messages[0].content[0].image_url.detail"),
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": {}}, "messages[0].content[0].image_url.url"),
        ({"type": "image_url", "image_url": "x"}, "messages[0].content[0].image_url"),
        ({"type": "input_audio"}, "messages[0].content[0].type"),
    ]
    for one, field in wrong:
        _refused(client, turn(one), field, f"'{field}' is")


def test_rejects_an_image_that_the_template_leaves_out(
    client: openai.OpenAI, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.processor, "chat_template", "{% for turn in messages %}say{% endfor %}")
    _refused(client, parts(PNG), "messages", "Found total 0 <|image_pad|> tokens and 1 images")


def test_tokenizes_a_conversation_with_its_images(url: str, compiled: Any) -> None:
    found = httpx2.post(f"{url}/tokenize", json={"messages": parts("say", PNG)}).json()
    assert found["count"] == expect(compiled, None, "say", picture(1))[1]


def test_bytes_are_bounded(compiled: Any) -> None:
    with serve(make_app(compiled, max_image_bytes=2000, max_body_bytes=1000)) as url:
        chats = f"{url}/v1/chat/completions"
        body = {"model": "one", "max_tokens": 2}
        small = httpx2.post(chats, json={**body, "messages": parts(PNG)}, timeout=60)
        assert small.status_code == 200, small.text
        large = httpx2.post(chats, json={**body, "messages": parts(b"\0" * 2200)})
        assert (large.status_code, "more than 2000 bytes" in large.text) == (400, True), large.text
        assert httpx2.post(chats, json={**body, "messages": parts(b"\0" * 4000)}).status_code == 413
        assert httpx2.post(f"{url}/v1/completions", json={"model": "one", "prompt": "s" * 1100}).status_code == 413


def test_a_processor_is_saved_and_found(compiled: Any, tmp_path: Path) -> None:
    assert type(compiled.processor).__name__ == "Qwen2_5_VLProcessor"
    assert compiled.tokenizer is compiled.processor.tokenizer
    compiled.save(tmp_path / "again")
    assert type(lorac.load(tmp_path / "again").processor) is type(compiled.processor)
