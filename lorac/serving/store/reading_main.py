"""The process that reads untrusted uploads, started by ``ReadingProcess``.

It reads requests from its input, one line of JSON each. For each request it forks a child. The child limits its own
resources, reads the adapter and rewrites it in lorac's own format, or writes a refusal. The answer is a line with the
child's exit status. This process has one thread, and reads nothing else.

On other systems than Linux the process reads one upload itself, and its own exit status is the answer: on macOS
libraries do not survive a fork, and Windows has no fork. ``WEAKER`` names the limits that those systems lack; the
server's clock limits time there too.
"""

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from lorac.adapters.fit import check_values
from lorac.errors import AdapterError, FormatError, LoracError
from lorac.formats import native, peft
from lorac.formats.peft.config import peft_types
from lorac.formats.reading import AdapterFile
from lorac.limits import charge_reading
from lorac.serving.store.intake import NATIVE
from lorac.storage.strict_json import JsonObject
from lorac.variants import variants

if TYPE_CHECKING:
    from PIL.Image import Image

REWRITTEN, REFUSAL = "rewritten.safetensors", "refusal.json"
"""Files in the folder of an upload: the rewritten adapter, and the refusal."""
PICTURE = ".npy"
"""Ending of a decoded image's file, after its number. The file has the pixels (height, width, 3), as uint8."""
IMAGE_FORMATS = {"image/gif": "GIF", "image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
"""Media type -> its name in Pillow."""
BYTES_PER_PIXEL = 3
REFUSED = 2
"""Exit status of a child that has written a refusal."""
WEAKER = {"linux": "", "darwin": "on memory and the network"}.get(sys.platform, "on memory, files and the network")
"""The limits that readers of uploads lack on this system; empty where readers have all limits."""
FORKS = not WEAKER
"""Whether each upload is read by a forked child."""
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_MOST_FILES = 64
_NICE = 10  # the server's own work comes first
_NAME = "adapter"
"""The name in every rewritten file, so that equal adapters have equal files."""


def main() -> None:
    """Serve requests until the input ends."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from PIL import Image

        Image.init()  # once, and not in every child
    for load in (variants, peft_types):
        load()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork() if FORKS else 0
        if not child:
            _serve(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _serve(request: JsonObject) -> NoReturn:
    folder, status = Path(request["folder"]), 1
    try:
        # The input and output of the process carry the requests and answers of other uploads.
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1):
            os.dup2(nothing, handle)
        _limit(request["seconds"], request["memory"], request["size"])
        if "pixels" in request:
            decode_images(folder, request["pixels"])
        else:
            rewrite(folder, request["base"])
        status = 0
    except (LoracError, MemoryError, OSError) as error:
        (folder / REFUSAL).write_text(json.dumps(_describe(error)), encoding="ascii")
        status = REFUSED
    finally:
        os._exit(status)


def _limit(seconds: float, memory: int, size: int) -> None:
    """Limit this process's resources, and cut it off from the network, where the system allows it.

    Args:
        seconds: the most processor time.
        memory: the most bytes of address space beyond those in use.
        size: the most bytes of a file that it writes.
    """
    if sys.platform == "win32":
        return
    import resource

    os.nice(_NICE)
    limits = {"CPU": math.ceil(seconds), "FSIZE": size, "NOFILE": _MOST_FILES, "CORE": 0}
    if FORKS:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits["AS"] = pages * resource.getpagesize() + memory
    for kind, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)


def rewrite(folder: Path, base: str | None) -> None:
    """Read the adapter in a folder, and write it into the same folder in lorac's own format.

    Args:
        folder: contains NATIVE, or the files of a PEFT folder.
        base: the hash of the base weights, for an adapter that does not record it.

    Raises:
        FormatError, AdapterError, SiteError: as ``lorac.load_adapter``; or the adapter records another hash.
    """
    is_native = (folder / NATIVE).is_file()
    path = folder / NATIVE if is_native else folder
    format = native.NativeFormat() if is_native else peft.PeftFormat()
    file = AdapterFile(path)
    if not format.recognises(file):
        raise FormatError(
            f"'{path}' is not a file of lorac's own format",
            next_step="save the adapter with lorac.save_adapter(adapter, path, format='native')",
            code="unknown_format",
        )

    def rewrite() -> None:
        adapter = format.read(file, None, _NAME)
        check_values(adapter)
        known = adapter.provenance.get("base")
        if base is not None and known not in (None, base):
            raise AdapterError(
                f"the upload says that its base weights have the hash '{base}', and the adapter records '{known}'",
                next_step="upload it without a hash",
                code="base_mismatch",
            )
        adapter.provenance["base"] = known or base
        native.NativeFormat().write(adapter, folder / REWRITTEN, None, folder / REWRITTEN)

    charge_reading(path, rewrite)


def decode_images(folder: Path, pixels: int) -> None:
    """Decode the images in a folder, files called ``<number>.<format>``, and write the pixels of each.

    Raises:
        FormatError: as ``read_images``.
    """
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    paths = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    files = [(path, f"image {int(path.stem) + 1}", (path.suffix[1:],)) for path in paths]
    for path, picture in zip(paths, read_images(files, pixels), strict=True):
        np.save(folder / f"{path.stem}{PICTURE}", np.asarray(picture), allow_pickle=False)


def read_images(files: Iterable[tuple[Path, str, tuple[str, ...]]], pixels: int) -> "Iterator[Image]":
    """Yield the images in files, upright and in colours.

    Args:
        files: path, name for errors, and allowed formats of each.
        pixels: the most pixels of all images together.

    Raises:
        FormatError: an image is damaged, of another format, or animated; or the images have too many pixels.
    """
    from PIL import Image, ImageOps

    left = pixels
    for path, name, formats in files:
        try:
            with Image.open(path, formats=formats) as image:
                width, height = image.size
                left -= width * height
                if left < 0:
                    raise FormatError(
                        f"{name} has {width} x {height} pixels, and all images of a request together may have {pixels}",
                        next_step="give smaller ones",
                        code="over_budget",
                    )
                if getattr(image, "is_animated", False):
                    raise FormatError(f"{name} is animated", next_step="give one of its pictures", code="over_budget")
                # As transformers does for files.
                picture = ImageOps.exif_transpose(image).convert("RGB")
        except (MemoryError, LoracError):
            raise
        except Exception as error:  # decoders may raise any error for untrusted bytes
            reason = str(error).replace(str(path), name) or type(error).__name__
            whole = f"{name} is not a whole {' or '.join(formats)} file: {reason}"
            raise FormatError(whole, code="corrupt_file") from error
        yield picture


def over_budget_error(what: str) -> FormatError:
    """Return the error for an upload whose reading exceeds a limit."""
    return FormatError(
        f"reading it takes more {what} than an upload may",
        next_step="send the adapter as PEFT or lorac wrote it",
        code="over_budget",
    )


def _describe(error: Exception) -> dict[str, object]:
    """Return an error as JSON, from which the server makes it again."""
    if not isinstance(error, LoracError):
        error = over_budget_error("memory or space")
    fields = {"what": error.what, "nearest": error.nearest, "next_step": error.next_step, "code": error.code}
    return {"kind": type(error).__name__, **fields}
