"""The champion of a registered model: moved only to a version that is better on validation, by a test that resamples patients.

Better means a higher mean AUROC, by `evaluate.paired` (two-sided p below 0.05, one question, nothing to correct for).

Both versions' validation scores lie with their checkpoints. They must be of the same images with the same labels: else
there is nothing to decide, and that is said. Test scores are never looked at. Each decision is written to the version's
tags, whichever way it went. Two promotions of one model at the same moment are not kept apart by MLflow: the alias is
looked at again before it is moved, and that is all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cxr_dist import storage
from cxr_dist.errors import InputError
from cxr_dist.evaluate import paired, scores
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.predict.model import find_model
from cxr_dist.train.checkpoint import find_checkpoint

__all__ = ["ALIAS", "Decision", "champion_of", "promote", "validation_of"]

ALIAS = "champion"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version became the champion, and why."""

    version: str
    """NAME/NUMBER."""
    champion: str
    """NAME/NUMBER of the champion that it was compared with; empty: there was none."""
    promoted: bool
    reason: str
    """One sentence, for people."""
    difference: float | None = None
    """Of validation mean AUROC, this version's less the champion's."""
    lower: float | None = None
    upper: float | None = None
    """95 % interval of the difference."""
    p: float | None = None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def tags(self) -> dict[str, str]:
        """As tags of the version."""
        values: Mapping[str, Any] = {
            "promotion": "promoted" if self.promoted else "not promoted",
            "promotion.reason": self.reason,
            "promotion.compared_with": self.champion or "no champion",
            "promotion.difference": self.difference,
            "promotion.interval": None if self.lower is None else f"{self.lower:.6g} to {self.upper:.6g}",
            "promotion.p": self.p,
        }
        texts = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
        return {key: str(value) for key, value in texts.items() if value is not None}


def promote(client: MlflowClient, name: str, number: str, *, bootstrap: int, seed: int) -> Decision:
    """Decide about a version, write the decision to it, and move the alias if it is to be moved.

    What cannot be compared (no validation scores, other images) is a decision too: it is written, and the alias stays.
    InputError if the alias was moved by somebody else meanwhile.
    """
    version, champion = f"{name}/{number}", champion_of(client, name)
    try:
        decision = _decide(client, version, champion, bootstrap, seed)
    except InputError as error:
        decision = Decision(version=version, champion=champion, promoted=False, reason=f"not compared: {error}")
    if decision.promoted:
        if champion_of(client, name) != champion:
            raise InputError(
                f"{name}@{ALIAS}: found another champion than at first, {champion or 'none'}; promote again"
            )
        client.set_registered_model_alias(name, ALIAS, number)
    if decision.version != champion:  # what was once decided of the champion stays with it
        _write(client, decision)
    return decision


def champion_of(client: MlflowClient, name: str) -> str:
    """NAME/NUMBER of the champion; empty if there is none."""
    try:
        return f"{name}/{client.get_model_version_by_alias(name, ALIAS).version}"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return ""


def validation_of(client: MlflowClient, version: str) -> ScoreTable:
    """The validation scores with a version's checkpoint; InputError if it has none."""
    with find_model(f"models:/{version}", client.tracking_uri) as model:
        _, checkpoints, entry = find_checkpoint(model.uri)
        if entry.scores is None:
            raise InputError(
                f"models:/{version}: found no validation scores with its checkpoint, expected those of an epoch's end; "
                "register the run's best checkpoint"
            )
        checkpoints.read_scores(entry)
        return scores.read(storage.join(checkpoints.folder, entry.scores))


def _decide(client: MlflowClient, version: str, champion: str, bootstrap: int, seed: int) -> Decision:
    challenger = validation_of(client, version)
    if version == champion:
        return Decision(version=version, champion=champion, promoted=False, reason="it is the champion already")
    if not champion:
        return Decision(
            version=version, champion="", promoted=True, reason="the first: there was no champion to compare with"
        )
    holder = validation_of(client, champion)
    _check_same(version, challenger, champion, holder)
    found = paired.compare(*paired.align(challenger, holder), bootstrap=bootstrap, seed=seed).auroc["mean"]
    better = found.decision == "win"
    if found.decision is None:
        reason = f"undecided: {found.reason or f'{bootstrap} resamples are too few; raise evaluate.bootstrap'}"
    else:
        reason = f"validation mean AUROC {found.difference.value:+.4f} against {champion} (p = {found.p:.2g}, {len(challenger):,} images)"
        reason = f"{'better' if better else 'not better'}: {reason}"
    lower, upper = found.difference.interval or (None, None)
    return Decision(
        version=version,
        champion=champion,
        promoted=better,
        reason=reason,
        difference=found.difference.value,
        lower=lower,
        upper=upper,
        p=found.p,
    )


def _check_same(version: str, challenger: ScoreTable, champion: str, holder: ScoreTable) -> None:
    """InputError unless both are validation scores of the same images, findings and labels."""
    for name, table in ((version, challenger), (champion, holder)):
        if table.split != "validation":
            raise InputError(f"models:/{name}: found scores of split {table.split!r}, expected validation; never test")
    if set(challenger.findings) != set(holder.findings):
        raise InputError(
            f"models:/{version}: found the findings {', '.join(challenger.findings)}, expected those of the champion {champion}, "
            f"{', '.join(holder.findings)}; register it under another name (tracking.registered_model)"
        )
    ours, theirs = _truth(challenger), _truth(holder.with_findings(challenger.findings))
    if ours != theirs:
        raise InputError(
            f"models:/{version}: found {len(ours):,} validation images, expected those of the champion {champion} with the same "
            f"labels ({len(theirs):,}; {len(ours & theirs):,} in common): versions of another dataset cannot be compared; train "
            "on the champion's, or register under another name (tracking.registered_model)"
        )


def _truth(table: ScoreTable) -> set[tuple[str, bytes]]:
    """Each image with its labels."""
    return {(name, labels.tobytes()) for name, labels in zip(table.image_ids.tolist(), table.labels_NK, strict=True)}


def _write(client: MlflowClient, decision: Decision) -> None:
    name, number = decision.version.rsplit("/", 1)
    for key, value in decision.tags().items():
        client.set_model_version_tag(name, number, key, value[:5000])
