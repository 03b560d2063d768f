"""DICOM files to grey levels: hand-worked windows, ranges and inversions, against files that pydicom writes."""

import io
import re
import sys
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom is an extra: pip install cxr-dist[dicom]")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage  # noqa: E402

from cxr_dist.data.images import ImageError, resize  # noqa: E402
from cxr_dist.serve import dicom  # noqa: E402
from cxr_dist.serve.pixels import to_pixels  # noqa: E402

VALUES = np.array([[0, 1000, 2000], [3000, 4000, 4095]], np.uint16)


def file(values: np.ndarray = VALUES, syntax: str = ExplicitVRLittleEndian, bits: int = 12, **elements: Any) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = values.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize(("encoded", "expected"), [
    (file(), [[0, 62, 125], [187, 249, 255]]),  # v / 4095 * 255
    (file(PhotometricInterpretation="MONOCHROME1"), [[255, 193, 130], [68, 6, 0]]),
    # linear window, PS3.3 C.11.2.1.2.1: ((v - (c - 0.5)) / (w - 1) + 0.5) * 255
    (file(WindowCenter=2000.5, WindowWidth=2001), [[0, 0, 128], [255, 255, 255]]),
    (file(WindowCenter=2000.5, WindowWidth=4001), [[0, 64, 128], [191, 255, 255]]),
    (file(RescaleSlope=2, RescaleIntercept=-100), [[0, 62, 125], [187, 249, 255]]),
    (file(WindowCenter=3900.5, WindowWidth=4001, RescaleSlope=2, RescaleIntercept=-100), [[0, 0, 128], [255, 255, 255]]),
    (file((VALUES // 16).astype(np.uint8), bits=8), (VALUES // 16).tolist()),
    (file(VALUES.astype(np.int16) - 2048, bits=12), [[0, 62, 125], [187, 249, 255]]),
], ids=["bits", "inverted", "window", "wide window", "rescaled", "rescaled window", "8 bits", "signed"])  # fmt: skip
def test_levels(encoded: bytes, expected: list[list[int]]) -> None:
    levels = dicom.decode(encoded)
    assert levels.dtype == np.uint8
    assert levels.tolist() == expected
    assert np.array_equal(to_pixels(encoded, 32), resize(levels, 32))


@pytest.mark.parametrize(("encoded", "reason"), [
    (file(np.zeros((2, 4, 4), np.uint16), NumberOfFrames=2), "a DICOM file of 2 frames, expected one"),
    (file(PhotometricInterpretation="PALETTE COLOR"), "a DICOM image of PALETTE COLOR with 1 samples a pixel, expected grey"),
    (file(Rows=40000), "3 x 40000 pixels, a side longer than the 32768 that are decoded"),
    (file(Rows=3), "cannot be decoded: "),
    (file(RescaleSlope=-1, RescaleIntercept=0), "grey values from 0 to -4095, expected a range that rises"),
    (file(syntax=DeflatedExplicitVRLittleEndian), "a deflated DICOM file; store it without"),
    (file()[:200], "a DICOM image of None"),
    (file()[:-1], "cannot be decoded: "),
    (bytes(128) + b"DICM", "a DICOM image of None"),
])  # fmt: skip
def test_what_is_refused(encoded: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=re.escape(reason)):
        to_pixels(encoded, 32)


def test_without_pydicom_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match="a DICOM file, which takes pydicom; install it beside the model"):
        to_pixels(file(), 32)
