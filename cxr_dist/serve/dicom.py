"""From a DICOM file to 8-bit grey at its own size: the modality's rescaling, then the window that the file asks for.

NIH's own PNG files were made that way, with "the default window settings stored in the DICOM header files" (Wang et al.,
2017). Without a window the whole range of the stored bits becomes 0 to 255. MONOCHROME1 is inverted, so that air is dark.
One frame, one sample a pixel. Needs pydicom, which is installed beside a model only where it is wanted; what a compressed
file needs beside it (pylibjpeg), pydicom says itself.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.images import ImageError, check_shape

__all__ = ["MAGIC", "PREAMBLE", "decode"]

PREAMBLE, MAGIC = 128, b"DICM"
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Transfer syntax whose whole content is inflated before anything of it can be asked."""
GREY = ("MONOCHROME1", "MONOCHROME2")


def decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    """uint8 [height, width]. Raises ImageError."""
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise ImageError("a DICOM file, which takes pydicom; install it beside the model") from None
    if DEFLATED in encoded:
        raise ImageError("a deflated DICOM file; store it without")
    try:
        dataset = pydicom.dcmread(io.BytesIO(encoded))
        _check(dataset)
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
        low, high = _range(dataset)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom and its decoders raise every kind for bytes that are not DICOM
        raise ImageError(f"cannot be decoded: {' '.join(str(error).split())[:160] or type(error).__name__}") from None
    if not high > low:  # of a negative slope pydicom's window would make black white
        raise ImageError(f"grey values from {low:g} to {high:g}, expected a range that rises")
    levels = np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return 255 - levels if dataset.PhotometricInterpretation == "MONOCHROME1" else levels


def _check(dataset: Any) -> None:
    """Whether it is one grey image that may be decoded: raises ImageError if not."""
    kind, samples = dataset.get("PhotometricInterpretation"), dataset.get("SamplesPerPixel", 1)
    if kind not in GREY or samples != 1:
        raise ImageError(f"a DICOM image of {kind} with {samples} samples a pixel, expected grey")
    if (frames := int(dataset.get("NumberOfFrames", 1) or 1)) != 1:
        raise ImageError(f"a DICOM file of {frames} frames, expected one")
    check_shape(int(dataset.Columns), int(dataset.Rows))


def _range(dataset: Any) -> tuple[float, float]:
    """What becomes black and white: the ends of the values that pydicom's look-up tables and windows give."""
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        if tables := dataset.get(name):
            return 0.0, float(2 ** int(tables[0].LUTDescriptor[2]) - 1)
    bits = int(dataset.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:  # one without the other is not applied
        return float(low), float(high)
    return low * float(slope) + float(intercept), high * float(slope) + float(intercept)
