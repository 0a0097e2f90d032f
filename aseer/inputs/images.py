"""Images of prompts: read and checked at the edge, and kept in files for the engines.

An image is a file in shared memory, named by a hash of its bytes, that every engine on
the machine reads. So it crosses to an engine once, however many chunks, requests and
groups have it, and an engine that is started again reads the same file. The file goes
when nothing refers to it any more: neither a group that waits or runs, nor a chunk.

What engines compute from an image (pixels, embeddings, KV) is named by the same hash:
that of another image is never found.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
import weakref
from collections import Counter
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.errors import ConfigError, describe
from aseer.inputs.plain import as_text
from aseer.inputs.prompt_image import PromptImage

if TYPE_CHECKING:
    from PIL import Image

# Of 2^64 images two would have one key.
_KEY_BYTES = 16
# What a format without compression keeps as it is; the others are compressed.
_PLAIN_MODES = ("RGB", "L")
_PNG_MODES = ("1", "LA", "P", "PA", "RGBA", "I;16", "I")
_ALLOWED = (
    "give a PIL.Image, the bytes of an image file, its path, a data: URL, or an array "
    "[height, width, 3] of uint8"
)


class Picture(NamedTuple):
    """An image that was read.

    Attributes:
        data: of a file that PIL can open.
    """

    key: str
    data: bytes
    height: int
    width: int


def read_image(given: object) -> Picture:
    """An image that a user gives, decoded once to see that it is whole.

    Raises:
        ConfigError: it is none, or cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            f"images need Pillow, which is not installed ({error}); run "
            "`pip install pillow`"
        ) from None
    try:
        if isinstance(given, Image.Image):
            given.load()
            data, (width, height) = _encoded(given), given.size
        elif getattr(given, "shape", None) is not None:
            image = _from_array(given)
            data, (width, height) = _encoded(image), image.size
        else:
            data = _read(given)
            with Image.open(BytesIO(data)) as image:
                image.load()
                width, height = image.size
    except ConfigError:
        raise
    except Exception as error:  # of PIL's readers, one a format
        raise ConfigError(
            f"{_name(given)} is no image that can be read ({describe(error)}); "
            f"{_ALLOWED}"
        ) from error
    if not (width and height):
        raise ConfigError(f"{_name(given)} has {width} x {height} pixels")
    return Picture(_key(data), data, height, width)


def _key(data: bytes) -> str:
    return blake2b(data, digest_size=_KEY_BYTES).hexdigest()


def _read(given: object) -> bytes:
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    text = as_text(given)
    if text is not None and text.startswith("data:"):
        return _from_data_url(text)
    if text is not None and text.startswith(("http://", "https://")):
        raise ConfigError(
            f"the image {text!r:.100} is on the network, where nothing is fetched "
            f"from; {_ALLOWED}"
        )
    if text is not None:
        return Path(text.removeprefix("file://")).read_bytes()
    if isinstance(given, os.PathLike):
        return Path(given).read_bytes()
    raise ConfigError(f"an image is a {type(given).__name__}; {_ALLOWED}")


def _from_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ConfigError(f"the data: URL {head!r:.100} is not in base64; {_ALLOWED}")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ConfigError(
            f"the data: URL {head!r:.100} is no valid base64 ({error})"
        ) from error


def _from_array(given: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    is_array = isinstance(given, np.ndarray)
    if not is_array or given.ndim != 3 or given.shape[2] != 3 or given.dtype != "uint8":
        dtype = getattr(given, "dtype", "unknown")
        raise ConfigError(
            f"an image is a {type(given).__name__} of shape {tuple(given.shape)} and "
            f"dtype {dtype}; {_ALLOWED}"
        )
    return Image.fromarray(np.ascontiguousarray(given))


def _encoded(image: Image.Image) -> bytes:
    """The pixels as they are, in a file's form."""
    if image.mode not in (*_PLAIN_MODES, *_PNG_MODES):
        image = image.convert("RGB")
    buffer = BytesIO()
    if image.mode in _PLAIN_MODES:
        image.save(buffer, "PPM")
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _name(given: object) -> str:
    is_path = isinstance(given, str | os.PathLike) and not str(given).startswith(
        "data:"
    )
    if is_path:
        return f"the image {str(given)!r:.200}"
    return f"an image (a {type(given).__name__})"


class ImageStore:
    """Files of the images that prompts have, in one directory; from any thread."""

    def __init__(self, directory: Path) -> None:
        """Make the directory when the first image comes."""
        self._directory = directory
        self._num_users: Counter[str] = Counter()
        # Reentrant: a collection of garbage may let go of an image at any point.
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def keep(self, picture: Picture, start: int, num_tokens: int) -> PromptImage:
        """Keep an image as long as what is returned is referred to.

        Args:
            start: its first token in the prompt.
            num_tokens: that it takes there.
        Raises:
            OSError: there is no room for it.
        """
        path = self._directory / picture.key
        with self._lock:
            self._num_users[picture.key] += 1
            if self._num_users[picture.key] == 1:
                try:
                    self._write(path, picture.data)
                except BaseException:  # whoever comes next tries again
                    del self._num_users[picture.key]
                    raise
        image = PromptImage(
            key=picture.key, path=str(path), start=start, num_tokens=num_tokens
        )
        weakref.finalize(image, self._let_go, picture.key).atexit = False
        return image

    @property
    def keys(self) -> set[str]:
        """Of the images that are kept."""
        with self._lock:
            return set(self._num_users)

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Engines open the file under its name only once it is whole.
        unfinished = path.with_suffix(".part")
        try:
            unfinished.write_bytes(data)
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _let_go(self, key: str) -> None:
        if os.getpid() != self._pid:  # a copy, in a process that the user forked
            return
        with self._lock:
            self._num_users[key] -= 1
            if not self._num_users[key]:
                del self._num_users[key]
                (self._directory / key).unlink(missing_ok=True)
