"""Images are read and checked where they come in, and kept as long as they are used."""

from __future__ import annotations

import base64
import gc
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aseer.errors import ConfigError
from aseer.inputs.images import ImageStore, read_image
from aseer.inputs.prompt_image import PromptImage, without_images

pil = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8)
IMAGE = pil.fromarray(PIXELS)


def encoded(file_format: str) -> bytes:
    buffer = BytesIO()
    IMAGE.save(buffer, file_format)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(pil.open(BytesIO(data)))


def test_every_form_of_an_image_is_taken(tmp_path: Path) -> None:
    png = encoded("PNG")
    (tmp_path / "image.png").write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    path = tmp_path / "image.png"
    for given in (png, bytearray(png), path, str(path), f"file://{path}", url):
        picture = read_image(given)
        assert picture.data == png, "as it was given"
        assert (picture.height, picture.width) == (28, 56)
    for given in (IMAGE, PIXELS, PIXELS[:, ::-1][:, ::-1]):
        picture = read_image(given)
        assert (pixels_of(picture.data) == PIXELS).all()
        assert (picture.height, picture.width) == (28, 56)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
def test_pixels_of_every_mode_stay_as_they_are(mode: str) -> None:
    image = pil.new("I;16", (5, 4), 777) if mode == "I;16" else IMAGE.convert(mode)
    read = pil.open(BytesIO(read_image(image).data))
    expected = image.convert("RGB") if mode == "CMYK" else image
    assert read.mode == expected.mode
    assert (np.asarray(read) == np.asarray(expected)).all()


def test_an_image_is_named_by_what_it_is() -> None:
    assert read_image(IMAGE).key == read_image(PIXELS).key
    assert read_image(IMAGE).key != read_image(PIXELS[::-1]).key


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"no image", "is no image that can be read"),
        (encoded("PNG")[:200], "is no image that can be read"),
        ("/nowhere/at/all.png", "'/nowhere/at/all.png' is no image"),
        ("https://example.org/a.png", "is on the network"),
        ("data:image/png,abc", "is not in base64"),
        ("data:image/png;base64,!", "is no valid base64"),
        (7, "an image is a int"),
        (None, "an image is a NoneType"),
        (PIXELS.astype(np.float32), "dtype float32"),
        (PIXELS[..., 0], r"shape \(28, 56\)"),
        (PIXELS[:0], "."),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_give(
    given: object, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_image(given)


def test_an_images_file_is_there_as_long_as_something_refers_to_it(
    tmp_path: Path,
) -> None:
    store = ImageStore(tmp_path / "images")
    picture = read_image(IMAGE)
    one = store.keep(picture, 3, 8)
    two = store.keep(picture, 5, 8)
    path = Path(one.path)
    assert path == Path(two.path)
    assert path.read_bytes() == picture.data
    assert [f.name for f in path.parent.iterdir()] == [picture.key]
    del one
    gc.collect()
    assert path.exists()
    del two
    gc.collect()
    assert not path.exists()
    assert not store.keys
    again = store.keep(picture, 0, 8)
    assert path.read_bytes() == picture.data
    assert (again.start, again.num_tokens) == (0, 8)


def test_an_image_for_which_there_was_no_room_is_written_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(tmp_path / "images")
    picture = read_image(np.full((8, 8, 3), 7, np.uint8))

    def full(path: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            store.keep(picture, 0, 8)
    assert not store.keys
    assert not list((tmp_path / "images").iterdir())
    image = store.keep(picture, 0, 8)
    assert Path(image.path).read_bytes() == picture.data


def test_an_image_is_plain_data_on_its_way() -> None:
    image = PromptImage(key="k", path="/p", start=2, num_tokens=3)
    sent = msgspec.msgpack.encode(image)
    assert msgspec.msgpack.decode(sent, type=PromptImage) == image


def test_without_images_a_token_is_left_of_each() -> None:
    prompt = np.array([1, 9, 9, 9, 2, 9, 9, 9, 3, 9], np.int32).tobytes()
    images = [
        PromptImage(key="a", path="", start=1, num_tokens=3),
        PromptImage(key="b", path="", start=5, num_tokens=2),
        PromptImage(key="c", path="", start=7, num_tokens=1),
    ]
    assert without_images(prompt, images).tolist() == [1, 9, 2, 9, 9, 3, 9]
