"""Which of EC2's quotas of vCPUs counts an instance type, by the quotas' own names."""

import re
from collections.abc import Iterable

__all__ = ["quota_of"]


def quota_of(instance: str, quotas: Iterable[str], *, spot: bool) -> str | None:
    """Name of the quota that counts an instance type: the one that lists its family ("G"), or family and generation ("P5")."""
    pattern = r"All (.*) Spot Instance Requests" if spot else r"Running On-Demand (.*) instances"
    parts = re.match(r"([a-z]+)(\d*)", instance)
    family, generation = (parts[1].upper(), parts[2]) if parts else ("", "")
    for names in ({family, f"{family}{generation}"}, {family[:1]}):
        for quota in quotas:
            listed = re.fullmatch(pattern, quota)
            if listed and names & {word.upper() for word in re.split(r"[^A-Za-z0-9]+", listed[1])}:
                return quota
    return None
