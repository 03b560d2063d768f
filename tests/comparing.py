"""Score tables of models whose differences are known."""

import dataclasses

import numpy as np

from cxr_dist.evaluate.scores import ScoreTable

FINDINGS = ("Effusion", "Mass", "Nodule")


def table(num: int = 240, *, split: str = "test", first: int = 0, findings: tuple[str, ...] = FINDINGS) -> ScoreTable:
    """Scores that know something of their labels, three images a patient; equal arguments give the same."""
    rng = np.random.default_rng(first)
    labels = rng.random((num, len(findings))) < 0.3
    return ScoreTable(
        image_ids=np.array([f"{first + i:08d}_000.png" for i in range(num)], dtype=np.str_),
        patient_ids=first + np.arange(num) // 3,
        split=split,
        findings=findings,
        probabilities_NK=np.clip(rng.normal(0.2 + 0.3 * labels, 0.12), 0.001, 0.999),
        logits_NK=None,
        labels_NK=labels,
    )


def noised(scores: ScoreTable, finding: str, spread: float = 1.0) -> ScoreTable:
    """The same scores but for one finding's, which know next to nothing any more."""
    values = scores.probabilities_NK.copy()
    noise = np.random.default_rng(1).random(len(scores))
    k = scores.findings.index(finding)
    values[:, k] = (1 - spread) * values[:, k] + spread * noise
    return dataclasses.replace(scores, probabilities_NK=values)
