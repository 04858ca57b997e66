"""Real picture files of every hard kind, against transformers' `load_image` or against values worked out here."""

from __future__ import annotations

import errno
import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as reference_load_image

from edgevlm.errors import ImageError
from edgevlm.families.base import MAX_PIXELS, RGB
from edgevlm.inputs.image import FORMATS, image_suffixes, load_image
from tests.conftest import noise, photograph

Make = Callable[[Path], tuple[Any, str]]
CUT = "cannot be decoded, it may be truncated:"


def scene() -> RGB:
    """A part of a real photograph, 90 x 120, without any symmetry."""
    return photograph("china.jpg")[100:190, 200:320]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG written by hand: what Pillow does not write, and headers that lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(body)) + name + body for name, body in chunks]
    checks = [struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part for pair in zip(framed, checks, strict=True) for part in pair)


def png16(samples: np.ndarray, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 16 bits a sample from an array `(H, W, C)`."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(width, height, 16, colour, rows, *extra)


def reference(path: Path) -> np.ndarray:
    """Return the file as transformers loads it."""
    with Image.open(path) as image:  # given a path, transformers leaves the file of an animation open
        return np.asarray(reference_load_image(image))


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Return the picture as the reference's image processor flattens RGBA."""
    return np.asarray(convert_to_rgb(Image.fromarray(rgba), return_numpy=True))


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


OPAQUE: dict[str, tuple[str, Callable[[], Image.Image], dict[str, Any]]] = {
    "portrait": ("PNG", lambda: Image.fromarray(noise(300, 20)), {}),
    "panorama": ("PNG", lambda: Image.fromarray(noise(2, 3000)), {}),
    "one pixel": ("PNG", lambda: Image.fromarray(noise(1, 1)), {}),
    "grayscale PNG": ("PNG", lambda: Image.fromarray(scene()).convert("L"), {}),
    "grayscale JPEG": ("JPEG", lambda: Image.fromarray(scene()).convert("L"), {}),
    "1-bit PNG": ("PNG", lambda: Image.fromarray(scene()).convert("1"), {}),
    "1-bit TIFF": ("TIFF", lambda: Image.fromarray(scene()).convert("1"), {"compression": "group4"}),
    "palette PNG": ("PNG", lambda: Image.fromarray(scene()).quantize(17), {}),
    "palette GIF": ("GIF", lambda: Image.fromarray(scene()).quantize(200), {}),
    "palette BMP": ("BMP", lambda: Image.fromarray(scene()).quantize(5), {}),
    "JPEG": ("JPEG", lambda: Image.fromarray(scene()), {}),
    "progressive JPEG": ("JPEG", lambda: Image.fromarray(scene()), {"progressive": True, "quality": 60}),
    "CMYK JPEG": ("JPEG", lambda: Image.fromarray(scene()).convert("CMYK"), {}),
    "CMYK TIFF": ("TIFF", lambda: Image.fromarray(scene()).convert("CMYK"), {}),
    "JPEG in TIFF": ("TIFF", lambda: Image.fromarray(scene()), {"compression": "jpeg"}),
    "LAB TIFF": ("TIFF", lambda: Image.new("LAB", (5, 4), (150, 140, 90)), {}),
    "compressed TIFF": ("TIFF", lambda: Image.fromarray(scene()), {"compression": "tiff_lzw"}),
    "lossy WebP": ("WEBP", lambda: Image.fromarray(scene()), {"quality": 70}),
    "JPEG 2000": ("JPEG2000", lambda: Image.fromarray(scene()), {}),
    "PPM": ("PPM", lambda: Image.fromarray(scene()), {}),
}


@pytest.fixture(params=OPAQUE)
def opaque(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Image.Image]:
    """An opaque 8-bit picture file, and the image it was written from."""
    kind, make, options = OPAQUE[request.param]
    path, image = tmp_path / f"picture.{kind.lower()}", make()
    image.save(path, kind, **options)
    return path, image


def test_an_opaque_8_bit_file_is_as_the_reference_loads_it(opaque: tuple[Path, Image.Image]) -> None:
    path, image = opaque
    found = load_image(path)
    assert found.dtype == np.uint8
    assert found.shape == (image.height, image.width, 3)
    assert np.array_equal(found, reference(path))


def test_lossless_files_give_the_samples_that_were_written(tmp_path: Path) -> None:
    colours, gray, bits = noise(7, 11), noise(7, 11)[..., 0], noise(7, 11)[..., 0] > 127
    palette, indices = noise(1, 16)[0], noise(7, 11)[..., 0] % 16
    indexed = Image.fromarray(indices)
    indexed.putpalette(palette.tobytes())
    written = {
        "rgb.png": (Image.fromarray(colours), colours),
        "rgb.tiff": (Image.fromarray(colours), colours),
        "rgb.bmp": (Image.fromarray(colours), colours),
        "gray.png": (Image.fromarray(gray), np.repeat(gray[..., None], 3, axis=-1)),
        "bits.png": (Image.fromarray(bits), np.repeat(bits[..., None] * np.uint8(255), 3, axis=-1)),
        "palette.png": (indexed, palette[indices]),
        "palette.gif": (indexed, palette[indices]),
    }
    for name, (image, wanted) in written.items():
        image.save(tmp_path / name)
        assert np.array_equal(load_image(tmp_path / name), wanted), name


def test_path_text_bytes_pil_image_and_array_are_one(opaque: tuple[Path, Image.Image]) -> None:
    path, _ = opaque
    wanted = load_image(path)
    with Image.open(path) as image:
        mode, size = image.mode, image.size
        assert np.array_equal(load_image(image), wanted)
        assert (image.mode, image.size) == (mode, size)
    for source in (str(path), path.read_bytes(), wanted):
        assert np.array_equal(load_image(source), wanted)


def test_an_array_of_any_memory_layout(tmp_path: Path) -> None:
    wanted = noise(5, 8)
    assert np.array_equal(load_image(np.asfortranarray(wanted)), wanted)
    assert np.array_equal(load_image(wanted[::-1, :, ::-1]), wanted[::-1, :, ::-1])
    wanted.flags.writeable = False
    assert np.array_equal(load_image(wanted), wanted)


def palette_with_alpha() -> Image.Image:
    image = Image.fromarray(noise(6, 9)[..., 0] % 8)
    image.putpalette(noise(1, 8).tobytes())
    return image


TRANSPARENT: dict[str, tuple[str, Callable[[], Image.Image], dict[str, Any]]] = {
    "RGBA PNG": ("PNG", lambda: Image.fromarray(noise(30, 40, 4)), {}),
    "RGBA WebP": ("WEBP", lambda: Image.fromarray(noise(30, 40, 4)), {"lossless": True, "exact": True}),
    "RGBA TIFF": ("TIFF", lambda: Image.fromarray(noise(30, 40, 4)), {}),
    "LA PNG": ("PNG", lambda: Image.fromarray(noise(30, 40, 2)), {}),
    "opaque RGBA": ("PNG", lambda: Image.fromarray(scene()).convert("RGBA"), {}),
    "palette, an alpha for each entry": ("PNG", palette_with_alpha, {"transparency": bytes(range(0, 256, 32))}),
    "palette, one clear entry": ("PNG", palette_with_alpha, {"transparency": 3}),
    "GIF, one clear entry": ("GIF", palette_with_alpha, {"transparency": 3}),
    "gray, one clear level": ("PNG", lambda: Image.fromarray(noise(6, 9)[..., 0] % 8), {"transparency": 5}),
    "RGB, one clear colour": ("PNG", lambda: Image.fromarray(noise(6, 9) % 2), {"transparency": (0, 1, 0)}),
    "1-bit, black clear": ("PNG", lambda: Image.fromarray(noise(6, 9)[..., 0] > 127), {"transparency": 0}),
}


@pytest.mark.parametrize("case", TRANSPARENT)
def test_transparency_is_laid_over_white_as_the_image_processor_does_with_rgba(case: str, tmp_path: Path) -> None:
    """transformers' `load_image` drops alpha instead, and shows whatever colour an editor left under clear pixels;
    the Idefics3 image processor's own `convert_to_rgb` is the rule for a picture that comes with its alpha."""
    kind, make, options = TRANSPARENT[case]
    path = tmp_path / f"picture.{kind.lower()}"
    make().save(path, kind, **options)
    with Image.open(path) as image:
        rgba = np.asarray(image.convert("RGBA"))
        assert np.array_equal(load_image(image), load_image(path))
    assert case == "opaque RGBA" or rgba[..., 3].min() < 255  # the file did keep its transparency
    assert np.array_equal(load_image(path), over_white(rgba))
    assert np.array_equal(load_image(path.read_bytes()), over_white(rgba))


def test_what_lies_over_white_is_the_mix_of_both(tmp_path: Path) -> None:
    pixels = noise(40, 50, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    found = load_image(tmp_path / "picture.png")
    alpha = pixels[..., 3:] / 255
    mix = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(found - mix).max() <= 1
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], pixels[1, :, :3])


def bgra(alpha: np.ndarray | int) -> np.ndarray:
    """Return the scene in the order in which BMP and TGA store it, with this alpha."""
    height, width, _ = scene().shape
    return np.dstack([scene()[..., ::-1], np.broadcast_to(alpha, (height, width)).astype(np.uint8)])


def bmp(pixels: np.ndarray, header_size: int = 124) -> bytes:
    """Return a BMP of 32 bits a pixel, bottom row first, whose header names an alpha mask: V3 (56), V4 (108), V5."""
    height, width, _ = pixels.shape
    header = struct.pack("<IiiHHIIiiII", header_size, width, height, 1, 32, 3, pixels.size, 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = b"BM" + struct.pack("<IHHI", 14 + header_size + pixels.size, 0, 0, 14 + header_size)
    return head + header.ljust(header_size, b"\0") + pixels[::-1].tobytes()


def tga(pixels: np.ndarray, kind: int = 2, attribute_bits: int = 0, palette: bytes = b"") -> bytes:
    """Return a TGA, top row first, from an array `(H, W, bytes)`; `kind` is its image type."""
    height, width, depth = pixels.shape
    colours = (1, 0, len(palette) // 4, 32) if palette else (0, 0, 0, 0)
    size = (0, 0, width, height, depth * 8, 0x20 | attribute_bits)
    head = struct.pack("<BBBHHBHHHHBB", 0, colours[0], kind, *colours[1:], *size)
    rows = pixels.tobytes()
    if kind == 10:  # each pixel a packet of its own
        rows = b"".join(b"\0" + pixel.tobytes() for pixel in pixels.reshape(-1, depth))
    return head + palette + rows


def ico(pixels: np.ndarray) -> bytes:
    """Return an icon of one bitmap of 32 bits a pixel, all of it within its outline."""
    height, width, _ = pixels.shape
    outline = bytes(-(-width // 32) * 4 * height)
    header = struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, pixels.size, 0, 0, 0, 0)
    bitmap = header + pixels[::-1].tobytes() + outline
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 32, len(bitmap), 22) + bitmap


FOUR_BYTES: dict[str, Callable[[np.ndarray], bytes]] = {
    "BMP V3": lambda pixels: bmp(pixels, 56),
    "BMP V4": lambda pixels: bmp(pixels, 108),
    "BMP V5": bmp,
    "DIB": lambda pixels: bmp(pixels)[14:],
    "TGA": lambda pixels: tga(pixels, attribute_bits=8),
    "TGA, no attribute bits": tga,
    "TGA, run-length encoded": lambda pixels: tga(pixels, 10),
    "ICO": ico,
}


@pytest.mark.parametrize("case", FOUR_BYTES)
def test_a_fourth_byte_that_is_0_throughout_is_padding(case: str) -> None:
    data = FOUR_BYTES[case](bgra(0))
    assert np.array_equal(load_image(data), scene())
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(load_image(image), scene())


@pytest.mark.parametrize("case", FOUR_BYTES)
def test_a_fourth_byte_that_is_not_0_throughout_is_alpha(case: str) -> None:
    alpha = np.zeros(scene().shape[:2], np.uint8)
    alpha[3, 4], alpha[5], alpha[7] = 1, 128, 255
    found = load_image(FOUR_BYTES[case](bgra(alpha)))
    assert np.array_equal(found, over_white(np.dstack([scene(), alpha])))
    assert (found[0] == 255).all()
    assert np.array_equal(found[7], scene()[7])
    assert np.array_equal(load_image(FOUR_BYTES[case](bgra(255))), scene())


def test_attribute_bits_of_other_targa_files() -> None:
    """A bit, or a palette's fourth byte, that says the same everywhere hides nothing."""
    five_bits = np.random.default_rng(8).integers(0, 2**15, (5, 6, 1), np.uint16)
    wanted = load_image(tga(five_bits.view(np.uint8)))
    assert wanted.min() < wanted.max()
    assert np.array_equal(load_image(tga((five_bits | 0x8000).view(np.uint8), attribute_bits=1)), wanted)
    gray = np.dstack([noise(5, 6)[..., 0], np.zeros((5, 6), np.uint8)])
    assert np.array_equal(load_image(tga(gray, 3)), np.repeat(gray[..., :1], 3, axis=-1))
    indices = noise(5, 6)[..., :1] % 2
    two = load_image(tga(indices, 1, palette=bytes([30, 20, 10, 0, 60, 50, 40, 0])))
    assert np.array_equal(two, np.where(indices, [40, 50, 60], [10, 20, 30]))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "JPEG2000"])
def test_where_alpha_is_alpha_a_picture_clear_throughout_is_white(kind: str) -> None:
    clear = Image.fromarray(np.dstack([scene(), np.zeros(scene().shape[:2], np.uint8)]))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert (load_image(encode(clear, kind, **options)) == 255).all()


@pytest.mark.parametrize("mode", ["PA", "RGBa"])
def test_a_pil_image_of_a_rare_mode_with_alpha(mode: str) -> None:
    image = Image.new(mode, (2, 2))
    assert (load_image(image) == 255).all()


@pytest.mark.parametrize("name", ["picture.png", "little.tiff", "big.tiff"])
def test_16_bit_grayscale_keeps_the_high_byte(name: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(3).integers(0, 65536, (9, 12), np.uint16)
    samples[0, :4] = 0, 255, 256, 65535
    image = Image.fromarray(samples)
    if name == "big.tiff":
        image = Image.frombytes("I;16B", (12, 9), samples.astype(">u2").tobytes())
    image.save(tmp_path / name)
    found = load_image(tmp_path / name)
    assert found[0, :4, 0].tolist() == [0, 0, 1, 255]
    assert np.array_equal(found, np.repeat((samples >> 8)[..., None], 3, axis=-1))


def test_32_bit_grayscale_is_clipped_to_16_bits_first(tmp_path: Path) -> None:
    samples = np.array([[-5, 0, 256, 65535, 65536, 2**31 - 1]], np.int32)
    Image.fromarray(samples).save(tmp_path / "picture.tiff")
    assert load_image(tmp_path / "picture.tiff")[0, :, 1].tolist() == [0, 0, 1, 255, 255, 255]


def test_16_bit_grayscale_with_one_clear_level(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(
        png16(np.array([[[5000], [5001], [0]]]), 0, (b"tRNS", struct.pack(">H", 5000)))
    )
    assert load_image(tmp_path / "picture.png")[0, :, 2].tolist() == [255, 5001 >> 8, 0]


def test_16_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    samples = np.random.default_rng(4).integers(0, 65536, (5, 6, 3), np.uint16)
    (tmp_path / "picture.png").write_bytes(png16(samples, colour=2))
    assert np.array_equal(load_image(tmp_path / "picture.png"), samples >> 8)


def test_16_bit_colour_with_alpha_is_laid_over_white(tmp_path: Path) -> None:
    samples = np.random.default_rng(5).integers(0, 65536, (5, 6, 4), np.uint16)
    (tmp_path / "picture.png").write_bytes(png16(samples, colour=6))
    assert np.array_equal(load_image(tmp_path / "picture.png"), over_white((samples >> 8).astype(np.uint8)))


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""What a viewer does to the stored rows for each orientation that the EXIF standard names."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    path, image = tmp_path / f"picture.{kind.lower()}", Image.fromarray(scene())
    image.save(path, kind, exif=exif(orientation), **options)
    stored = load_image(encode(image, kind, **options))
    found = load_image(path)
    assert np.array_equal(found, UPRIGHT[orientation](stored))
    assert np.array_equal(found, reference(path))
    with Image.open(path) as opened:
        assert np.array_equal(load_image(opened), found)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_the_standard_does_not_name_is_none(orientation: int) -> None:
    pixels = noise(4, 7)
    assert np.array_equal(load_image(encode(Image.fromarray(pixels), "PNG", exif=exif(orientation))), pixels)


def test_orientation_and_transparency_and_16_bits_go_together() -> None:
    clear = noise(4, 7, 4)
    found = load_image(encode(Image.fromarray(clear), "PNG", exif=exif(6)))
    assert np.array_equal(found, np.rot90(over_white(clear), -1))
    deep = np.random.default_rng(6).integers(0, 65536, (4, 7), np.uint16)
    found = load_image(encode(Image.fromarray(deep), "PNG", exif=exif(6)))
    assert np.array_equal(found[..., 0], np.rot90(deep >> 8, -1))


TAG = struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
BROKEN_EXIF = {
    "no TIFF header": (b"Exif\0\0garbage", 1),
    "header only": (b"Exif\0\0", 1),
    "entries cut off": (b"Exif\0\0II*\0\x08\0\0\0\x05\0", 1),
    "directory beyond the end": (b"Exif\0\0II*\0\xff\xff\0\0", 1),
    "cut after the orientation": (b"Exif\0\0II*\0\x08\0\0\0\x05\0" + TAG, 6),
    "a pointer to nowhere after the orientation": (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0" + TAG + struct.pack("<HHII", 0x8769, 4, 1, 9999) + b"\0\0\0\0",
        6,
    ),
    "a value that Pillow cannot write again": (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x100, 16, 1, 0) + TAG + b"\0\0\0\0",
        6,
    ),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_broken_exif_does_not_cost_the_picture(case: str, kind: str) -> None:
    block, orientation = BROKEN_EXIF[case]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(scene())
    stored = load_image(encode(image, kind, **options))
    assert np.array_equal(load_image(encode(image, kind, exif=block, **options)), UPRIGHT[orientation](stored))


def flat(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (12, 8), (red, green, blue))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_image_of_several_is_taken(kind: str, tmp_path: Path) -> None:
    path, frames = tmp_path / f"picture.{kind.lower()}", [flat(200, 10, 30), flat(0, 250, 0), flat(0, 0, 250)]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    found = load_image(path)
    assert found.shape == (8, 12, 3)
    assert (found == [200, 10, 30]).all()
    assert np.array_equal(found, reference(path))


def test_a_clear_first_frame_of_an_animation_is_laid_over_white(tmp_path: Path) -> None:
    first, second = Image.new("RGBA", (6, 4)), Image.new("RGBA", (6, 4), (9, 9, 9, 100))
    first.paste((1, 2, 3, 255), (0, 0, 3, 4))
    for name in ("picture.gif", "picture.webp", "picture.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        found = load_image(tmp_path / name)
        assert (found[:, :3] == [1, 2, 3]).all(), name
        assert (found[:, 3:] == 255).all(), name


def written(name: str, data: bytes, message: str) -> Make:
    """A file with these bytes, and the message after its path."""

    def make(folder: Path) -> tuple[Any, str]:
        (folder / name).write_bytes(data)
        return folder / name, f"{folder / name} {message}"

    return make


def cut(name: str, data: bytes, told: str = CUT) -> Make:
    """A damaged file, and the message after its path with Pillow's words at the end."""

    def make(folder: Path) -> tuple[Any, str]:
        (folder / name).write_bytes(data)
        return folder / name, f"{folder / name} {told} {pillows_words(data)}"

    return make


def jpeg_cut(keep: int) -> bytes:
    return encode(Image.fromarray(noise(100, 100)), "JPEG")[:keep]


def png_cut(keep: int) -> bytes:
    return encode(Image.fromarray(noise(60, 60)), "PNG")[:keep]


def gif_cut(keep: int) -> bytes:
    return encode(Image.fromarray(noise(60, 60)), "GIF")[:keep]


def pillows_words(data: bytes) -> str:
    """Return what Pillow says of a damaged file: it counts the bytes it is left with, another count in each version."""
    with pytest.raises(OSError, match="runcated") as raised:
        Image.open(io.BytesIO(data)).load()
    return str(raised.value)


def float_tiff() -> bytes:
    return encode(Image.fromarray(np.ones((3, 4), np.float32)), "TIFF")


UNKNOWN = "is not an image in a format that edgevlm reads (JPEG, PNG, WebP, …)"
ARRAY = "an image array must be uint8 of shape (H, W, 3), not"
SOURCE = "an image must be a path, bytes, a PIL image or a uint8 array, not"
FLOATS = "has floating-point pixels; convert it to 8 bits a channel first"
BOMB = png(60000, 60000, 1, 0, b"\0" * 100)
LARGE = png(12000, 10000, 1, 0, b"\0" * 100)
"""Between the size that Pillow warns of and the size that it refuses."""
TOO_LONG = "data:image/png;base64," + "A" * 6000

BAD: dict[str, Make] = {
    "missing file": lambda folder: (folder / "no.png", f"no such image file: {folder / 'no.png'}"),
    "missing file as text": lambda folder: (str(folder / "no.png"), f"no such image file: {folder / 'no.png'}"),
    "an undecodable name": lambda _: ("no\udcff.png", r"no such image file: 'no\udcff.png'"),
    "folder": lambda folder: (folder, f"{folder} is a folder, not an image file"),
    "empty name": lambda _: ("", "'' is a folder, not an image file"),
    "NUL in the name": lambda _: ("a\0b.png", r"cannot read 'a\x00b.png': embedded null byte"),
    "empty file": written("empty.png", b"", "is empty, not an image"),
    "no bytes": lambda _: (b"", "the image is empty, not an image"),
    "text file": written("notes.jpg", b"Dear diary,\nno picture today.\n", UNKNOWN),
    "text as bytes": lambda _: (b"no picture", f"the image {UNKNOWN}"),
    "first bytes of a PNG": written("cut.png", png_cut(8), UNKNOWN),
    "header of a JPEG": cut("cut.jpg", jpeg_cut(100), "cannot be opened as an image:"),
    "truncated JPEG": cut("cut.jpg", jpeg_cut(3000)),
    "truncated PNG": cut("cut.png", png_cut(5000)),
    "truncated GIF": cut("cut.gif", gif_cut(2000)),
    "truncated bytes": lambda _: (jpeg_cut(3000), f"the image {CUT} {pillows_words(jpeg_cut(3000))}"),
    "decompression bomb": written("bomb.png", BOMB, "has more pixels than the limit of 100,000,000; shrink it first"),
    "large": written("large.png", LARGE, "has 12000x10000 pixels, more than the limit of 100,000,000; shrink it first"),
    "large array": lambda _: (
        np.broadcast_to(np.uint8(0), (20000, 20000, 3)),
        "the image has 20000x20000 pixels, more than the limit of 100,000,000; shrink it first",
    ),
    "float array": lambda _: (np.zeros((4, 5, 3)), f"{ARRAY} float64 of (4, 5, 3)"),
    "gray array": lambda _: (noise(4, 5)[..., 0], f"{ARRAY} uint8 of (4, 5)"),
    "array with alpha": lambda _: (noise(4, 5, 4), f"{ARRAY} uint8 of (4, 5, 4)"),
    "channels first": lambda _: (noise(4, 5).transpose(2, 0, 1), f"{ARRAY} uint8 of (3, 4, 5)"),
    "batch": lambda _: (noise(4, 5)[None], f"{ARRAY} uint8 of (1, 4, 5, 3)"),
    "array without pixels": lambda _: (np.zeros((0, 5, 3), np.uint8), f"{ARRAY} uint8 of (0, 5, 3)"),
    "PIL image without pixels": lambda _: (Image.new("RGB", (0, 4)), "the image has no pixels"),
    "None": lambda _: (None, f"{SOURCE} NoneType"),
    "a list": lambda _: ([[1, 2], [3, 4]], f"{SOURCE} list"),
    "a stream": lambda _: (io.BytesIO(b"abc"), f"{SOURCE} BytesIO"),
    "a bytearray": lambda _: (bytearray(b"abc"), f"{SOURCE} bytearray"),
    "float TIFF": written("float.tiff", float_tiff(), FLOATS),
    "float bytes": lambda _: (float_tiff(), f"the image {FLOATS}"),
    "float PIL image": lambda _: (Image.new("F", (4, 4)), f"the image {FLOATS}"),
}
if sys.platform != "win32":  # which has other words for these names
    BAD |= {
        "a URL": lambda _: ("https://example.com/a.png", "no such image file: https://example.com/a.png"),
        "a line break in the name": lambda _: ("no\nsuch.png", r"no such image file: 'no\nsuch.png'"),
        "a file in a file": lambda folder: (
            written("file.png", b"x", "")(folder)[0] / "in.png",
            f"cannot read {folder / 'file.png' / 'in.png'}: {os.strerror(errno.ENOTDIR)}",
        ),
        "a picture in base64 for a name": lambda _: (
            TOO_LONG,
            f"cannot read {TOO_LONG[:299]}…: {os.strerror(errno.ENAMETOOLONG)}",
        ),
    }


def refusal(source: Any, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(ImageError) as raised:
        load_image(source, max_pixels)
    return str(raised.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    source, wanted = BAD[case](tmp_path)
    message = refusal(source)
    assert message == wanted
    assert message.isprintable()
    assert " at 0x" not in message


def test_the_limit_is_in_pixels_and_reached_is_not_passed(tmp_path: Path) -> None:
    pixels = noise(8, 9)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    for source in (path, path.read_bytes(), Image.fromarray(pixels), pixels):
        assert np.array_equal(load_image(source, max_pixels=72), pixels)
        assert refusal(source, max_pixels=71).endswith(" has 9x8 pixels, more than the limit of 71; shrink it first")


def test_the_lower_of_both_limits_is_named() -> None:
    message = "the image has more pixels than the limit of {:,}; shrink it first"
    assert refusal(BOMB, max_pixels=50) == message.format(50)
    assert refusal(BOMB, max_pixels=10**12) == message.format(2 * (Image.MAX_IMAGE_PIXELS or 0))


def test_a_picture_that_pillow_would_warn_of_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pixels = noise(12, 12)
    data = encode(Image.fromarray(pixels), "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data)).close()
    assert np.array_equal(load_image(data), pixels)


def damaged(data: bytes) -> list[bytes]:
    """Return the file cut at many places, and with some bytes changed."""
    random = np.random.default_rng(len(data))
    cuts = [data[: len(data) * part // 20] for part in range(20)]
    changed = []
    for reach in (60, 60, 60, 300, 300, 300, len(data), len(data)) * 5:
        copy = bytearray(data)
        for place in random.integers(0, min(reach, len(data)), 3):
            copy[place] = random.integers(0, 256)
        changed.append(bytes(copy))
    return cuts + changed


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "JPEG2000"])
def test_a_damaged_file_gives_a_picture_or_a_line(kind: str) -> None:
    refused = 0
    for data in damaged(encode(Image.fromarray(noise(24, 24)), kind)):
        try:
            found = load_image(data, max_pixels=10**6)
        except ImageError as error:
            refused += 1
            assert str(error).startswith("the image ")
            assert "\n" not in str(error)
            assert " at 0x" not in str(error)
        else:
            assert found.dtype == np.uint8
            assert found.ndim == 3
            assert found.shape[2] == 3
    assert refused >= 15  # cut short, most are


def test_threads_at_once_let_no_warning_out_and_leave_the_filters_alone() -> None:
    """A warning is an error here, so one that got out of Pillow would change a message or a picture."""
    rotated = encode(Image.fromarray(scene()), "PNG", exif=BROKEN_EXIF["cut after the orientation"][0])
    before, wanted = list(warnings.filters), load_image(rotated)

    def both(_: int) -> bool:
        large = (
            refusal(LARGE) == "the image has 12000x10000 pixels, more than the limit of 100,000,000; shrink it first"
        )
        return large and np.array_equal(load_image(rotated), wanted)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(200)))
    assert list(warnings.filters) == before


def test_the_suffixes_are_those_of_the_formats() -> None:
    usual = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".ico"}
    assert usual | {".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".tga"} <= image_suffixes()
    assert not {".eps", ".ps", ".pdf", ".psd", ".heic", ".mp4", ".txt", ""} & image_suffixes()
    registry = Image.registered_extensions()
    assert {registry[suffix] for suffix in image_suffixes()} == {*FORMATS}


def test_a_program_is_not_run_as_an_image() -> None:
    """Pillow hands PostScript to Ghostscript, where that is installed."""
    program = encode(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(ImageError, match="is not an image in a format that edgevlm reads"):
        load_image(program)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe.png is a device or a pipe, not an image file; use - for stdin"):
        load_image(tmp_path / "pipe.png")
