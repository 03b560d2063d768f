"""Damaged score tables, our own and those of other programs: an error in a line, or the scores that the file holds."""

import contextlib
import csv
import gzip
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_dist.data import nih
from cxr_dist.errors import InputError
from cxr_dist.evaluate import external, scores
from cxr_dist.evaluate.scores import ScoreTable
from tests.fuzz import mutate
from tests.fuzz.errors import sentence
from tests.fuzz.mutate import Rng

NUM_IMAGES = 12
IDS = [f"{patient:08d}_000.png" for patient in range(1, NUM_IMAGES + 1)]
FINDINGS = ("Mass", "Effusion", "Pleural_Thickening")


def prepare() -> Callable[[int, Rng], bool]:
    """The function that makes a case and judges what comes of it."""
    rows = [f"{name},Mass,0,{patient},50,M,PA" for patient, name in enumerate(IDS, start=1)]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    labels = nih.read_labels("\n".join([header, *rows]).encode(), "labels")
    own = _own()
    frame = pd.DataFrame({"image_id": IDS, **{f"prob_{f}": own.probabilities_NK[:, k] for k, f in enumerate(FINDINGS)}})
    text, parquet = frame.to_csv(index=False).encode(), io.BytesIO()
    frame.to_parquet(parquet)
    path = Path(tempfile.mkdtemp(prefix="cxr-fuzz-")) / "scores"

    def check(number: int, rng: Rng) -> bool:
        kind = number % 4
        original = (scores.encoded(own), text, gzip.compress(text, mtime=0), parquet.getvalue())[kind]
        data = mutate.damaged(rng, original)
        path.write_bytes(data)
        try:
            found = scores.read(path) if kind == 0 else external.read_external(path, labels, nih.FINDINGS)
        except InputError as error:
            return sentence(error, str(path))
        if kind in (0, 2):  # both are held to checksums
            _same(found, own, logits=kind == 0)
        elif kind == 1:
            _as_written(found, data)
        assert ((found.probabilities_NK >= 0) & (found.probabilities_NK <= 1)).all()
        return True

    return check


def _own() -> ScoreTable:
    logits = np.random.default_rng(1).normal(0, 2, (NUM_IMAGES, len(FINDINGS))).astype(np.float32)
    return ScoreTable(
        image_ids=np.array(IDS),
        patient_ids=np.arange(1, NUM_IMAGES + 1),
        split="test",
        findings=FINDINGS,
        probabilities_NK=1 / (1 + np.exp(-logits.astype(np.float64))),
        logits_NK=logits,
        labels_NK=logits > 0,
    )


def _same(found: ScoreTable, own: ScoreTable, *, logits: bool) -> None:
    assert found.image_ids.tolist() == own.image_ids.tolist()
    assert found.patient_ids.tolist() == own.patient_ids.tolist()
    assert (found.split, set(found.findings)) == (own.split, set(own.findings))
    for k, finding in enumerate(found.findings):
        at = own.findings.index(finding)
        assert (found.probabilities_NK[:, k] == own.probabilities_NK[:, at]).all()
        if logits:
            assert found.logits_NK is not None
            assert (found.logits_NK[:, k] == own.logits_NK[:, at]).all()
            assert (found.labels_NK[:, k] == own.labels_NK[:, at]).all()


def _as_written(found: ScoreTable, data: bytes) -> None:
    """Every row of the CSV by Python's own reader, in its order."""
    header, *rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
    assert found.image_ids.tolist() == [row[header.index("image_id")] for row in rows]
    for k, finding in enumerate(found.findings):
        column = header.index(f"prob_{finding}") if f"prob_{finding}" in header else header.index(finding)
        with contextlib.suppress(OverflowError):
            assert found.probabilities_NK[:, k].tolist() == [float(row[column]) for row in rows]
