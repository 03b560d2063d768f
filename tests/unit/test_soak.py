"""What the soak concludes from what it saw: counts of steps, memory at three moments, the sum of images at any step."""

import random

import pytest

from cxr_dist.data.plan import Plan, Split
from cxr_dist.train.progress import planned_samples
from tests.soak.account import Steps, planned, steps_of
from tests.soak.faults import FAULTS, deal
from tests.soak.processes import OURS, Held, Seen, held, kind_of
from tests.soak.summary import checks_of_processes, grown, shapes


def test_steps_once_twice_and_missing():
    assert steps_of([1, 2, 3], 3) == Steps(last=3, once=3, twice=0, missing=0)
    assert steps_of([1, 3, 3, 5], 6) == Steps(last=6, once=2, twice=1, missing=3)
    assert steps_of([1, 2, 3, 4], 2) == Steps(last=4, once=4, twice=0, missing=0)
    assert steps_of([], 2) == Steps(last=2, once=0, twice=0, missing=2)


def test_planned_sum_at_the_end_of_an_epoch_is_the_jobs_own():
    split = Split(num_rows=70, row_group=8)
    plan = Plan(train=split, validation=Split(num_rows=20, row_group=8), seed=3, epochs=4, global_batch=16)
    ids = [f"{row}.png" for row in range(70)]
    for epochs in (1, 3):
        steps, sha256 = planned(plan, ids, epochs * plan.steps_per_epoch)
        assert (steps, sha256) == (epochs * plan.train_steps, planned_samples(plan, ids, epochs))
    assert planned(plan, ids, 2)[0] == 2
    assert planned(plan, ids, 2) != planned(plan, ids, 3)


def test_a_kind_holds_what_its_processes_hold_together():
    def look(at: float, *mb: float) -> list[Seen]:
        return [Seen(at, "rank", pid, size, 2 * size, 10) for pid, size in enumerate(mb)]

    seen = [*look(1, 1000, 1000), *look(2, 100, 120), *look(3, 100, 130), *look(4, 100, 400), *look(5, 1, 1)]
    assert held(seen, 2, 5) == {"rank": Held(processes=2, mb=230, rss_mb=460, files=20)}
    assert held(seen, 6, 7) == {}


def test_a_look_without_a_kind_counts_as_nothing_of_it():
    seen = [Seen(1, "rank", 1, 100, 100, 5), Seen(2, "driver", 2, 50, 60, 3), Seen(3, "driver", 2, 50, 60, 3)]
    assert held(seen, 0, 4)["rank"].mb == 0


def test_growth_of_more_than_a_twentieth_breaks_the_promise():
    def verdicts(mb: float, files: float) -> list[bool]:
        return [check.held for check in grown("rank", Held(2, 200, 300, 100), Held(2, mb, 300, files))]

    assert verdicts(209, 105) == [True, True]
    assert verdicts(211, 106) == [False, False]
    assert verdicts(100, 10) == [True, True]
    assert [check.held for check in grown("driver", Held(1, 9, 9, 20), Held(1, 9, 9, 24))] == [True, True]
    assert [check.held for check in grown("driver", Held(1, 9, 9, 20), Held(1, 9, 9, 25))] == [True, False]


def test_both_comparisons_are_made_of_every_kind_of_the_run():
    def moment(mb: float) -> dict[str, Held]:
        return {kind: Held(1, mb, mb, 10) for kind in OURS}

    checks = checks_of_processes({"start": moment(100), "end": moment(100), "later": moment(110)})
    assert [check.held for check in checks] == [True, True] * len(OURS) + [False, True] * len(OURS)
    with pytest.raises(KeyError):
        checks_of_processes({"start": moment(100), "end": {}, "later": moment(100)})


@pytest.mark.parametrize(
    ("name", "command", "kind"),
    [
        ("python", ["python", "jobs/train.py", "--config", "x"], "driver"),
        ("sh", ["/bin/sh", "-c", "python jobs/train.py --config x"], ""),
        ("ray::RayTrainWo", ["ray::RayTrainWorker.run_train_fn"], "rank"),
        ("ray::MapWorker(", ["ray::MapWorker(MapBatches(_Worker)).submit"], "decoder"),
        ("ray::NodeMonito", ["ray::NodeMonitor"], "node monitor"),
        ("ray::IDLE", ["ray::IDLE"], "Ray's idle workers"),
        ("ray::_StatsActo", ["ray::_StatsActor.run"], "Ray's _StatsActor"),
        ("raylet", ["/x/raylet", "--raylet_socket_name=y"], "Ray's raylet"),
        ("gcs_server", ["/x/gcs_server"], "Ray's GCS"),
        ("python", ["python", "/x/ray/dashboard/dashboard.py"], "Ray's dashboard"),
        ("python", ["python", "/x/ray/_private/log_monitor.py"], "Ray's other processes"),
    ],
)
def test_kinds_of_processes(name, command, kind):
    assert kind_of(name, command) == kind


def test_every_fault_comes_once_in_each_round_and_the_seed_decides_the_order():
    def names(seed: int) -> list[str]:
        faults = deal(random.Random(seed))
        return [next(faults).name for _ in range(2 * len(FAULTS))]

    first = names(1)
    assert sorted(first[: len(FAULTS)]) == sorted(first[len(FAULTS) :]) == sorted(fault.name for fault in FAULTS)
    assert names(1) == first
    assert names(2) != first


def test_names_of_temporary_files_are_counted_by_shape():
    token = "0123456789abcdef" * 2
    names = [f"cxr-dist-{token}-17", f"cxr-dist-{token}-18", f"cxr-dist-{token}", "pymp-kk7pzecc", "meta"]
    assert shapes(names) == ["1 × cxr-dist-…", "2 × cxr-dist-…-…", "1 × meta", "1 × pymp-…"]
