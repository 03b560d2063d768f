"""The node-hours of a job while it runs: which nodes the cluster has, what they say they are, and how long they are there.

A node is there from the first look that finds it to the look that does not: Ray is asked every few seconds, so an
interruption or a new node is seen that late. What is paid before a node joins Ray (it boots) and after the job (it idles) is
nobody's here. What a job's earlier attempts took lies in its folder, a file for each, and is added: an attempt that was killed
loses no more than what it had not written yet.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import ray

from cxr_dist import storage
from cxr_dist.config import CostConfig
from cxr_dist.cost import Cost, NodeTime, bill, kind_of, metrics, sentence
from cxr_dist.errors import InputError
from cxr_dist.prices import Kind, Prices, read_prices

if TYPE_CHECKING:  # MLflow, which not every job needs
    from cxr_dist.tracking import TrackedRun

__all__ = ["Spending", "attempts_in", "metered"]

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "cost"
"""Of a job's folder: NUMBER.json for each attempt."""
LOOK_S = 2.0
"""Time between two looks at the cluster's nodes, seconds."""
SAVE_S = 30.0
"""Longest that node-hours are known to the driver alone, seconds."""

Nodes = Callable[[], Sequence[Mapping[str, Any]]]


def living_nodes() -> Sequence[Mapping[str, Any]]:
    """The nodes that are there now; none before Ray is up."""
    return [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []


class Spending:
    """What a job has cost so far; counts while its `with` block runs. Nothing here can stop the job but a bad table of prices,
    when it is made (DataError)."""

    def __init__(
        self,
        config: CostConfig,
        *,
        nodes: Nodes = living_nodes,
        clock: Callable[[], float] = time.monotonic,
        look_s: float = LOOK_S,
    ):
        self.prices: Prices = read_prices(config)
        self.region = config.region
        self.images: int | None = None
        """What it is all for, once that is known: `Cost.images`."""
        self.gpu_utilization: float | None = None
        self._nodes, self._clock, self._look_s = nodes, clock, look_s
        self._kinds: dict[str, Kind] = {}
        self._seconds: dict[str, float] = {}
        self._there: dict[str, float] = {}
        """Living nodes, and up to when their time is counted."""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cost", daemon=True)
        self._earlier: dict[int, list[NodeTime]] = {}
        self._unread = 0
        self._folder, self._number, self._saved = "", 0, float("-inf")
        self._is_ours: Callable[[], bool] = lambda: True

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(self._look_s)

    @contextmanager
    def kept(self, folder: str, number: int, is_ours: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """While the block runs, keep the time in the job's folder, as that of attempt `number`; count earlier ones' with it.

        Once `is_ours` is false, a later attempt counts the same nodes, and no more is written.
        """
        self._folder, self._number, self._is_ours = folder, number, is_ours
        try:
            self._earlier, self._unread = attempts_in(folder, but=number)
        except (InputError, OSError) as error:
            log.warning("what earlier attempts cost is not known: %s", " ".join(str(error).split()))
            self._unread = 1
        try:
            yield
        finally:
            self.look()
            self.save()

    def look(self) -> None:
        """Count the time since the last look, of every node that was there then."""
        try:
            nodes = {node["NodeID"]: node.get("Labels") or {} for node in self._nodes()}
        except Exception as error:  # noqa: BLE001 - whatever the cluster answers, it is asked again
            log.warning("cost: the cluster does not say what nodes it has: %s", " ".join(str(error).split())[:300])
            return
        with self._lock:
            now = self._clock()
            for node_id, since in self._there.items():
                self._seconds[node_id] = self._seconds.get(node_id, 0.0) + now - since
            self._there = dict.fromkeys(nodes, now)
            for node_id, labels in nodes.items():
                self._kinds[node_id] = kind_of(labels, self.region)
                self._seconds.setdefault(node_id, 0.0)

    def times(self) -> list[NodeTime]:
        """The time of each node in this attempt."""
        with self._lock:
            return [NodeTime(node_id=n, kind=self._kinds[n], seconds=s) for n, s in sorted(self._seconds.items())]

    def cost(self) -> Cost:
        """What all attempts have cost up to now."""
        self.look()
        return bill(
            [one for times in [*self._earlier.values(), self.times()] for one in times],
            self.prices,
            attempts=len(self._earlier) + self._unread + 1,
            unread=self._unread,
            images=self.images,
            gpu_utilization=self.gpu_utilization,
        )

    def save(self) -> None:
        """Write the time of this attempt, if it has a folder and the storage takes it."""
        self._saved = self._clock()
        if not self._folder or not self._is_ours():
            return
        times = [{"node_id": one.node_id, **vars(one.kind), "seconds": round(one.seconds, 3)} for one in self.times()]
        try:
            where = storage.join(self._folder, FOLDER, f"{self._number:06d}.json")
            storage.put_atomic(where, json.dumps({"format": FORMAT, "nodes": times}, indent=1).encode())
        except (InputError, OSError) as error:
            log.warning("what this attempt cost is not kept yet: %s", " ".join(str(error).split())[:300])

    def tell(self, tracked: "TrackedRun") -> None:
        """Log the cost so far to the run, whichever way it ends: metrics at a step for each attempt, and what they mean."""
        found = self.cost()
        tracked.log_metrics(metrics(found), step=found.attempts - 1)
        tracked.set_tags({"cost": sentence(found), "cost.prices": found.words()})

    def _watch(self) -> None:
        while not self._over.wait(self._look_s):
            self.look()
            if self._clock() - self._saved >= SAVE_S:
                self.save()


def attempts_in(folder: str, but: int = 0) -> tuple[dict[int, list[NodeTime]], int]:
    """Attempt → the time of its nodes, as a job's folder has it, without attempt `but`; and how many cannot be read."""
    found: dict[int, list[NodeTime]] = {}
    unread = 0
    for name, _ in storage.list_files(storage.join(folder, FOLDER)):
        where = storage.join(folder, FOLDER, name)
        try:
            number, content = int(name.removesuffix(".json")), json.loads(storage.read_bytes(where))
            if content["format"] != FORMAT:
                raise ValueError(f"found format {content['format']!r}, expected {FORMAT}")
            if number != but:
                found[number] = [_node_time(one) for one in content["nodes"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s: what this attempt cost cannot be read (%s)", storage.shown(where), error)
            unread += 1
    return found, unread


def _node_time(raw: dict[str, Any]) -> NodeTime:
    kind = Kind(instance=raw["instance"], market=raw["market"], region=raw["region"])
    return NodeTime(node_id=raw["node_id"], kind=kind, seconds=float(raw["seconds"]))


@contextmanager
def metered(config: CostConfig) -> Iterator[Callable[[int | None], dict[str, Any]]]:
    """For a job without a folder of its own: gives what says the cost so far, of so many images, and prints it."""
    with Spending(config) as spending:

        def so_far(images: int | None = None) -> dict[str, Any]:
            spending.images = images
            found = spending.cost()
            print(f"cost: {sentence(found)}")
            return found.to_json()

        yield so_far
