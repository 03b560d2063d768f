"""Write a model as one ONNX file, from uint8 pixels to probabilities, checked against torch. Needs the extra [onnx].

python jobs/export.py --model models:/cxr-densenet121@champion --out champion.onnx --tracking.uri http://MLFLOW:5000
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cxr_dist.cli import model_flag, run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError


def add_flags(parser: Any) -> None:
    """The job's own flags."""
    parser.add_argument(
        "--model-uri",
        type=str | None,
        help="the model, also given as --model: URI of a run's folder or checkpoint, models:/NAME/VERSION, models:/NAME@ALIAS",
    )
    parser.add_argument("--out", type=str | None, help="the file that is written")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Export, and return what the file holds."""
    for flag, value in (("--model", args.model_uri), ("--out", args.out)):
        if not value:
            raise ConfigError(f"{flag}: found nothing, expected a {'URI' if flag == '--model' else 'file'}")
    from cxr_dist.experiment import absolute_uri  # torch and MLflow take seconds to import; --help should not
    from cxr_dist.predict.model import find_model
    from cxr_dist.registry.export import export

    with find_model(args.model_uri, absolute_uri(config.tracking.uri)) as model:
        done = export(model.uri, Path(args.out), method=config.evaluate.calibration)
    print(
        f"{args.out}: {done['bytes'] / 1e6:.0f} MB, at most {done['largest_difference']:.1e} from torch's probabilities"
    )
    return {"model": model.version, "out": args.out, **done}


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=add_flags, argv=model_flag(sys.argv[1:]))
