"""Where work goes on a cluster whose nodes say what they are for.

Whoever starts the nodes labels them (ray-cluster.yaml, infra/kubernetes): `cxr-role` is `train` or `ingest`, `cxr-market`
`spot` or `on-demand`. Labels are wishes: a cluster without any works as it did before there were any.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ray

__all__ = ["ACTOR_RETRIES", "MARKET", "ROLE", "decoding", "not_on_spot"]

ROLE, MARKET = "cxr-role", "cxr-market"

ACTOR_RETRIES = 30
"""Attempts after the first at a call of an actor whose process or node is gone; Ray's default in a dataset is to try for ever.

Until Ray knows that a node is dead it tries a call to it every second, and counts each: 6 to 10 before a killed raylet's
actors were started elsewhere. Of 8 attempts, 2 were left."""

Bundle = Mapping[str, float]


def decoding() -> dict[str, Any]:
    """Ray's options for a task or an actor that reads and decodes: on an ingest node, and elsewhere where none has room.

    Nothing where no ingest node is alive. Seen with Ray 2.60: an actor or task goes to the first selector that has a free CPU
    somewhere, so that ingest nodes fill up first and what is left goes to the others; what was on a node that died is
    started again by the same rule, and nothing moves back.
    """
    if not any(node["Alive"] and node.get("Labels", {}).get(ROLE) == "ingest" for node in ray.nodes()):
        return {}
    return {"label_selector": {ROLE: "ingest"}, "fallback_strategy": [{"label_selector": {}}]}


def not_on_spot(bundles: Sequence[Bundle], there: Bundle) -> list[dict[str, str]]:
    """Selectors for `bundles` that ask for those with a GPU which do not fit into `there` (the cluster's resources) anywhere
    but on the spot market. A node without the label is not taken for spot."""
    with_gpu = [place for place, bundle in enumerate(bundles) if bundle.get("GPU", 0) > 0]
    left, missing = there.get("GPU", 0.0), []
    for place in with_gpu:
        left -= bundles[place]["GPU"]
        if left < -1e-9:
            missing.append(place)
    return [{MARKET: "!spot"} if place in missing else {} for place in range(len(bundles))]
