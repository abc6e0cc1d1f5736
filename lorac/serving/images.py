"""Images in conversations: data URLs, decoded in other processes."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from lorac.errors import FormatError, short
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.calls.modalities import MODALITIES
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.chat_fields import ChatMessage, ImagePart
from lorac.serving.served_model import ServedModel
from lorac.serving.settings import ServingSettings, StoreQuotas
from lorac.serving.store.reading_main import IMAGE_FORMATS, PICTURE
from lorac.serving.store.reading_process import ReaderPool

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES, *_ = MODALITIES
_URL = re.compile(r"data:([\w.+/-]{1,64});base64,", re.ASCII)
_LONGEST = 40
"""The most characters of a wrong address in a message."""


def reads_images(model: ServedModel) -> bool:
    """Return whether a model reads images in prompts, and has the image processor that makes inputs of them."""
    spec = model.engine.cache_spec(MAIN_GRAPH)
    return spec is not None and _IMAGES.main in spec.reads and hasattr(model.processor, "image_processor")


@final
class ImageReader:
    """Decoder of the images in conversations. Threads may share it.

    Args:
        settings: limits on the number, bytes and pixels of a request's images.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self._settings, self._readers = settings, ReaderPool(StoreQuotas())
        self._readers.readers[0].start()

    def read(self, messages: Sequence[ChatMessage]) -> list[Image]:
        """Return the images of a conversation in their order.

        Raises:
            RefusedField: an address is not a data URL of an image, or images are damaged, too many or too large.
        """
        urls = [part.image_url.url for one in messages for part in one.parts if isinstance(part, ImagePart)]
        if not urls:
            return []
        most, nbytes = self._settings.max_images, self._settings.max_image_bytes
        if len(urls) > most:
            raise RefusedField("messages", f"holds {len(urls)} images, and a request has at most {most}")
        if sum(map(len, urls)) * 3 // 4 > nbytes + _LONGEST * len(urls):
            raise RefusedField("messages", f"holds images of more than {nbytes} bytes", next_step="send smaller files")
        with tempfile.TemporaryDirectory() as folder:
            for number, url in enumerate(urls):
                format, content = _decode(url)
                Path(folder, f"{number}.{format}").write_bytes(content)
            try:
                with self._readers.take() as reader:
                    reader.decode_images(Path(folder), self._settings.max_image_pixels)
                return [_load(Path(folder, f"{number}{PICTURE}")) for number in range(len(urls))]
            except FormatError as error:
                raise RefusedField(
                    "messages", f"holds a wrong image: {error.what}", next_step=error.next_step
                ) from error

    def close(self) -> None:
        """End the processes."""
        self._readers.close()


def _decode(url: str) -> tuple[str, bytes]:
    """Return the format and the bytes of an image in a data URL."""
    found = _URL.match(url[:100])
    if found is None:
        raise RefusedField(
            "image_url",
            f"is {short(url[:_LONGEST])}, and the server opens no addresses",
            next_step="send the image itself: data:image/png;base64,...",
        )
    format = IMAGE_FORMATS.get(found[1].lower())
    if format is None:
        raise RefusedField("image_url", f"holds {found[1]}", next_step=f"send one of {', '.join(IMAGE_FORMATS)}")
    try:
        return format, base64.b64decode(url[found.end() :].encode(), validate=True)
    except ValueError as error:
        raise RefusedField("image_url", f"is not whole: {error}", next_step="send all of its base64") from error


def _load(path: Path) -> Image:
    """Return the image of the pixels in a file that a reading process wrote; the file is not trusted."""
    import numpy as np
    from PIL import Image

    try:
        return Image.fromarray(np.load(path, allow_pickle=False)).convert("RGB")
    except (OSError, TypeError, ValueError) as error:
        raise FormatError("the process that read it crashed", code="corrupt_file") from error
