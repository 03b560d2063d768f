"""Make a synthetic NIH-shaped release: `python jobs/synth.py --out DIR --patients 300`.

The last line of stdout is one JSON object. Exit codes: 0 done, 2 bad arguments or a directory in use.
"""

import argparse
import json
import sys
import time

from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.data.synth import write_release
from cxr_dist.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, write the release, print its counts; the exit code."""
    parser = argparse.ArgumentParser(description="Write a synthetic NIH ChestX-ray14 release of drawn radiographs.")
    parser.add_argument("--out", required=True, help="directory of the release; new, empty, or of the same arguments")
    parser.add_argument("--patients", type=int, default=300, help="number of patients, of 1 to 6 images each (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (0)")
    parser.add_argument("--findings", choices=sorted(LABEL_SETS), default="nih14", help="findings to draw (nih14)")
    parser.add_argument("--prevalence", type=float, default=0.12, help="part of the images with each finding (0.12)")
    parser.add_argument("--contrast", type=float, default=1.0, help="strength of the findings, above 0 to 1 (1)")
    parser.add_argument("--size", type=int, default=1024, help="side of an image, pixels (1024)")
    parser.add_argument("--processes", type=int, default=0, help="drawing processes; 0: one per usable CPU (0)")
    flags = parser.parse_args(argv)
    started = time.monotonic()
    try:
        counts = write_release(
            flags.out,
            num_patients=flags.patients,
            seed=flags.seed,
            findings=LABEL_SETS[flags.findings],
            prevalence=flags.prevalence,
            contrast=flags.contrast,
            size=flags.size,
            processes=flags.processes,
        )
    except InputError as error:
        print(f"synth: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"release": flags.out, **counts, "wall_s": round(time.monotonic() - started, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
