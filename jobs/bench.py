"""Measure what the parts of a run cost, beside the notebooks, other loaders and their own limits.

`python jobs/bench.py STAGE [options]`; stages: decode, stream, cache, step, epoch, or all of them. A table goes to
stdout, then one line of JSON. `python jobs/bench.py chart --results bench.json --chart FILE` draws an earlier result.
"""

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cxr_dist.bench.options import BenchOptions, checked
from cxr_dist.bench.report import chart, machine, table, to_json
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, DataError

STAGES = ("decode", "stream", "cache", "step", "epoch")
GIVEN = ("stage", "images", "num_images", "peers", "cpus", "repeats", "seed")


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=(*STAGES, "all", "chart"), help="what to measure; chart: draw --results")
    parser.add_argument("--images", type=str, default="", help="folder or prefix of PNG images; default: drawn ones")
    parser.add_argument("--num_images", type=int, default=0, help="images, repeated up to this (0: the stage's own)")
    parser.add_argument("--peers", action="store_true", help="measure other loaders too (needs the extra [bench])")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="processes at work at once (all cores)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant, in turns; the best counts (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of drawn images (0)")
    parser.add_argument("--out", type=str, default="", help="folder for what stages write; default: temporary")
    parser.add_argument("--chart", type=str, default="", help="also draw the result into this file (.png, .svg, .pdf)")
    parser.add_argument("--results", type=str, default="", help="with chart: the JSON of an earlier run")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.chart and not Path(args.chart).absolute().parent.is_dir():
        raise ConfigError(f"--chart: found no folder {Path(args.chart).absolute().parent}; make it or give another")
    if args.stage == "chart":
        return draw(args)
    with tempfile.TemporaryDirectory(prefix="cxr-bench-") as temporary:
        options = checked(
            BenchOptions(
                out=Path(args.out or temporary),
                images=args.images,
                num_images=args.num_images,
                peers=args.peers,
                cpus=args.cpus,
                repeats=args.repeats,
                seed=args.seed,
                config=config,
            )
        )
        options.out.mkdir(parents=True, exist_ok=True)
        about = machine()
        rows = []
        for stage in STAGES if args.stage == "all" else (args.stage,):
            # as it comes to its turn: importing torch before the decoding stages would count in their memory
            rows += importlib.import_module(f"cxr_dist.bench.{stage}").run(options)
            print(table([row for row in rows if row.stage == stage]), end="\n\n", flush=True)
            result = to_json(rows, machine=about, options={name: getattr(args, name) for name in GIVEN})
            if args.json:  # all stages take an hour: those that are done stay, whatever comes
                Path(args.json).write_text(json.dumps(result) + "\n")
    if args.chart:
        chart(result, args.chart)
    return result


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """The chart of an earlier run's JSON."""
    if not args.results or not args.chart:
        raise ConfigError("chart: found no --results or no --chart, expected the JSON to draw and the file to write")
    try:
        result = json.loads(Path(args.results).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"--results: found no JSON at {args.results} ({error}), expected what --json wrote") from None
    chart(result, args.chart)
    return {"chart": args.chart, "rows": len(result["rows"])}


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=flags)
