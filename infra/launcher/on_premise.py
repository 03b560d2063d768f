"""The cluster file for machines of one's own: python infra/launcher/on_premise.py ray-cluster.yaml --head 10.0.0.1 --workers 10.0.0.2

Ray's `local` provider reaches them by SSH, and starts and stops Ray there; it starts no machine. What AWS alone has is left
out, the rest of the file stays: token, ports, spilling, what a stopped job has time for. Without a container, the machines
have the packages of requirements.lock (`ray` on the PATH of a login shell), and one user with the same home on all of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["on_premise"]

KEPT = ("cluster_name", "idle_timeout_minutes", "setup_commands", "head_setup_commands")
CONTAINER_HOME, CONTAINER_SCRATCH = "/home/ray", "/scratch"


def on_premise(
    cluster: dict[str, Any],
    *,
    head: str,
    workers: Sequence[str],
    ssh_user: str,
    ssh_private_key: str,
    scratch: str = "~/scratch",
) -> dict[str, Any]:
    """The cluster file with these machines (addresses) in place of AWS's; `scratch` is a folder on their own disks.

    Ray takes CPUs and GPUs as it finds them. The local provider sets no labels: decoding has no preferred nodes.
    """

    def here(command: str) -> str:
        return command.replace(CONTAINER_SCRATCH, scratch).replace(CONTAINER_HOME, "~")

    def start(kind: str) -> list[str]:
        # What docker did for the container. And Ray 2.60's second autoscaler, the default of `ray up`, never starts a local
        # worker: it waits for a head that only the first one writes down (LocalNodeProvider's state file).
        before = f"mkdir -p {scratch}/spill; export RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=0; "
        return [before + here(line) if "ray start" in line else line for line in cluster[f"{kind}_start_ray_commands"]]

    return {
        **{key: cluster[key] for key in KEPT if key in cluster},
        "provider": {"type": "local", "head_ip": head, "worker_ips": list(workers)},
        "auth": {"ssh_user": ssh_user, "ssh_private_key": ssh_private_key},
        "min_workers": len(workers),
        "max_workers": len(workers),
        "file_mounts": {here(remote): local for remote, local in cluster.get("file_mounts", {}).items()},
        "head_start_ray_commands": start("head"),
        "worker_start_ray_commands": start("worker"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the file for one's own machines; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--head", required=True, help="address of the head")
    parser.add_argument("--workers", required=True, nargs="+", help="addresses of the other machines")
    parser.add_argument("--ssh-user", required=True)
    parser.add_argument("--ssh-private-key", default="~/.ssh/id_ed25519")
    parser.add_argument("--scratch", default="~/scratch", help="folder on each machine's own disk")
    options = vars(parser.parse_args(arguments))
    made = on_premise(yaml.safe_load(options.pop("file").read_text()), **options)
    print(yaml.safe_dump(made, sort_keys=False, width=200), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
