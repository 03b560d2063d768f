"""Find a learning rate, trainable blocks and pooling on validation: trials under Ray Tune, cut short by ASHA.

python jobs/sweep.py --config jobs/configs/nih8.yaml --data.uri /data/nih8-224 --run.name lr-sweep --trials 12
The same command with the same run.name goes on with the same trials. A sweep never looks at test.
"""

import argparse
from pathlib import Path
from typing import Any

from cxr_dist.cli import run_job
from cxr_dist.config import Config


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument("--trials", type=int, default=8, help="runs, each with a setting of its own")
    parser.add_argument(
        "--lr", type=str, default="", help="LOWEST,HIGHEST learning rate; default: a tenth to ten times optimizer.lr"
    )
    parser.add_argument(
        "--trainable", type=str, default="denseblock4,denseblock3", help="values of model.trainable, comma-separated"
    )
    parser.add_argument("--pooling", type=str, default="lse,avg", help="values of model.pooling, comma-separated")
    parser.add_argument("--sweep-seed", type=int, default=0, help="seed of the trials' learning rates")
    parser.add_argument("--parallel", type=int, default=0, help="trials at a time; 0: as many as there is room for")
    parser.add_argument("--min-epochs", type=int, default=1, help="epochs that no trial is cut short before")
    parser.add_argument("--reduction", type=int, default=3, help="one of so many trials goes on, at each cut")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cxr_dist.sweep.run import Cut, sweep  # torch, Ray and MLflow take seconds to import; --help should not
    from cxr_dist.sweep.space import Space

    space = Space.parse(
        config,
        lr=args.lr,
        trainable=args.trainable,
        pooling=args.pooling,
        trials=args.trials,
        seed=args.sweep_seed,
    )
    cut = Cut(min_epochs=args.min_epochs, reduction=args.reduction)
    return sweep(config, space, cut, parallel=args.parallel, job=Path(__file__).with_name("train.py"))


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags)
