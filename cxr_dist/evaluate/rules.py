"""Rules that choose operating points, as people call them: what tables, cards and figures head their columns with."""

from collections.abc import Mapping
from typing import Any

__all__ = ["chosen_rules", "main_rule"]

_NAMES = {
    "youden": "Youden's J",
    "f1": "best F1",
    "corner": "closest to the ROC corner",
    "sensitivity_90": "sensitivity 0.9",
    "specificity_90": "specificity 0.9",
    "half": "0.5 for every finding",
}


def chosen_rules(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The operating points of evaluation.json that have a threshold for any finding, each with its short `name`."""
    return {
        rule: {**one, "name": _NAMES.get(rule, one["label"])}
        for rule, one in (evaluation.get("operating_points") or {}).items()
        if any(point["threshold"] is not None for point in one["findings"].values())
    }


def main_rule(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rule of the headline table: Youden's J, as in the notebooks; None if it was not fitted."""
    return chosen_rules(evaluation).get("youden")
