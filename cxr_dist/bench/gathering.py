"""What grows with every image that is scored: validation gathered from the ranks, and the table of a split's scores.

Real functions on made-up scores, each in a process of its own. Both hold every row in one process, so both have a largest
split that they can judge; how large is what is asked here.
"""

import time
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pyarrow as pa

from cxr_dist.bench.driver import peak_mb

__all__ = ["score_table", "validation"]

STEP_ROWS = 4096


def validation(rows: int, findings: int) -> dict[str, float]:
    """`Validation.join` on so many rows, with what `all_gather_object` brings: bytes on every rank, seconds."""
    from types import SimpleNamespace

    from cxr_dist.data.nih import FINDINGS
    from cxr_dist.data.plan import Plan, Split
    from cxr_dist.train.validation import Scored, Validation

    split = Split(num_rows=rows, row_group=8)
    plan = Plan(train=split, validation=split, seed=0, epochs=1, global_batch=STEP_ROWS)
    job: Any = SimpleNamespace(plan=plan, findings=FINDINGS[:findings], pos_weight=None)
    before, random = peak_mb(), np.random.default_rng(0)
    parts = []
    for start in range(0, rows, STEP_ROWS):
        numbers = np.arange(start, min(start + STEP_ROWS, rows))
        logits = random.normal(size=(len(numbers), findings)).astype(np.float32)
        valid = np.ones(len(numbers), bool)
        parts.append(Scored(rows_N=numbers, valid_N=valid, logits_NK=logits, labels_NK=logits > 1.5))
    began = time.perf_counter()
    sent = bytes(ForkingPickler.dumps(parts))
    del parts
    Validation.join([ForkingPickler.loads(sent)], job)
    return {"bytes": float(len(sent)), "s": time.perf_counter() - began, "mb": peak_mb() - before}


def score_table(rows: int, findings: int) -> dict[str, float]:
    """The driver's end of `evaluate.inference.score_split` on so many rows: checked, sorted, written, read again."""
    from cxr_dist.bench.vast import label_rows
    from cxr_dist.data.nih import FINDINGS
    from cxr_dist.evaluate import scores
    from cxr_dist.evaluate.inference import _checked

    before, random = peak_mb(), np.random.default_rng(0)
    labels = pa.concat_tables(label_rows(rows, 0))
    logits = random.normal(size=(rows, findings)).astype("<f4")
    scored = pa.table(
        {
            "row": np.arange(rows),
            "image_id": labels["image_id"],
            "state": np.zeros(rows, np.uint8),
            "reason": pa.nulls(rows, pa.string()),
            "labels": _fixed((logits > 1.5).astype(np.uint8)),
            "logits": _fixed(logits.view(np.uint8).reshape(rows, -1)),
        }
    )
    made, began = peak_mb(), time.perf_counter()
    table, _ = _checked(scored, labels, "test", FINDINGS[:findings], rows, 0.0)
    data = scores.encoded(table)
    return {
        "bytes": float(len(data)),
        "s": time.perf_counter() - began,
        "mb": peak_mb() - before,
        "given_mb": made - before,
    }


def _fixed(values: Any) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )
