"""Measure what the parts of a run cost, beside the notebooks, other loaders and their own limits.

`python jobs/bench.py STAGE [options]`; stages: decode, stream, cache, step, epoch, or all of them; simulate. A table goes
to stdout, then one line of JSON. `python jobs/bench.py chart --results bench.json --chart FILE` draws an earlier result, and
`page --results scaling.json --page docs/scaling.md` puts the tables of one of `simulate` into that page.
"""

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cxr_dist.bench import scaling
from cxr_dist.bench.options import BenchOptions, Given, checked
from cxr_dist.bench.report import chart, machine, table, to_json
from cxr_dist.cli import run_job
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, DataError

STAGES = ("decode", "stream", "cache", "step", "epoch")
GIVEN = ("stage", "images", "num_images", "peers", "cpus", "repeats", "seed")
SIMULATED = ("rank_images_per_s", "network_gbit", "network_latency_us", "store_gbit", "max_images")


def flags(parser: argparse.ArgumentParser) -> None:
    kinds = (*STAGES, "simulate", "all", "chart", "page")
    parser.add_argument("stage", choices=kinds, help="what to measure; chart: draw --results; page: write --page")
    parser.add_argument("--images", type=str, default="", help="folder or prefix of PNG images; default: drawn ones")
    parser.add_argument("--num_images", type=int, default=0, help="images, repeated up to this (0: the stage's own)")
    parser.add_argument("--peers", action="store_true", help="measure other loaders too (needs the extra [bench])")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="processes at work at once (all cores)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant, in turns; the best counts (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of drawn images (0)")
    given = Given()
    rates = parser.add_argument_group("simulate: what you say of your machines; nothing here measures it")
    rates.add_argument("--rank_images_per_s", type=float, nargs="+", default=list(given.rank_images_per_s))
    rates.add_argument("--network_gbit", type=float, default=given.network_gbit, help="between nodes (10)")
    rates.add_argument("--network_latency_us", type=float, default=given.network_latency_us, help="a message (20)")
    rates.add_argument("--store_gbit", type=float, default=given.store_gbit, help="object storage, a node (5)")
    rates.add_argument("--max_images", type=int, default=10**8, help="largest dataset whose tables are written (10^8)")
    parser.add_argument("--page", type=str, default="", help="with page: the Markdown that --results belong in")
    parser.add_argument("--out", type=str, default="", help="folder for what stages write; default: temporary")
    parser.add_argument("--chart", type=str, default="", help="also draw the result into this file (.png, .svg, .pdf)")
    parser.add_argument("--results", type=str, default="", help="with chart: the JSON of an earlier run")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.chart and not Path(args.chart).absolute().parent.is_dir():
        raise ConfigError(f"--chart: found no folder {Path(args.chart).absolute().parent}; make it or give another")
    if args.stage in ("chart", "page"):
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
                given=Given(
                    rank_images_per_s=tuple(args.rank_images_per_s),
                    network_gbit=args.network_gbit,
                    network_latency_us=args.network_latency_us,
                    store_gbit=args.store_gbit,
                ),
                max_images=args.max_images,
                config=config,
            )
        )
        options.out.mkdir(parents=True, exist_ok=True)
        about = machine()
        rows = []
        for stage in STAGES if args.stage == "all" else (args.stage,):
            # as it comes to its turn: importing torch before the decoding stages would count in their memory
            found = importlib.import_module(f"cxr_dist.bench.{stage}").run(options)
            rows += found
            print(table(found), end="\n\n", flush=True)
            asked = (*GIVEN, *SIMULATED) if stage == "simulate" else GIVEN
            result = to_json(rows, machine=about, options={name: getattr(args, name) for name in asked})
            if args.json:  # all stages take an hour: those that are done stay, whatever comes
                Path(args.json).write_text(json.dumps(result) + "\n")
    if args.chart:
        (scaling.chart if scaling.is_scaling(result) else chart)(result, args.chart)
    return result


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """The chart, or the page, of an earlier run's JSON."""
    target = args.chart if args.stage == "chart" else args.page
    if not args.results or not target:
        what = "draw" if args.stage == "chart" else "show"
        raise ConfigError(
            f"{args.stage}: found no --results or no --{args.stage}, expected the JSON to {what} and the file to write"
        )
    try:
        result = json.loads(Path(args.results).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"--results: found no JSON at {args.results} ({error}), expected what --json wrote") from None
    if args.stage == "page":
        scaling.write_page(result, Path(target))
    elif scaling.is_scaling(result):
        scaling.chart(result, target)
    else:
        chart(result, target)
    return {args.stage: target, "rows": len(result["rows"])}


if __name__ == "__main__":
    run_job(main, description=__doc__ or "", extra=flags)
