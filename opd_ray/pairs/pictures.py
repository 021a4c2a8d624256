"""One picture of a data set: from the bytes of its file to the model's size."""

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "BadPicture", "decoded", "orientation", "prepared", "upright"]

LONGEST = 16
FORMATS = ("JPEG", "PNG", "WEBP")


class BadPicture(ValueError):
    """Its bytes are missing, cut off, or no picture."""


def prepared(data: bytes | None, side: int) -> npt.NDArray[np.uint8]:
    """Shorter side to ``side`` (bilinear, antialiased), then the square in the middle, as Diffusion-DPO's data does.

    Args:
        data: of a JPEG, PNG or WebP file.
        side: height and width in pixels.

    Returns:
        [side, side, 3] in 0..255.

    Raises:
        BadPicture: why it cannot be read.
    """
    from PIL import Image

    picture = decoded(data)
    width, height = picture.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:  # it would be as long once the other side has its size
        raise BadPicture(f"is {width} x {height}, longer than {LONGEST} times its other side")
    if short != side:
        width, height = (side if edge == short else max(side, int(side * edge / short)) for edge in (width, height))
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def decoded(data: bytes | None) -> "Image":
    """A picture in RGB, whole.

    Raises:
        BadPicture: why it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError  # only who reads pictures imports it

    if not data:
        raise BadPicture("is missing")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise BadPicture("has more pixels than any picture here should") from None
    except UnidentifiedImageError:
        raise BadPicture(f"is no {', '.join(FORMATS)}; its {len(data)} bytes begin with {data[:4].hex()}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:  # all that Pillow raises
        raise BadPicture(f"is broken ({' '.join(str(error).split())})") from None


def orientation(picture: "Image") -> int:
    """How a camera was held, 1 to 8 (EXIF 2.32, tag 274): from 5 on width and height are exchanged; 1 if unknown.

    Only what stands before the pixels of a file is looked at, so that this does not decode them.
    """
    from PIL import ExifTags, Image

    try:
        found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, struct.error):  # no reason to refuse the picture
        return 1
    return found if isinstance(found, int) and found in range(1, 9) else 1


def upright(picture: "Image") -> "Image":
    """As whoever took it saw it, and as browsers show it."""
    from PIL.Image import Transpose

    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
    turns |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
    turn = turns.get(orientation(picture))
    return picture if turn is None else picture.transpose(turn)
