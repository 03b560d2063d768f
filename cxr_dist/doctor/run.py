"""The doctor's order of work: what needs no cluster, the nodes, what they leave room for, the ranks; then the verdict."""

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import ray

from cxr_dist import cluster, storage
from cxr_dist.capacity import check_resources, decoding_cpus, wants_gpu, world_sizes
from cxr_dist.config import Config, flatten
from cxr_dist.doctor import judge, ranks, services
from cxr_dist.doctor.ask import ask_nodes
from cxr_dist.doctor.problems import Problem, of_sentence
from cxr_dist.doctor.report import RanksReport, as_json, decode_rates
from cxr_dist.doctor.table import table
from cxr_dist.errors import ConfigError
from cxr_dist.train.prepare import bundles, with_defaults
from cxr_dist.train.survey import settled

__all__ = ["examine"]

DECIDES = (
    *("data.size", "data.row_group", "model.trainable", "model.prefix_form", "train.global_batch", "train.micro_batch"),
    *("train.precision", "train.threads_per_worker", "train.cpus_per_worker"),
)
"""Config that the rates hold for."""

log = logging.getLogger(__name__)


def examine(config: Config, *, timeout_s: float, store_bytes: int) -> dict[str, Any]:
    """Look at everything a run of this config would need, and print what was found; the job's JSON result.

    Nothing it finds is raised, but for a config that is impossible in itself (ConfigError).
    """
    config = with_defaults(config)
    found = Findings()
    log.info("looking at dataset, weights, store and MLflow")
    prefix = storage.join(config.train.storage_path, f".doctor-{uuid.uuid4().hex}")
    try:
        manifest = services.check_data(config, found.problems, found.notes)
        row_group = manifest.row_group if manifest else config.data.row_group
        sizes = world_sizes(config, row_group)  # a ConfigError: no cluster would do
        initial = services.starting_weights(config, len(ranks.findings_of(config)), found.problems)
        store_skew = services.check_store(prefix, found.problems)
        writable = not any(problem.check == "store" for problem in found.problems)
        found.take(judge.judge_clock(store_skew) if writable else ([], []))
        services.check_runs(config, found.problems, found.notes)
        images, whose = services.sample_images(manifest, config)
        cluster.connect(config.train.workers[1] * config.train.cpus_per_worker + max(1, config.data.decode_workers))
        cluster.wait_for_room(bundles(config), config.train.wait_for_nodes_s)
        listed = ray.nodes()
        log.info("asking %d nodes", sum(node["Alive"] for node in listed))
        nodes = ask_nodes(
            config,
            listed,
            prefix_of=(lambda node_id: storage.join(prefix, node_id)) if writable else None,
            store_bytes=store_bytes,
            images=images,
            timeout_s=timeout_s,
        )
    finally:
        services.remove(prefix, found.notes)
    found.notes.append(f"decoding: {len(images)} PNG files were {whose}")
    found.notes += gone(listed)
    found.take(judge.judge_nodes(nodes, config))
    world = room(config, sizes, listed, found.problems)
    gpu = wants_gpu(config, ray.cluster_resources())
    measured = RanksReport(backend="nccl" if gpu else "gloo")
    job = ranks.rehearsal(config, world_size=world or sizes[0], use_gpu=gpu, row_group=row_group)
    broken = [node.name for node in nodes if node.error]
    broken += [problem.node for problem in found.problems if gpu and problem.check == "GPUs" and problem.node]
    if world is None:
        found.notes.append("ranks: there is no room for them, so training and all-reduce were not measured")
    elif broken:
        found.notes.append(f"ranks: training and all-reduce were not measured, for {broken[0]} is not well")
    else:
        log.info("measuring %d ranks", world)
        hosts = {node.node_id: node.name for node in nodes}
        measured, problems = ranks.measure(job, initial, hosts, timeout_s=timeout_s)
        found.problems += problems
        found.notes += judge.judge_ranks(measured)
    decided = settled(config)
    found.take(
        judge.judge_decoding(
            decode_rates(nodes),
            ranks=world or sizes[0],
            gpu=gpu,
            images_per_s=min(measured.train_images_per_s, default=None),
            cpus=config.data.decode_workers or decoding_cpus(with_ranks(config, world or sizes[0]), listed, gpu=gpu),
            encoding=config.data.encoding,
            decodes_always=decided is not None and not decided.use,
        )
    )
    print(table(nodes, measured, found.problems, found.notes))
    return as_json(
        problems=found.problems,
        notes=found.notes,
        nodes=nodes,
        ranks=measured,
        more={"store_clock_skew_s": store_skew, "measured_for": {key: flatten(config)[key] for key in DECIDES}},
    )


@dataclasses.dataclass
class Findings:
    """What has come to light so far."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def take(self, judged: tuple[list[Problem], list[str]]) -> None:
        self.problems += judged[0]
        self.notes += judged[1]


def room(config: Config, sizes: tuple[int, ...], nodes: list[dict[str, Any]], problems: list[Problem]) -> int | None:
    """The most ranks of `sizes` that the cluster holds, by its own arithmetic; None, and a problem, if not the fewest.

    CPUs and GPUs that other jobs hold at present are a problem of their own.
    """
    resources, refused = ray.cluster_resources(), ""
    for size in reversed(sizes):
        try:
            check_resources(with_ranks(config, size), resources, nodes)
            break
        except ConfigError as error:
            refused = str(error)
    else:
        problems.append(of_sentence("resources", f"{refused}; {grown(config, nodes)}"))
        return None
    free: Mapping[str, float] = ray.available_resources()
    try:
        check_resources(with_ranks(config, size), free)
    except ConfigError as error:
        told = str(error).partition("; ")[0]
        problems.append(
            Problem(
                check="resources",
                found=f"of what is free, {told}",
                expected="room for the run",
                do="wait for the jobs that hold the rest (ray status, ray job list)",
            )
        )
        return None
    return size


def grown(config: Config, nodes: list[dict[str, Any]]) -> str:
    """What to do where a cluster is too small, if it is one that grows by demand."""
    if config.train.wait_for_nodes_s:
        return f"no more came within {config.train.wait_for_nodes_s} s, see ray status"
    alive = [node for node in nodes if node["Alive"]]
    able = sum(node["Resources"].get("CPU", 0) > 0 for node in alive)
    nodes_now = f"{able} of {len(alive)} node{'' if len(alive) == 1 else 's'}"
    return f"{nodes_now} can run ranks or decode now; where nodes come by demand, --wait 900 asks for them"


def with_ranks(config: Config, size: int) -> Config:
    """The config with a fixed number of ranks."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_workers=size))


def gone(nodes: list[dict[str, Any]]) -> list[str]:
    """A note of the nodes that the cluster has lost."""
    lost = [node.get("NodeManagerHostname") or node["NodeManagerAddress"] for node in nodes if not node["Alive"]]
    return (
        [f"{len(lost)} nodes have left the cluster since it began: {', '.join(sorted(set(lost))[:5])}"] if lost else []
    )
