"""Images as they are: orientation, proportions, contents that differ from names; alike in training and in exports."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ktray.data import heic
from ktray.data.decode import decode_rgb
from ktray.data.magic import decodable, image_kind, what_it_is
from ktray.data.preprocess import MOST_ASPECT, Preprocess
from ktray.errors import BadImage
from ktray.jobs.export import predict

BASE = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}</rdf:RDF></x:xmpmeta>'
)


def photo(turn: int | None, place: str, kind: str = "JPEG") -> bytes:
    """A picture of four colours, 96 x 64, with its orientation in EXIF, in XMP (attribute or element), or in both."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    options: dict[str, object] = {}
    if turn is not None and "exif" in place:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    if "attribute" in place:
        options["xmp"] = XMP.format(f'tiff:Orientation="{turn}"/>').encode()
    if "element" in place:
        text = f"><tiff:Orientation>{turn}</tiff:Orientation></rdf:Description>"
        options["xmp"] = XMP.format(text).encode()
    if place == "exif and another attribute":
        options["xmp"] = XMP.format('tiff:Orientation="3"/>').encode()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("place", ["exif", "attribute", "element", "exif and another attribute"])
def test_every_orientation_is_the_same_in_training_and_export(turn: int, place: str) -> None:
    data = photo(turn, place)
    ours = decode_rgb(data)
    assert ours.shape[:2] == ((96, 64) if turn > 4 else (64, 96))
    assert np.array_equal(ours, np.asarray(predict.decode(data)))
    assert np.array_equal(ours, decode_rgb(photo(turn, "exif")))


def test_what_old_versions_of_pillow_do_not_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow before 9.5 leaves XMP of a JPEG alone, before 10.1 has no has_transparency_data."""
    data = photo(6, "attribute")
    expected = np.asarray(predict.decode(data))
    empty = Image.Exif()
    monkeypatch.setattr(Image.Image, "getexif", lambda image: empty)
    monkeypatch.delattr(Image.Image, "has_transparency_data")
    assert np.array_equal(np.asarray(predict.decode(data)), expected)
    clear = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear, "PNG")
    assert np.asarray(predict.decode(clear.getvalue())).min() == 255


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 900), (33, 500), (500, 33), (1, 1)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_extreme_proportions_cost_what_is_kept(size: tuple[int, int], mode: str) -> None:
    """A strip of 60,000 x 1 pixels would be resized to 1.9 million x 32."""
    preprocess = replace(BASE, resize_mode=mode)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    ours = preprocess.eval_transform(image)
    assert ours.shape == (3, 32, 32)
    assert np.array_equal(ours, predict.geometry(Image.fromarray(image), preprocess.to_dict()))


def test_the_bound_leaves_other_images_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 10 * MOST_ASPECT, 3)).astype(np.uint8)
    wider = np.pad(image, ((0, 0), (3, 3), (0, 0)))  # its centre is the image
    assert np.array_equal(BASE.eval_transform(image), BASE.eval_transform(wider))
    assert predict.MOST_ASPECT == MOST_ASPECT


KINDS = {
    "JPEG": "JPEG", "PNG": "PNG", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF", "WEBP": "WebP", "AVIF": "AVIF",
    "JPEG2000": "JPEG 2000",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_content_tells_the_format(name: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, name)
    head = out.getvalue()[:64]
    assert image_kind(head) == KINDS[name]
    assert decodable(head)
    assert decode_rgb(out.getvalue()).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40, "HEIC image: pip install 'ktray\\[heic\\]'"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 40, "HEIC image"),
        (b"<!DOCTYPE html><html>not found</html>", "HTML page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"%PDF-1.4", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 50, "video"),
        (b'{"error": "gone"}', "JSON"),
        (b"\0" * 500, "zeros only"),
        (b"", "empty file"),
        (b"some text that is nothing", "not an image, or in an unsupported format"),
    ],
)
def test_what_is_not_an_image_is_called_by_its_name(data: bytes, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heic, "available", lambda: False)
    with pytest.raises(BadImage, match=what):
        decode_rgb(data)
    assert not decodable(data[:64])
    assert what_it_is(b"\xff\xd8\xff") == ""
