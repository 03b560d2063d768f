"""One image, in any form that a caller may have it, to grey pixels of the model's size.

Forms: the bytes of a PNG, JPEG, DICOM or NPY file, as they are or in base64; a uint8 array [height, width], or the same as
nested lists. PNG and JPEG become pixels by `data.images.to_grey`, arrays and DICOM by the resize in it.
"""

import base64
import binascii
import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import images
from cxr_dist.data.images import ImageError
from cxr_dist.serve import dicom

__all__ = ["to_pixels"]

NPY = b"\x93NUMPY"
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")
_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def to_pixels(image: Any, size: int) -> npt.NDArray[np.uint8]:
    """uint8 [size, size]. Raises ImageError."""
    if image is None or (isinstance(image, float) and np.isnan(image)):
        raise ImageError("no image")
    if isinstance(image, str):
        image = image.encode("ascii", "replace")
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_bytes(bytes(image), size)
    if isinstance(image, np.ndarray | list | tuple):
        return images.resize(_grey(image), size)
    raise ImageError(f"a {type(image).__name__}, expected encoded bytes or a uint8 array")


def _from_bytes(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    # no image is text of this alphabet alone, and JSON requests of some kinds arrive here undecoded
    if _BASE64.fullmatch(encoded):
        try:
            encoded = base64.b64decode(encoded)
        except binascii.Error as error:
            raise ImageError(f"broken base64 ({error})") from None
    if encoded.startswith(NPY):
        return images.resize(_grey(_from_npy(encoded)), size)
    if encoded[dicom.PREAMBLE : dicom.PREAMBLE + 4] == dicom.MAGIC:
        return images.resize(dicom.decode(encoded), size)
    return images.to_grey(encoded, size)


def _from_npy(encoded: bytes) -> npt.NDArray[Any]:
    """The array of an NPY file, whose header is asked before there is room for it; no Python objects."""
    file = io.BytesIO(encoded)
    try:
        version = np.lib.format.read_magic(file)
        shape, by_column, dtype = _VERSIONS[version](file)
    except KeyError:
        raise ImageError(f"an NPY file of version {version}, expected 1.0 or 2.0") from None
    except (ValueError, EOFError) as error:
        raise ImageError(f"broken NPY header ({' '.join(str(error).split())[:100]})") from None
    if dtype != np.uint8:
        raise ImageError(f"an NPY file of {dtype}, expected uint8")
    if any(side < 0 for side in shape) or len(encoded) - file.tell() != int(np.prod(shape, dtype=object)):
        raise ImageError(f"an NPY file of shape {shape} with {len(encoded) - file.tell()} bytes of pixels")
    return np.frombuffer(encoded, np.uint8, offset=file.tell()).reshape(shape, order="F" if by_column else "C")


def _grey(array: Any) -> npt.NDArray[np.uint8]:
    """uint8 [height, width] out of an array or nested lists of whole numbers from 0 to 255."""
    listed = not isinstance(array, np.ndarray) or array.dtype == object
    try:
        found = np.array(array.tolist() if isinstance(array, np.ndarray) and listed else array)
        if found.dtype.kind in "SU":  # MLflow makes text of numbers in a column of bytes
            found = found.astype(np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ImageError(f"no array of grey levels ({' '.join(str(error).split())[:100]})") from None
    if found.ndim != 2:
        raise ImageError(f"an array of shape {found.shape}, expected [height, width], grey")
    images.check_shape(found.shape[1], found.shape[0])
    if found.dtype == np.uint8:
        return found
    if not listed or found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 255:
        raise ImageError(f"an array of {found.dtype}, expected uint8: grey levels from 0 to 255")
    return found.astype(np.uint8)
