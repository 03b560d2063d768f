"""One part of the predictions: a Parquet file with a row an image, which tells of itself what it must be.

Columns: image_id (path below the prefix, or the dataset's id), uri (the file it was read from), status (`ok` or
`unreadable`), reason (why it is unreadable, else null), for each finding prob_<finding> (float32) and flag_<finding>
(bool, probability >= threshold; both null for an unreadable image), model_version. `prob_` is what `jobs/evaluate.py`
reads. The file's metadata hold the SHA-256 of the plan, the part's number and a SHA-256 of its content.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data.tables import read_table
from cxr_dist.errors import RunError
from cxr_dist.predict.plan import part_name

__all__ = ["FORMAT", "OK", "UNREADABLE", "DamagedPartError", "PartFile", "make_part", "read_part", "write_part"]

FORMAT = "cxr-dist/predictions/1"
OK, UNREADABLE = "ok", "unreadable"
NAMED = 10
"""Unreadable images of a part that are named."""
_FACTS = b"cxr_dist"


class DamagedPartError(ValueError):
    """A file that is not the whole part it should be; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """A part as it lies in storage, checked."""

    path: str
    rows: int
    unreadable: int
    bytes: int
    sha256: str
    first: tuple[tuple[str, str], ...] = ()
    """The first unreadable images and why."""


def make_part(
    image_ids: Sequence[str],
    uris: Sequence[str],
    reasons: Sequence[str | None],
    logits_NK: npt.NDArray[np.float32],
    *,
    thresholds: Mapping[str, float],
    model_version: str,
) -> pa.Table:
    """The rows of a part; `logits_NK` are those of its readable images alone (reason None), in order.

    RunError for a logit that is no number.
    """
    readable = np.array([reason is None for reason in reasons], np.bool_)
    if logits_NK.shape != (readable.sum(), len(thresholds)):
        raise RunError(f"found scores of shape {logits_NK.shape}, expected ({readable.sum()}, {len(thresholds)})")
    if not (whole := np.isfinite(logits_NK).all(axis=1)).all():
        name = np.array(image_ids)[readable][~whole][0]
        raise RunError(f"{name}: found a score that is no number; look at the model's weights and precision")
    probabilities = np.zeros((len(readable), len(thresholds)), np.float32)
    with np.errstate(over="ignore"):  # of a logit below -700 the probability is 0 all the same
        probabilities[readable] = 1 / (1 + np.exp(-logits_NK.astype(np.float64)))
    columns = [
        pa.array(image_ids, pa.string()),
        pa.array(uris, pa.string()),
        pa.array(np.where(readable, OK, UNREADABLE).tolist(), pa.string()),
        pa.array([reason and " ".join(reason.split()) for reason in reasons], pa.string()),
    ]
    for k, threshold in enumerate(thresholds.values()):
        columns.append(pa.array(probabilities[:, k], pa.float32(), mask=~readable))
        columns.append(pa.array(probabilities[:, k] >= np.float32(threshold), pa.bool_(), mask=~readable))
    columns.append(pa.array([model_version] * len(readable), pa.string()))
    return pa.table(columns, schema=part_schema(list(thresholds)))


def write_part(out: str, number: int, table: pa.Table, plan_sha256: str) -> None:
    """Store a part in one piece. The same table gives the same bytes (with the same pyarrow)."""
    facts = {
        "format": FORMAT,
        "plan": plan_sha256,
        "part": number,
        "rows": len(table),
        "content": content_sha256(table),
    }
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_FACTS: json.dumps(facts)}), sink, compression="zstd")
    storage.put_atomic(storage.join(out, part_name(number)), sink.getvalue())


def read_part(out: str, number: int, plan_sha256: str, image_ids: Sequence[str], findings: Sequence[str]) -> PartFile:
    """A part of the plan that holds a row for exactly these images, in order. Raises DamagedPartError, FileNotFoundError."""
    name = part_name(number)
    data = storage.read_bytes(storage.join(out, name))
    try:
        table = read_table(data)
        facts = json.loads((table.schema.metadata or {})[_FACTS])
        if not table.schema.equals(part_schema(findings)):
            raise DamagedPartError(f"found other columns than those of {len(findings)} findings")
        content, names = content_sha256(table), table["image_id"].to_pylist()
    except DamagedPartError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedPartError(f"cannot be read ({' '.join(str(error).split())[:120]})") from None
    expected = {"format": FORMAT, "plan": plan_sha256, "part": number, "rows": len(image_ids)}
    for key, value in expected.items():
        if facts.get(key) != value:
            raise DamagedPartError(f"found {key} {facts.get(key)!r}, expected {value!r}")
    if content != facts.get("content"):
        raise DamagedPartError("found other content than was written")
    if names != list(image_ids):
        raise DamagedPartError(f"found other images than the {len(image_ids)} of the plan")
    unreadable = table.filter(pc.equal(table["status"], UNREADABLE))
    first = unreadable.slice(0, NAMED)
    return PartFile(
        path=name,
        rows=len(table),
        unreadable=len(unreadable),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        first=tuple(zip(first["image_id"].to_pylist(), first["reason"].to_pylist(), strict=True)),
    )


def part_schema(findings: Sequence[str]) -> pa.Schema:
    """Columns of a part."""
    texts = [(name, pa.string()) for name in ("image_id", "uri", "status", "reason")]
    scores = [pair for name in findings for pair in ((f"prob_{name}", pa.float32()), (f"flag_{name}", pa.bool_()))]
    return pa.schema([*texts, *scores, ("model_version", pa.string())])


def content_sha256(table: pa.Table) -> str:
    """SHA-256 of names, types and values; of an absent value only that it is."""
    digest = hashlib.sha256()
    for field in table.schema:
        column = table[field.name].combine_chunks()
        digest.update(f"{field.name} {field.type} {len(column)}\n".encode())
        if pa.types.is_string(field.type):
            digest.update(json.dumps(column.to_pylist()).encode())
            continue
        digest.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        absent = pa.scalar(False if pa.types.is_boolean(field.type) else 0, field.type)
        digest.update(column.fill_null(absent).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
