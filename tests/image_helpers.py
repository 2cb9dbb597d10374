"""Images for tests: a picture, ways to encode it, and files that must be refused."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
PICTURE = Image.fromarray(RGB)  # 64 wide, 40 high


GRAY = PICTURE.convert("L")


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(GRAY)
    return image


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Write a PNG with 16 bits in each of three channels, which PIL cannot."""
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


JPEG, PNG = encoded(PICTURE, format="JPEG"), encoded(PICTURE, format="PNG")


WEBP = encoded(PICTURE, format="WEBP")
DAMAGED = "image files that are damaged"


FOREIGN = "image files of another format"


def bomb(side: int) -> bytes:
    """Write a PNG that claims to be huge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return PNG[:8] + header + PNG[33:]


def scans(number: int) -> bytes:
    """Write a progressive JPEG that repeats its last scan."""
    content = encoded(PICTURE, format="JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:-2] + content[start:-2] * number + content[-2:]


BAD: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", DAMAGED, "is empty"),
    "text": (b"not an image", FOREIGN, "is no JPEG, PNG, WebP, BMP, TIFF or GIF"),
    "jpeg 2000": (
        encoded(PICTURE, format="JPEG2000"),
        FOREIGN,
        "is no JPEG, PNG, WebP, BMP, TIFF or GIF",
    ),
    "hundreds of scans": (
        scans(300),
        "image files with too many scans",
        "has 310 scans",
    ),
    "wav": (b"RIFF1234WAVEfmt " * 9, FOREIGN, "is no JPEG, PNG, WebP, BMP, TIFF or GIF"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], DAMAGED, "is damaged: Truncated File Read"),
    "jpeg without its end": (JPEG[:-1], DAMAGED, "Image is incomplete or truncated"),
    "half a progressive jpeg": (
        encoded(PICTURE, format="JPEG", progressive=True)[:-200],
        DAMAGED,
        "Image is incomplete or truncated",
    ),
    "half a png": (PNG[: len(PNG) // 2], DAMAGED, "is truncated"),
    "png without its end": (PNG[:-12], DAMAGED, "is truncated"),
    "half a webp": (WEBP[: len(WEBP) // 2], DAMAGED, "is damaged"),
    "16 bits, gray": (
        encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), format="PNG"),
        "image files with 16 bits per channel",
        "has 16 bits per channel",
    ),
    "16 bits, colour": (
        png_of_16_bits(RGB),
        "image files with 16 bits per channel",
        "has 16 bits per channel",
    ),
    "90 megapixels": (
        bomb(9500),
        "images over 89 megapixels",
        "has 9500 x 9500 pixels",
    ),
    "900 megapixels": (bomb(30000), "images over 89 megapixels", "900000000 pixels"),
    "another size": (
        encoded(PICTURE.resize((60, 40)), format="JPEG"),
        "image files of another size than annotated",
        "is 60 x 40, the annotations say 64 x 40",
    ),
}
