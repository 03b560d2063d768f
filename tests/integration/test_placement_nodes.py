"""Decoding on a cluster with labelled raylets: on the ingest node while it lives, elsewhere when it died, the same samples."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from cxr_dist.data import tasks
from cxr_dist.data.decode import Decoder, StreamSpec
from cxr_dist.data.stream import Stream, build_splits
from cxr_dist.evaluate.inference import pipeline
from cxr_dist.placement import decoding
from tests.integration import test_stream as streams

STORE = 128 << 20


class Witness:
    """A decoder that leaves the name of its node in a folder, as a file, for each block that it makes."""

    def __init__(self, folder: Path, spec: StreamSpec):
        self.folder, self.decoder = folder, Decoder(spec)

    def block(self, number: int) -> pa.Table:
        leave(self.folder)
        return self.decoder.block(number)


def leave(folder: Path) -> str:
    node = ray.get_runtime_context().get_node_id()
    (folder / node).touch()
    return node


class Labelled:
    """A Ray of this machine with a head of two CPUs, and an ingest node of two beside it while it is wanted."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": 2, "object_store_memory": STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=options)
        ray.init(self.cluster.address, logging_level="ERROR", log_to_driver=False)
        self.node: Any = None

    def with_ingest(self) -> str:
        """Id of the ingest node, which is started if there is none."""
        if self.node is None:
            self.node = self.cluster.add_node(num_cpus=2, object_store_memory=STORE, labels={"cxr-role": "ingest"})
            self.cluster.wait_for_nodes()
        return self.node.node_id

    def kill_ingest(self) -> None:
        """SIGKILL to its processes."""
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = None


@pytest.fixture(scope="module")
def labelled() -> Iterator[Labelled]:
    here = (sys.modules[__name__], sys.modules[streams.__name__])
    for module in here:
        ray.cloudpickle.register_pickle_by_value(module)
    made = Labelled()
    yield made
    ray.shutdown()
    made.cluster.shutdown()
    for module in here:
        ray.cloudpickle.unregister_pickle_by_value(module)


def nodes_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def one_rank(folder: Path) -> tuple[StreamSpec, Stream]:
    spec = dataclasses.replace(streams.spec_of(), world_size=1, steps_per_task=1)
    [shard] = build_splits(spec, num_actors=2, decoder=partial(Witness, folder))
    return spec, Stream(shard=shard, plan=spec.plan, rank=0, world_size=1, size=streams.SIZE)


def check(spec: StreamSpec, stream: Stream, batches: list[Any]) -> None:
    streams.assert_delivered([streams.Outcome(batches, stream.corrupt, stream.delivered, stream.start)], spec)


def test_decoding_runs_on_the_ingest_node_and_elsewhere_once_it_is_dead(labelled: Labelled, tmp_path: Path) -> None:
    ingest = labelled.with_ingest()
    spec, stream = one_rank(tmp_path)
    batches, before = [], set()
    for batch in stream:
        batches.append(streams.Got.of(batch))
        if len(batches) == 6:
            before = nodes_in(tmp_path)
            labelled.kill_ingest()
    assert before == {ingest}
    assert len(nodes_in(tmp_path)) == 2
    check(spec, stream, batches)
    assert decoding() == {}


def test_without_an_ingest_node_nothing_is_preferred(labelled: Labelled, tmp_path: Path) -> None:
    if labelled.node:
        labelled.kill_ingest()
    spec, stream = one_rank(tmp_path)
    check(spec, stream, [streams.Got.of(batch) for batch in stream])
    assert nodes_in(tmp_path) == {ray.get_runtime_context().get_node_id()}


class Count:
    """Stands for a scorer."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


def decode(folder: Path, batch: dict[str, Any]) -> Iterator[pa.Table]:
    yield pa.table({"node": [leave(folder)], "item": [int(batch["item"][0])]})


def test_ingest_and_scoring_go_there_too_and_overflow(labelled: Labelled, tmp_path: Path) -> None:
    ingest = labelled.with_ingest()
    assert tasks.run(leave, [(tmp_path,)], [1], "calls") == [ingest]
    blocks = pipeline(partial(decode, tmp_path), [0], Count, (), rows_per_task=1, num_scorers=1, use_gpu=False)
    assert blocks.take_all() == [{"node": ingest, "item": 0}]


def test_what_has_no_room_there_goes_elsewhere(labelled: Labelled, tmp_path: Path) -> None:
    ingest = labelled.with_ingest()
    meeting = ray.remote(num_cpus=1)(meet).options(**decoding())
    met = ray.get([meeting.remote(tmp_path, number, 4) for number in range(4)])
    assert met.count(ingest) == 2
    assert len(set(met)) == 2


def meet(folder: Path, number: int, guests: int) -> str:
    """The node that this runs on, told when so many of these run at once."""
    (folder / str(number)).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < guests:
        assert time.monotonic() < deadline, "the others did not come"
        time.sleep(0.01)
    return ray.get_runtime_context().get_node_id()
