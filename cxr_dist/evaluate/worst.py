"""The worst errors: the images that a model was most sure of and wrong about, to be looked at."""

from collections.abc import Mapping
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["Example", "worst_errors"]

Kind = Literal["false positive", "false negative", "true positive"]


class Example(TypedDict):
    """One image as an example of one finding, with its pictures if there are any."""

    finding: str
    image_id: str
    probability: float
    label: bool
    kind: Kind
    thumbnail_png: bytes | None
    """The image as the network sees it."""
    overlay_png: bytes | None
    """The same with what the network looked at."""


def worst_errors(scores: ScoreTable, thresholds: Mapping[str, float], *, per_kind: int = 3) -> list[Example]:
    """Per finding, the false positives with the highest and the false negatives with the lowest probability.

    At most `per_kind` of each, from different patients (images of one patient are wrong alike, and show less), worst
    first; of equals the image id that sorts first. A finding without a threshold has none.
    """
    out: list[Example] = []
    for k, finding in enumerate(scores.findings):
        if finding not in thresholds:
            continue
        probability, label = scores.probabilities_NK[:, k], scores.labels_NK[:, k]
        called = probability >= thresholds[finding]
        sides: tuple[tuple[Kind, NDArray[np.bool_], NDArray[np.float64]], ...] = (
            ("false positive", called & ~label, -probability),
            ("false negative", ~called & label, probability),
        )
        for kind, wrong, badness in sides:
            rows = np.flatnonzero(wrong)
            rows = rows[np.lexsort((scores.image_ids[rows], badness[rows]))]
            _, first = np.unique(scores.patient_ids[rows], return_index=True)
            out += [
                Example(
                    finding=finding,
                    image_id=str(scores.image_ids[row]),
                    probability=float(probability[row]),
                    label=bool(label[row]),
                    kind=kind,
                    thumbnail_png=None,
                    overlay_png=None,
                )
                for row in rows[np.sort(first)[:per_kind]]
            ]
    return out
