"""Small NIH-shaped releases for tests: grey noise PNGs, a label CSV and the two official lists."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_dist.data.nih import FINDINGS

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
TEST_PATIENTS = 4
"""Every fourth patient is in the test list."""


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """The bytes of a PNG with these pixels, converted to `mode` if one is given."""
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, "png")
    return out.getvalue()


def noise(seed: int, side: int) -> np.ndarray:
    """uint8 [side, side], a ramp with noise: compresses little, and no two seeds agree."""
    ramp = np.linspace(40, 200, side)[None, :] + np.linspace(-20, 20, side)[:, None]
    return (ramp + np.random.default_rng(seed).integers(0, 30, (side, side))).astype(np.uint8)


def bomb(side: int = 100_000, height: int | None = None) -> bytes:
    """A PNG whose header claims side x side pixels, or another height."""
    data = bytearray(png(noise(0, 8)))
    data[16:24] = side.to_bytes(4, "big") + (side if height is None else height).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def write_release(folder: Path, num_patients: int = 30, per_patient: int = 3, side: int = 64) -> dict[str, bytes]:
    """Write images/, Data_Entry_2017.csv and the lists; give name to PNG bytes.

    Patient p shows finding p % 15 in every image (14 is none); every fourth patient is in the test list.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    rows = [HEADER]
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    for patient in range(1, num_patients + 1):
        for follow_up in range(per_patient):
            name = f"{patient:08d}_{follow_up:03d}.png"
            files[name] = png(noise(patient * 100 + follow_up, side))
            (folder / "images" / name).write_bytes(files[name])
            finding = (*FINDINGS, "No Finding")[patient % 15]
            rows.append(
                f"{name},{finding},{follow_up},{patient},{20 + patient},{'MF'[patient % 2]},PA,{side},{side},0.1,0.1"
            )
            lists["test_list.txt" if patient % TEST_PATIENTS == 0 else "train_val_list.txt"].append(name)
    (folder / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n")
    for file, names in lists.items():
        (folder / file).write_text("\n".join(names))
    return files


def write_archives(folder: Path, release: Path, parts: int = 3) -> None:
    """The same release as `images_001.tar.gz`…, images dealt to the archives in name order."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt"):
        (folder / file).write_bytes((release / file).read_bytes())
    names = sorted(path.name for path in (release / "images").iterdir())
    for part in range(parts):
        members = [(f"images/{name}", (release / "images" / name).read_bytes()) for name in names[part::parts]]
        write_tar(folder / f"images_{part + 1:03d}.tar.gz", members)


def write_tar(path: Path, members: list[tuple[str, bytes]], special: tarfile.TarInfo | None = None) -> None:
    """A gzipped archive of plain files, and one more member as given."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if special is not None:
            tar.addfile(special, io.BytesIO(b""))
