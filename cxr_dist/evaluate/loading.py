"""Score tables that a job is given: with the labels of one CSV if there is one, cleaned, held to the official test list."""

import numpy as np
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.config import Config, DataConfig
from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.external import read_external
from cxr_dist.evaluate.scores import ScoreTable, read

__all__ = ["load", "missing_from_test_list", "read_labels"]


def read_labels(data: DataConfig) -> pa.Table | None:
    """The table of `data.labels`; None where none is given."""
    if not data.labels:
        return None
    try:
        return nih.read_labels(storage.read_bytes(data.labels), storage.shown(data.labels))
    except FileNotFoundError:
        raise DataError(f"data.labels: no file at {storage.shown(data.labels)}") from None


def load(config: Config, labels: pa.Table | None, path: str, split: str) -> tuple[ScoreTable, int]:
    """A score table, cleaned as the label set is, and how many images that left out.

    Without `labels` it must be a table of ours, which has its own.
    """
    if labels is None:
        return read(path), 0
    skipped = config.train.skip_findings
    findings = tuple(finding for finding in nih.LABEL_SETS[config.data.label_set] if finding not in skipped)
    scores = read_external(path, labels, findings, split=split)
    kept = nih.clean(labels, config.data.label_set)["image_id"].to_pylist()
    keep_N = np.isin(scores.image_ids, np.array(kept, dtype=np.str_))
    return scores.select(keep_N), int((~keep_N).sum())


def missing_from_test_list(data: DataConfig, labels: pa.Table | None, scores: ScoreTable) -> int | None:
    """How many images of `data.test_list` have no score, after the label set's cleaning; None without a list.

    Raises DataError for scored images that are not in the list: they may be training images.
    """
    if not data.test_list:
        return None
    where = storage.shown(data.test_list)
    listed = set(nih.read_list(storage.read_bytes(data.test_list), where))
    foreign = sorted(set(scores.image_ids.tolist()) - listed)
    if foreign:
        raise DataError(
            f"scores: found {len(foreign)} images that are not in the test list {where} (first {foreign[0]}), expected "
            "only its images; they may have been trained on: leave them out, or data.test_list empty"
        )
    if labels is not None:
        listed &= set(nih.clean(labels, data.label_set)["image_id"].to_pylist())
    return len(listed) - len(scores)
