"""From what nodes and ranks say to problems and notes: pure functions of reports, no Ray."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from cxr_dist.config import Config
from cxr_dist.data.stream import LEAST_STORE_BYTES
from cxr_dist.doctor.problems import Problem, of_sentence
from cxr_dist.doctor.report import NodeReport, RanksReport, figure

__all__ = ["judge_clock", "judge_decoding", "judge_nodes", "judge_ranks"]

SKEW_S = 60.0
"""Largest difference between clocks: object stores refuse requests that are signed 15 minutes off, and a clock that has
lost a minute goes on losing."""
SKEW_NOTED_S = 1.0
FULL = 0.05
"""Part of a disk that must be free: Ray refuses to spill objects to one that is fuller."""
UNEQUAL = 1.25
"""Ratio of the fastest rank to the slowest from which it is said that the others wait."""
SAME = ("python", "ray", "torch", "torchvision", "mlflow", "pyarrow", "kornia-rs", "numpy")
"""What must be the same on all nodes; CUDA among those with GPUs."""

IMAGE = "give every node the same image, with requirements.lock"


def judge_nodes(nodes: Sequence[NodeReport], config: Config) -> tuple[list[Problem], list[str]]:
    """Everything that the nodes' own words show."""
    up = [node for node in nodes if node.error is None]
    problems = [
        Problem(
            check="answers",
            node=node.name,
            found=node.error,
            expected="a worker that starts and says what it is",
            do="see that its raylet runs and that head and workers reach one another on all ports (their security group)",
        )
        for node in nodes
        if node.error is not None
    ]
    different, notes = judge_versions(up)
    problems += different
    for node in up:
        problems += [*_gpus(node), *_room(node, config), *_ways(node)]
        notes += _noted(node)
    return problems, notes


def judge_versions(nodes: Sequence[NodeReport]) -> tuple[list[Problem], list[str]]:
    """A problem for each node that has another version than most (than the head, where none is the most frequent)."""
    problems: list[Problem] = []
    for name in SAME:
        problems += _odd(name, [(node, _base(node.versions.get(name))) for node in nodes])
    with_gpus = [node for node in nodes if node.gpus]
    problems += _odd("cuda", [(node, node.versions["cuda"]) for node in with_gpus if node.versions.get("cuda")])
    drivers = {node.name: node.versions.get("driver") for node in with_gpus}
    if len(set(drivers.values())) > 1:
        told = ", ".join(f"{name} {version or 'none'}" for name, version in drivers.items())
        return problems, [f"NVIDIA drivers differ, which NCCL allows: {told}"]
    return problems, []


def judge_decoding(
    rates: Mapping[str, float | None],
    *,
    ranks: int,
    gpu: bool,
    images_per_s: float | None,
    cpus: int,
    encoding: str,
    decodes_always: bool,
) -> tuple[list[Problem], list[str]]:
    """Data CPUs against what the ranks take: the sentence with the cores that each encoding needs.

    `rates` are images a second of a core, `images_per_s` those that a rank trains on, `cpus` the whole ones that are left
    for decoding, `encoding` the dataset's. Too few are a problem where every epoch decodes (`decodes_always`), else a note.
    """
    png, pixels = rates.get("png"), rates.get("pixels")
    if not png or not pixels or not images_per_s:
        return [], ["decoding: the cores that it needs are not known, for not every rate was measured"]
    need = {"png": math.ceil(ranks * images_per_s / png), "pixels": math.ceil(ranks * images_per_s / pixels)}
    kind = "GPU" if gpu else "rank"
    found = (
        f"{ranks} {kind}{'s need' if ranks > 1 else ' needs'} {need['png']} decode core{'s' if need['png'] > 1 else ''} "
        f"for raw PNG, {need['pixels']} for pixel shards; you have {cpus}"
    )
    if need[encoding] <= cpus:
        return [], [found]
    if not decodes_always:
        return [], [f"{found}, too few for {encoding}, which is decoded once where features are kept"]
    do = "add CPU nodes (label cxr-role: ingest)" + (
        ", or ingest with data.encoding pixels" if encoding == "png" else ""
    )
    # the sentence has a semicolon of its own, so it is put together here
    return [
        Problem(check="decoding", found=found, expected=f"{need[encoding]}, else the {kind}s wait for data", do=do)
    ], []


def judge_ranks(ranks: RanksReport) -> list[str]:
    """Notes on what the ranks measured."""
    notes = []
    speeds = ranks.train_images_per_s
    if len(speeds) > 1 and max(speeds) > UNEQUAL * min(speeds):
        slow = speeds.index(min(speeds))
        notes.append(
            f"rank {slow} on {ranks.hosts[slow]} trains {figure(min(speeds))} images/s, the fastest rank {figure(max(speeds))}: "
            "the others wait for it"
        )
    if len(ranks.hosts) == 1:
        notes.append("one rank: no all-reduce to measure")
    return notes


def judge_clock(skew_s: float | None) -> tuple[list[Problem], list[str]]:
    """The store's clock against the driver's; whole seconds, as stores tell."""
    if skew_s is None:
        return [], ["the store does not tell its time"]
    if abs(skew_s) <= SKEW_S:
        return [], []
    return [_skewed("the store's clock", skew_s, node=None)], []


def _odd(name: str, told: Sequence[tuple[NodeReport, str | None]]) -> list[Problem]:
    """The nodes that have another version than most."""
    there = [version for _, version in told if version is not None]
    if not there:
        return [_other(name, node, None, "it installed") for node, _ in told]
    counted = Counter(there).most_common()
    head = next((version for node, version in told if node.is_head and version), there[0])
    most = head if len(counted) > 1 and counted[0][1] == counted[1][1] else counted[0][0]
    return [_other(name, node, version, f"{most} as on the other nodes") for node, version in told if version != most]


def _other(name: str, node: NodeReport, version: str | None, expected: str) -> Problem:
    found = f"{name} {version}" if version else f"no {name}"
    return Problem(check="versions", node=node.name, found=found, expected=expected, do=IMAGE)


def _base(version: str | None) -> str | None:
    """A version without its local part: torch 2.9.0+cpu and 2.9.0+cu128 are one, a node's CUDA is looked at by itself."""
    return version.partition("+")[0] if version else None


def _gpus(node: NodeReport) -> list[Problem]:
    seen = len(node.gpu_names)
    if node.gpus <= seen:
        return []
    if node.versions.get("torch") and node.versions.get("cuda") is None:
        return [
            Problem(
                check="GPUs",
                node=node.name,
                found=f"torch {node.versions['torch']}, built without CUDA, on a node of {_gpus_of(node.gpus)}",
                expected="an image with a CUDA build of torch",
                do="use an image with CUDA (infra/Dockerfile's gpu target, or rayproject/ray:…-gpu) on GPU nodes",
            )
        ]
    driver = node.versions.get("driver")
    why = f" ({'; '.join(node.gpu_errors)})" if node.gpu_errors else ""
    do = (
        "pass the GPUs to the container (--gpus all, or the NVIDIA runtime), or update the driver for this CUDA"
        if driver
        else "install NVIDIA's driver on the node, or pass the GPUs to the container (--gpus all)"
    )
    return [
        Problem(
            check="GPUs",
            node=node.name,
            found=f"Ray was told {_gpus_of(node.gpus)}, torch computes on {seen}{why}; CUDA of torch "
            f"{node.versions.get('cuda')}, driver {driver or 'none'}",
            expected="as many",
            do=do,
        )
    ]


def _gpus_of(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _room(node: NodeReport, config: Config) -> list[Problem]:
    found = []
    if (
        node.scratch_free_bytes is not None
        and node.scratch_bytes
        and node.scratch_free_bytes < FULL * node.scratch_bytes
    ):
        found.append(
            Problem(
                check="scratch",
                node=node.name,
                found=f"{_gb(node.scratch_free_bytes)} of {_gb(node.scratch_bytes)} free in its temporary folder",
                expected=f"at least {FULL:.0%}, below which Ray spills no objects",
                do="free some, or give the node a larger disk",
            )
        )
    if node.cache_free_bytes is not None and node.cache_free_bytes < config.data.cache_gb * 1e9:
        found.append(
            Problem(
                check="scratch",
                node=node.name,
                found=f"{_gb(node.cache_free_bytes)} free in data.cache_dir {config.data.cache_dir}",
                expected=f"data.cache_gb, {config.data.cache_gb:g} GB",
                do="lower data.cache_gb, or give another folder",
            )
        )
    if 0 < node.object_store_bytes < LEAST_STORE_BYTES:
        found.append(
            Problem(
                check="object store",
                node=node.name,
                found=f"{_gb(node.object_store_bytes)} of object store",
                expected=f"at least {_gb(LEAST_STORE_BYTES)}, which the stream takes in any case",
                do="start the node with more (--object-store-memory)",
            )
        )
    if node.shm_bytes is not None and node.shm_bytes < node.object_store_bytes:
        found.append(
            Problem(
                check="object store",
                node=node.name,
                found=f"{_gb(node.shm_bytes)} of shared memory for an object store of {_gb(node.object_store_bytes)}",
                expected="as much, else Ray keeps objects on disk, and NCCL may find none",
                do="start the container with --shm-size, or mount a larger /dev/shm",
            )
        )
    return found


def _ways(node: NodeReport) -> list[Problem]:
    """What the node reaches, and how well its clock goes."""
    found = []
    for check, error in (("MLflow", node.tracking_error), ("dataset", node.dataset_error), ("store", node.store_error)):
        if error:
            problem = of_sentence(check, error, node.name)
            role = "give the workers the role too (IamInstanceProfile), or open the way to it"
            found.append(problem if problem.do else Problem(check=check, node=node.name, found=error, do=role))
    if node.decode_error:
        found.append(Problem(check="decoding", node=node.name, found=node.decode_error, do=IMAGE))
    if node.clock_skew_s is not None and abs(node.clock_skew_s) > SKEW_S:
        found.append(_skewed("its clock", node.clock_skew_s, node.name))
    return found


def _noted(node: NodeReport) -> list[str]:
    found = []
    if len(node.gpu_names) > node.gpus:
        found.append(f"{node.name}: torch computes on {_gpus_of(len(node.gpu_names))}, Ray was told {node.gpus}")
    if node.clock_skew_s is None:
        found.append(f"{node.name}: its clock was not told")
    elif SKEW_NOTED_S < abs(node.clock_skew_s) <= SKEW_S:
        found.append(f"{node.name}: its clock is {node.clock_skew_s:+.1f} s off the driver's")
    return found


def _skewed(what: str, skew_s: float, node: str | None) -> Problem:
    return Problem(
        check="clock",
        node=node,
        found=f"{what} is {skew_s:+.0f} s off the driver's",
        expected=f"at most {SKEW_S:g} s",
        do="have NTP (chrony) set the clocks",
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
