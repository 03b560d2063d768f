"""A sweep's trials as a table: for the terminal, for MLflow, as CSV. Pure functions of the record."""

import csv as csv_module
import io
from collections.abc import Sequence
from typing import Any

from cxr_dist.sweep.record import Record, TrialRecord

__all__ = ["csv", "note", "rows", "text"]

COLUMNS = ("number", "run_name", "lr", "trainable", "pooling", "ended", "epochs", "val_auroc_mean", "why")


def rows(record: Record) -> list[dict[str, Any]]:
    """A row for each trial, the best first; `val_auroc_mean` is that of its best epoch so far."""
    found: list[dict[str, Any]] = [
        {
            "number": one.trial.number,
            "run_name": one.trial.name,
            "lr": one.trial.lr,
            "trainable": one.trial.trainable,
            "pooling": one.trial.pooling,
            "ended": one.ended,
            "epochs": one.curve[-1][0] if one.curve else 0,
            "val_auroc_mean": one.score,
            "why": one.why,
        }
        for one in record.trials
    ]
    order = ("finished", "pruned", "failed", None)
    return sorted(found, key=lambda row: (order.index(row["ended"]), -(row["val_auroc_mean"] or 0.0), row["number"]))


def csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv_module.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Lines for a terminal."""
    cells = [_cells(row) for row in rows]
    heads = ("trial", "lr", "trained", "pooling", "ended", "epochs", "val mean AUROC", "")
    widths = [max(len(row[k]) for row in [heads, *cells]) for k in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *cells]
    )


def note(rows: Sequence[dict[str, Any]], best: TrialRecord | None, command: str) -> str:
    """Markdown for the parent run's description in MLflow."""
    lines = ["Sweep; scores are of validation, each trial's best epoch; the test split is not looked at.", ""]
    lines += ["| trial | lr | trained | pooling | ended | epochs | val mean AUROC |", "|--:|--:|---|---|---|--:|--:|"]
    lines += ["| " + " | ".join(_cells(row)[:-1]) + " |" for row in rows]
    if best is not None:
        lines += ["", f"Best: **{best.trial.name}**. In full, with the test report:", "", f"```\n{command}\n```"]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    score = "" if row["val_auroc_mean"] is None else f"{row['val_auroc_mean']:.4f}"
    words = (f"{row['number']:02d}", f"{row['lr']:g}", row["trainable"], row["pooling"], row["ended"] or "not yet")
    return (*words, str(row["epochs"]), score, row["why"])
