"""The course of tests/integration/test_launcher.py, on a machine of its own: `ray up`, a job on both nodes, `ray down`.

Every command is Ray's own, over SSH, with the cluster file of the repository as `on_premise` transforms it. What came of
it goes to FOLDER/outcome.json.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from infra.launcher.on_premise import on_premise
from tests.machines import ROOT, machines, processes

OURS = {"raylet", "gcs_server"}

JOB = """
import json, socket, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init()
deadline = time.monotonic() + 120
while len(nodes := [node for node in ray.nodes() if node["Alive"]]) < 2 and time.monotonic() < deadline:
    time.sleep(0.5)

@ray.remote
def where():
    return socket.gethostname()

ran = {
    node["NodeManagerAddress"]: ray.get(
        where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
    )
    for node in nodes
}
print(json.dumps(ran))
"""


def main(folder: Path) -> int:
    addresses = machines(folder, ["head", "worker"])
    cluster = on_premise(
        yaml.safe_load((ROOT / "ray-cluster.yaml").read_text()),
        head=addresses["head"],
        workers=[addresses["worker"]],
        ssh_user="root",
        ssh_private_key=str(folder / "key"),
        scratch="/tmp/scratch",
    )
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
    ray("get-auth-token", "--generate")
    Path("~/.ray/auth_token").expanduser().chmod(0o600)
    outcome: dict[str, Any] = {"addresses": addresses, "hosts": ["head", "worker"]}
    began = time.monotonic()
    ray("up", "--yes", "--no-config-cache", str(file))
    outcome["up_s"] = time.monotonic() - began
    try:
        outcome["job"] = json.loads(job(folder, file).splitlines()[-1])
        outcome["running"] = sorted(name for _, name in processes() if name in OURS)
        outcome["job_s"] = time.monotonic() - began
    finally:
        ray("down", "--yes", str(file))
    outcome["down_s"] = time.monotonic() - began
    # The head's processes end at once. Without a container `ray down` leaves workers alone, whose raylet ends when it has
    # not reached its head for a minute.
    deadline = time.monotonic() + 180
    while (left := sorted(name for _, name in processes() if name in OURS)) and time.monotonic() < deadline:
        time.sleep(0.2)
    outcome |= {"left": left, "all_s": time.monotonic() - began}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    return 0


def ray(*words: str) -> str:
    """A command of Ray's, with what it said in the course's own output."""
    done = subprocess.run(["ray", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ ray {' '.join(words)}\n{done.stdout}", flush=True)
    if done.returncode:
        raise SystemExit(f"ray {words[0]} ended with {done.returncode}")
    return done.stdout


def job(folder: Path, file: Path) -> str:
    """Output of the job, submitted through the forwarded port of the head's loopback."""
    work = folder / "work"
    work.mkdir()
    (work / "job.py").write_text(JOB)
    forward = subprocess.Popen(["ray", "dashboard", str(file)], stdout=subprocess.DEVNULL)
    try:
        address = "http://127.0.0.1:8265"
        until_answers(f"{address}/api/version", forward)
        said = ray("job", "submit", "--address", address, "--working-dir", str(work), "--", "python", "job.py")
        return "\n".join(line for line in said.splitlines() if line.startswith("{"))
    finally:
        forward.terminate()


def until_answers(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:  # it answers, and asks for the token
            return
        except OSError:
            assert process.poll() is None, "ray dashboard ended"
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
