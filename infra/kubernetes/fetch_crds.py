"""KubeRay's custom resource definitions, fetched once for the strict checks of tests/unit/test_kubernetes.py.

    python infra/kubernetes/fetch_crds.py infra/kubernetes/crds      # git ignores that folder; CXR_CRDS names another

They are KubeRay's (Apache-2.0), 2 MB and theirs to change, so no copy lies in this repository; without one these checks are
skipped, and say so.
"""

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FILES", "KUBERAY", "main"]

KUBERAY = "v1.7.1"
"""The operator's release that the files are written for: worker groups have priorities from 1.7 on."""
SOURCE = f"https://raw.githubusercontent.com/ray-project/kuberay/{KUBERAY}/ray-operator/config/crd/bases"
FILES = ("ray.io_rayclusters.yaml", "ray.io_rayjobs.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"fetch the CRDs of KubeRay {KUBERAY}")
    parser.add_argument("folder", type=Path, help="where they go")
    parser.add_argument("--source", default=SOURCE, help="another place that has them, such as a mirror")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        url = f"{options.source}/{name}"
        if not url.startswith(("https://", "http://")):
            parser.error(f"--source: found {options.source}, expected an http(s) address")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - looked at above
                body = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            print(f"error: {url} cannot be read ({error}); fetch it by hand into {options.folder}", file=sys.stderr)
            return 1
        if b"kind: CustomResourceDefinition" not in body:
            print(f"error: {url} is no custom resource definition; look at it in a browser", file=sys.stderr)
            return 1
        fresh = options.folder / f".{name}"
        fresh.write_bytes(body)
        fresh.replace(options.folder / name)
        print(f"{options.folder / name}: {len(body)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
