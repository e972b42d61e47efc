import io

import numpy as np
import pytest
import simplejpeg
from image_zoo import HEIGHT, WIDTH, encode, jpeg, photo, png_header_bomb, zoo
from PIL import Image, ImageOps

from ktray.data.decode import decode_rgb
from ktray.errors import BadImage

ZOO = zoo()
# pytest replaces the filters that the module sets
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("name", [n for n, (kind, _) in ZOO.items() if kind == "ok"])
def test_every_good_kind_decodes_to_rgb(name):
    pixels = decode_rgb(ZOO[name][1])
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    shape = (WIDTH, HEIGHT, 3) if "rotated" in name else (1, 1, 3) if "one_pixel" in name else (HEIGHT, WIDTH, 3)
    assert pixels.shape == shape


@pytest.mark.parametrize("name", [n for n, (kind, _) in ZOO.items() if kind == "bad"])
def test_every_bad_kind_is_bad_with_a_reason(name):
    with pytest.raises(BadImage) as caught:
        decode_rgb(ZOO[name][1])
    reason = caught.value.reason
    expected = {
        "zero_bytes.jpg": "empty",
        "text.jpg": "not an image",
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "header_only.jpg": "",
        "broken_png_data.png": "broken",
        "huge.png": "too large",
        "no_pixels.bmp": "",
        "postscript.png": "not an image",
        "float.tif": "floating",
    }[name]
    assert expected in reason
    assert "\n" not in reason
    assert 0 < len(reason) <= 300


@pytest.mark.parametrize("name", ["rgb.png", "rgb.webp", "rgb.bmp", "rgb.tiff", "animated.png", "animated.webp"])
def test_lossless_files_keep_their_first_frame_exactly(name):
    np.testing.assert_array_equal(decode_rgb(ZOO[name][1]), photo())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_pillows(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_rgb(data), expected)


def test_jpeg_equals_pillow_bit_for_bit():
    data = encode(photo(3, 501, 375), "JPEG", quality=80, subsampling=2)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


def test_cmyk_looks_like_the_original():
    difference = np.abs(decode_rgb(ZOO["cmyk.jpg"][1]).astype(int) - photo().astype(int))
    assert difference.mean() < 4


@pytest.mark.parametrize("name", ["sixteen_bit.png", "sixteen_bit.tif"])
def test_sixteen_bit_is_scaled_and_not_clipped(name):
    expected = np.rint(np.linspace(0, 65535, WIDTH).astype(np.uint16) / 257.0)
    pixels = decode_rgb(ZOO[name][1])
    for channel in range(3):
        np.testing.assert_array_equal(pixels[5, :, channel], expected)


def test_transparency_is_laid_on_white():
    alpha = np.linspace(0, 255, WIDTH, dtype=np.uint8)[None, :, None] / 255.0
    expected = photo() * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(decode_rgb(ZOO["rgba.png"][1]), expected, atol=1)
    hidden = np.zeros((2, 2, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decode_rgb(encode(hidden, "PNG")), 255)


def test_palette_transparency_is_laid_on_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode_rgb(encode(image, "PNG", transparency=0))
    np.testing.assert_array_equal(pixels, [[[255, 255, 255], [40, 50, 60]]])


def test_limit_counts_pixels_from_the_header():
    data = encode(photo(0, 40, 30), "PNG")
    assert decode_rgb(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(BadImage, match="40 x 30"):
        decode_rgb(data, max_pixels=1199)
    with pytest.raises(BadImage, match="12000 x 12000"):
        decode_rgb(png_header_bomb(12_000), max_pixels=10_000_000)


@pytest.mark.parametrize(
    ("hint", "shape"), [(None, (375, 500)), (200, (375, 500)), (188, (375, 500)), (187, (188, 250)), (60, (94, 125))]
)
def test_hint_reduces_but_stays_above(hint, shape):
    data = jpeg(1, 500, 375)
    pixels = decode_rgb(data, enough=(lambda *sides: min(sides) / hint) if hint else None)
    assert pixels.shape[:2] == shape
    small = np.asarray(Image.fromarray(photo(1, 500, 375)).resize(shape[::-1], Image.Resampling.BOX))
    assert np.abs(pixels.astype(int) - small.astype(int)).mean() < 3


def test_hint_keeps_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(1, 400, 300), "JPEG", exif=exif)
    sides = []
    pixels = decode_rgb(data, enough=lambda *whole: sides.append(whole) or 3)
    assert pixels.shape == (200, 150, 3)
    assert sides == [(400, 300)]  # as it stands, not as it is stored
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (200, 150))
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(image)))


def test_orientation_is_found_behind_other_segments_and_padding():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(1, 40, 30), "JPEG", exif=exif, comment=b"Exif\0 in a comment")
    at = data.index(b"\xff\xe1")
    note = b"\xff\xfe" + (2 + 5).to_bytes(2, "big") + b"a not"
    behind = data[:at] + note + b"\xff\xff" + data[at:]
    assert decode_rgb(behind).shape == decode_rgb(data).shape == (40, 30, 3)
    plain = encode(photo(1, 40, 30), "JPEG", comment=b"Exif\0 in a comment")
    assert decode_rgb(plain).shape == (30, 40, 3)
    for cut in range(2, at + 12):  # whatever is left of it, it ends
        with pytest.raises(BadImage):
            decode_rgb(data[:cut])


@pytest.mark.parametrize("name", ["rgb.png", "cmyk.jpg"])
def test_what_cannot_be_decoded_smaller_keeps_its_size(name):
    sides = []
    assert decode_rgb(ZOO[name][1], enough=lambda *whole: sides.append(whole) or 8).shape == (HEIGHT, WIDTH, 3)
    assert sides == [(HEIGHT, WIDTH)]


def test_a_jpeg_with_faults_that_pillow_bears_is_read():
    data = encode(photo(3, 64, 48), "JPEG", quality=80)
    hurt = data[:-2] + b"\x55" * 100 + data[-2:]  # rubbish before the end marker: a warning of libjpeg
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(hurt, "RGB")
    np.testing.assert_array_equal(decode_rgb(hurt), np.asarray(Image.open(io.BytesIO(data))))


def test_random_bytes_raise_nothing_but_bad_image():
    rng = np.random.default_rng(0)
    seeds = [data for kind, data in ZOO.values() if kind == "ok"]
    decoded = bad = 0
    for trial in range(400):
        data = bytearray(seeds[trial % len(seeds)])
        for at in rng.integers(0, len(data), 12):
            data[at] = rng.integers(0, 256)
        try:
            assert decode_rgb(bytes(data), max_pixels=1_000_000).shape[2] == 3
            decoded += 1
        except BadImage:
            bad += 1
    assert bad > 50
    assert decoded > 20
