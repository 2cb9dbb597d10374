"""Image files: what their header says, and decoding them to uint8 RGB, turned as viewers show them.

Every format but JPEG and WebP is decoded by PIL. Every failure is an `ImageError` that says why.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from data.coco_rules import MAX_PIXELS
from utils import LocalError

MAX_SCANS = 100  # of a progressive JPEG: encoders write about ten, and each costs a full decoding
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# EXIF orientations: which axes of the image [3, H, W] to flip, from 5 on after transposing it.
_EXIF_FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}


class ImageError(LocalError):
    """An image that cannot be read as its annotations say; `rule` is one of `coco_rules.RULES`."""

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded; sizes are (H, W)."""

    stored: tuple[int, int]
    orientation: int  # of EXIF, 1 to 8
    is_slow: bool  # not decoded by torchvision, nor a PNG
    is_animated: bool

    @property
    def shown(self) -> tuple[int, int]:
        """The size after EXIF turned the image, as viewers show it."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def is_ambiguous(self) -> bool:
        """Whether EXIF turns the image and its size does not tell."""
        return self.orientation > 1 and self.shown == self.stored


def read_header(path: Path) -> Header:
    """Read the header of an image file.

    Raises:
        ImageError: if it is missing, of another format than `IMAGE_FORMATS`, or damaged.
    """
    if not path.is_file():
        raise ImageError("is missing", "image files missing")
    if path.stat().st_size == 0:
        raise ImageError("is empty", "image files that are damaged")
    with _image_errors(), Image.open(path, formats=IMAGE_FORMATS) as image:
        return _header_of(image)


def _header_of(image: Image.Image) -> Header:
    width, height = image.size
    orientation = 1
    # PIL turns TIFF by itself. Asking costs 0.1 ms, so files without EXIF or XMP are not asked.
    may_be_turned = image.format == "PNG" or not image.info.keys().isdisjoint(("exif", "xmp"))
    if image.format != "TIFF" and may_be_turned:
        orientation = image.getexif().get(0x0112, 1)
    if orientation not in _EXIF_FLIPS:
        orientation = 1
    can_move = image.format in ("WEBP", "GIF", "PNG")  # frames of others are pages, or previews
    is_animated = can_move and getattr(image, "is_animated", False)
    # torchvision refuses an animated WebP.
    is_slow = image.format in ("BMP", "TIFF", "GIF") or (image.format == "WEBP" and is_animated)
    return Header((height, width), orientation, is_slow, is_animated)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        reason = "is no JPEG, PNG, WebP, BMP, TIFF or GIF"
        raise ImageError(reason, "image files of another format") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), "images over 89 megapixels") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).split("\n")[0])
        raise ImageError(f"is damaged: {reason}", "image files that are damaged") from None


def read_image(path: Path, root: Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode an image file to uint8 RGB, `[3, H, W]`.

    Alpha is dropped, gray repeated; of an animation the first frame is read. EXIF turns the image,
    as viewers show it, unless the annotated `size` (H, W) is that of the stored pixels only. PNG is
    decoded by PIL, which takes 1.2 times as long: torchvision's decoder crashes the process on most
    damaged PNG files (0.29.1).

    Raises:
        ImageError: if its name leaves `root` (links may), or the file is of another format than
            `IMAGE_FORMATS`, is damaged, has 16 bits per channel, or has another size than `size`.
    """
    if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), "")):
        raise ImageError("lies outside", "file_name not below the image folder")
    if not path.is_file():  # a folder, or a pipe, which would keep its reader waiting
        reason = "is missing" + (": not a regular file" if path.exists() else "")
        raise ImageError(reason, "image files missing")
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise ImageError(reason, "image files that cannot be read") from None
    if not data:
        raise ImageError("is empty", "image files that are damaged")
    with _image_errors():
        file = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        header = _check_header(file, data, size)
        if file.format == "PNG" or header.is_slow:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        else:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
    if header.orientation == 1 or size not in (None, header.shown):
        return image
    turned = image.transpose(1, 2) if header.orientation >= 5 else image
    return turned.flip(_EXIF_FLIPS[header.orientation])


def _check_header(file: Image.Image, data: bytes, size: tuple[int, int] | None) -> Header:
    """Check what can be checked before decoding."""
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels", "images over 89 megapixels")
    if _bits_per_channel(file, data) > 8:
        raise ImageError("has 16 bits per channel", "image files with 16 bits per channel")
    if file.format == "PNG" and b"IEND" not in data:
        raise ImageError("is truncated", "image files that are damaged")
    if "progressive" in file.info and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(f"has {scans} scans", "image files with too many scans")
    header = _header_of(file)
    if size is None or size in (header.stored, header.shown):
        return header
    raise ImageError(
        f"is {width} x {height}, the annotations say {size[1]} x {size[0]}",
        "image files of another size than annotated",
    )


def _bits_per_channel(file: Image.Image, data: bytes) -> int:
    if file.format == "PNG":
        return data[24]
    if file.format == "TIFF":  # PIL would cut RGB of 16 bits down to 8
        bits = file.tag_v2.get(258, 1)  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else bits
    return 8
