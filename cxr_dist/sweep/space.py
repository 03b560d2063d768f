"""What a sweep tries: its trials, all known before the first begins, so that a sweep which was killed goes on with the same.

Each trial is a run's config that differs from the sweep's in learning rate, trainable blocks and pooling. Learning rates
are drawn one from each of as many equal parts of the range (on a log scale) as there are trials, so that a few trials
cover it; combinations of blocks and pooling take turns. Nothing here knows Ray or MLflow.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import shlex
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from cxr_dist.config import Config, ModelConfig, Trainable, flatten
from cxr_dist.errors import ConfigError

__all__ = ["Space", "Trial", "draw", "flags", "full_command", "trial_config"]

LONGEST_NAME = 50
"""Letters of a sweep's name: its trials' names begin with it."""

Pooling = typing.get_type_hints(ModelConfig)["pooling"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is swept and how often."""

    lr: tuple[float, float]
    """Lowest and highest learning rate (at optimizer.lr_reference_batch)."""
    trainable: tuple[str, ...]
    """Values of model.trainable."""
    pooling: tuple[str, ...]
    """Values of model.pooling."""
    trials: int
    seed: int = 0

    @classmethod
    def parse(cls, config: Config, *, lr: str, trainable: str, pooling: str, trials: int, seed: int) -> "Space":
        """The space of a command line's flags, comma-separated values each; an empty one is the default for the config."""
        base = config.optimizer.lr
        try:
            low, high = (float(value) for value in lr.split(",")) if lr else (base / 10, base * 10)
        except ValueError:
            low, high = 0.0, 0.0
        if not (0 < low <= high < math.inf):
            raise ConfigError(
                f"--lr: found {lr!r}, expected the lowest and the highest learning rate, such as 0.0001,0.01"
            )
        if not 1 <= trials <= 999:
            raise ConfigError(f"--trials: found {trials}, expected 1 to 999")
        return cls(
            lr=(low, high),
            trainable=_choices("--trainable", trainable, typing.get_args(Trainable)),
            pooling=_choices("--pooling", pooling, typing.get_args(Pooling)),
            trials=trials,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting, and the name of the run that tries it."""

    number: int
    """From 1."""
    name: str
    lr: float
    trainable: str
    pooling: str


def draw(space: Space, sweep: str) -> list[Trial]:
    """The trials of a sweep of that name, in the order in which they begin; the same space gives the same trials."""
    if not 1 <= len(sweep) <= LONGEST_NAME:
        raise ConfigError(f"run.name: found {sweep!r}, expected the sweep's name, up to {LONGEST_NAME} letters")
    rng = random.Random(space.seed)  # noqa: S311 - no secret
    parts = list(range(space.trials))
    rng.shuffle(parts)
    # blocks first: trials that begin together then have different prefixes, and the next ones find theirs kept
    turns = itertools.cycle([(blocks, pooling) for pooling in space.pooling for blocks in space.trainable])
    low, high = (math.log(value) for value in space.lr)
    trials = []
    for number, part in enumerate(parts, start=1):
        drawn = math.exp(low + (high - low) * (part + rng.random()) / space.trials)
        lr = float(f"{drawn:.2g}")  # as the name says it
        blocks, pooling = next(turns)
        name = f"{sweep}-{number:02d}-lr{lr:g}-{blocks}-{pooling}".replace("+", "")
        trials.append(Trial(number=number, name=name, lr=lr, trainable=blocks, pooling=pooling))
    return trials


def trial_config(config: Config, trial: Trial, *, parent: str, decode_workers: int) -> Config:
    """A trial's run: it never looks at test, and is shown under the MLflow run `parent`."""
    mine = (f"mlflow.parentRunId={parent}", f"sweep={config.run.name}", f"trial={trial.number}")
    return dataclasses.replace(
        _with_values(config, trial),
        data=dataclasses.replace(config.data, decode_workers=config.data.decode_workers or decode_workers),
        # what compares trials is one number; intervals and heat maps are for the run that is trained in full
        evaluate=dataclasses.replace(config.evaluate, test=False, bootstrap=0, saliency=0),
        run=dataclasses.replace(config.run, name=trial.name, resume="auto"),
        tracking=dataclasses.replace(
            config.tracking,
            tags=(*config.tracking.tags, *mine),
            log_model=False,
            register=False,
            promote=False,
        ),
    )


def full_command(config: Config, trial: Trial) -> str:
    """The command that trains a run of its own with a trial's values, as the sweep's config says else, and tests it."""
    chosen = dataclasses.replace(
        _with_values(config, trial),
        evaluate=dataclasses.replace(config.evaluate, test=True),
        run=dataclasses.replace(config.run, name=f"{config.run.name}-best", resume="auto"),
    )
    return shlex.join(["python", "jobs/train.py", *flags(chosen)])


def flags(config: Config) -> list[str]:
    """The config as a command line: every key whose value is not the default."""
    default = flatten(Config())
    found: list[str] = []
    for key, value in flatten(config).items():
        if value != default[key]:
            found += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return found


def _with_values(config: Config, trial: Trial) -> Config:
    changed = {"trainable": trial.trainable, "pooling": trial.pooling}
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, lr=trial.lr),
        model=dataclasses.replace(config.model, **changed),  # type: ignore[arg-type]
    )


def _choices(flag: str, found: str, known: Sequence[str]) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(re.split(r"[,\s]+", found.strip())))
    for value in values:
        if value not in known:
            raise ConfigError(f"{flag}: found {value!r}, expected some of {', '.join(known)}")
    return values
