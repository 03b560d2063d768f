"""What a sweep has come to, in one file in storage: its trials, their validation scores so far, how each ended.

STORAGE/sweeps/NAME/sweep.json   atomic, written by the sweep's driver alone
STORAGE/sweeps/NAME/lease/…      which driver that is (`train.lease`)
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cxr_dist import storage
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.sweep.space import Space, Trial, draw
from cxr_dist.train.identity import decisive

__all__ = ["SWEEPS", "Record", "TrialRecord", "sweep_folder"]

FORMAT = "cxr-dist/sweep/1"
SWEEPS = "sweeps"
"""Folder of the sweeps' records, beside the runs."""

SWEPT = {"optimizer.lr", "model.trainable", "model.pooling"}
"""Of a config, what a trial has of its own; the sweep's value is only the middle of its default range."""

End = Literal["finished", "pruned", "failed"]


def sweep_folder(storage_path: str, name: str) -> str:
    """URI of a sweep's folder."""
    return storage.join(storage_path, f"{SWEEPS}/{name}")


@dataclass(kw_only=True)
class TrialRecord:
    """A trial and what has come of it."""

    trial: Trial
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(epochs done, validation mean AUROC), ascending; an epoch may be missing where epochs are shorter than a second."""
    ended: End | None = None
    """None: it has not, and goes on when the sweep does."""
    why: str = ""
    """Of one that was pruned or failed."""

    @property
    def score(self) -> float | None:
        """The highest validation mean AUROC, which is that of the run's best checkpoint; None before the first epoch."""
        return max((score for _, score in self.curve), default=None)

    def add(self, epoch: int, score: float) -> bool:
        """Take in a score; whether it is a new one."""
        if self.curve and epoch <= self.curve[-1][0]:
            return False
        self.curve.append((epoch, score))
        return True


@dataclass(kw_only=True)
class Record:
    """A sweep."""

    folder: str
    manifest_sha256: str
    settings: dict[str, Any]
    """What another command of the same name must share: the swept space and the config's decisive values."""
    trials: list[TrialRecord]
    run_id: str | None = None
    """Of the parent run in MLflow."""

    @classmethod
    def open(cls, config: Config, space: Space, manifest_sha256: str) -> "Record":
        """The record of the config's sweep, or a new one; ConfigError if it was begun with other settings."""
        folder = sweep_folder(config.train.storage_path, config.run.name)
        settings = _settings(config, space)
        new = [TrialRecord(trial=trial) for trial in draw(space, config.run.name)]
        try:
            content = json.loads(storage.read_bytes(storage.join(folder, "sweep.json")))
        except FileNotFoundError:
            return cls(folder=folder, manifest_sha256=manifest_sha256, settings=settings, trials=new)
        if content.get("format") != FORMAT:
            raise InputError(
                f"{storage.shown(folder)}/sweep.json: found format {content.get('format')!r}, expected {FORMAT}; use the "
                "version that wrote it"
            )
        _same(
            config.run.name,
            content["settings"] | {"data.uri": content["manifest_sha256"]},
            settings | {"data.uri": manifest_sha256},
        )
        trials = [
            TrialRecord(
                trial=Trial(**found["trial"]),
                curve=[(epoch, score) for epoch, score in found["curve"]],
                # what failed is tried again: that is what the same command is given for
                ended=None if found["ended"] == "failed" else found["ended"],
                why="" if found["ended"] == "failed" else found["why"],
            )
            for found in content["trials"]
        ]
        return cls(
            folder=folder,
            manifest_sha256=manifest_sha256,
            settings=settings,
            trials=trials,
            run_id=content["run_id"],
        )

    def save(self) -> None:
        """Write it down."""
        content = {
            "format": FORMAT,
            **{key: value for key, value in dataclasses.asdict(self).items() if key != "folder"},
        }
        storage.put_atomic(storage.join(self.folder, "sweep.json"), json.dumps(content, indent=1).encode())

    def best(self) -> TrialRecord | None:
        """The trial that finished with the highest validation score, the earlier of equals; None if none finished."""
        finished = [trial for trial in self.trials if trial.ended == "finished" and trial.score is not None]
        return max(finished, key=lambda trial: (trial.score, -trial.trial.number), default=None)


def _settings(config: Config, space: Space) -> dict[str, Any]:
    flags = {f"--{'sweep-seed' if key == 'seed' else key}": value for key, value in dataclasses.asdict(space).items()}
    values = {key: value for key, value in decisive(config).items() if key not in SWEPT}
    plain: dict[str, Any] = json.loads(json.dumps(flags | values))
    return plain


def _same(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in now:
        if then.get(key) != now[key]:
            raise ConfigError(
                f"{key}: sweep {name} was begun with {then.get(key)!r}, found {now[key]!r}; keep the first, or give "
                "another run.name"
            )
