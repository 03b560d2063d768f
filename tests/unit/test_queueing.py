"""The queue model: worked by hand, at its limits, and fitted back to what it made itself. No Ray starts."""

import dataclasses
import itertools

import numpy as np
import pytest

from cxr_dist.bench import queueing
from cxr_dist.bench.queueing import Costs, Measured, Pipeline, errors, fitted, flow, settled_rate

FREE = Costs(task_s=1e-9, block_s=1e-9, batch_s=1e-9)
BASE = Pipeline(ranks=1, decoders=1, share=10, steps_per_task=2, image_s=0.1, step_s=0.5, rounds=4)


def pipeline(**changed: object) -> Pipeline:
    return dataclasses.replace(BASE, **changed)  # type: ignore[arg-type]


def taken(one: Pipeline, costs: Costs = FREE) -> list[float]:
    return [round(float(when), 6) for when in queueing._taken(one, costs)]


def test_one_decoder_one_rank_by_hand() -> None:
    """A task of 20 images takes 2 s, its steps 1 s: each block is taken when it is decoded, up to a turn of the loop later."""
    assert taken(pipeline(poll_s=100.0)) == [
        4.0,
        5.0,
        8.0,
        9.0,
    ]  # in pairs: the loop waits until all it gave out is done
    assert taken(pipeline(poll_s=0.5)) == [2.0, 4.0, 6.0, 8.0]
    assert taken(pipeline(poll_s=0.3)) == [2.1, 4.2, 6.0, 8.0]  # the last: all is done, and the loop is woken


def test_a_slow_rank_takes_one_block_after_another() -> None:
    assert taken(pipeline(step_s=3.0, poll_s=0.5)) == [2.0, 8.0, 14.0, 20.0]
    assert taken(pipeline(step_s=3.0, poll_s=0.5), Costs(task_s=1e-9, block_s=0.6, batch_s=0.2)) == [
        2.0,
        9.0,
        16.0,
        23.0,
    ]


def test_the_loop_gives_out_and_takes_in_one_thing_at_a_time() -> None:
    """Nothing to decode, a second each: given out at 1 and 2, taken in at 3 and 4, and so on."""
    found = taken(pipeline(image_s=0.0, step_s=0.0, poll_s=0.5), Costs(task_s=1.0, block_s=1e-9, batch_s=1e-9))
    assert found == [3.0, 4.0, 7.0, 8.0]


def test_blocks_go_to_the_ranks_in_turn_and_in_order() -> None:
    """Three decoders: tasks 0, 1, 2 end at 2 s; rank 1 has task 1 and then 3, which ends at 4 s."""
    one = pipeline(ranks=2, decoders=3, rounds=3, poll_s=0.5)
    assert taken(one) == [2.0, 2.0, 3.0, 4.0, 4.0, 5.0]


def test_together_no_rank_begins_before_all_have_their_block() -> None:
    apart, together = (pipeline(ranks=3, decoders=1, rounds=3, poll_s=0.5, together=flag) for flag in (False, True))
    assert taken(apart) == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0]
    assert taken(together) == [6.0, 6.0, 6.0, 12.0, 12.0, 12.0, 18.0, 18.0, 18.0]


def test_not_more_blocks_wait_than_may() -> None:
    """One decoder that needs no time and a rank that needs 1 s a block: the decoder is ahead by the window, no more."""
    one = pipeline(image_s=0.0, rounds=40, poll_s=0.01)
    assert one.window == 2 + (8 + 4) // 4
    assert taken(one) == [float(second) for second in range(40)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_with_time_to_spare_elsewhere_the_slowest_sets_the_rate(ranks: int) -> None:
    many = {"ranks": ranks, "rounds": 2400 // ranks, "share": 64, "steps_per_task": 8}
    decoding = flow(pipeline(**many, decoders=4, image_s=0.004, step_s=0.0), FREE)
    assert decoding.images_per_s == pytest.approx(4 / 0.004, rel=0.05)
    assert decoding.busiest == "decode"
    stepping = flow(pipeline(**many, decoders=4 * ranks, image_s=0.004, step_s=0.2), FREE)
    assert stepping.images_per_s == pytest.approx(ranks * 64 / 0.2, rel=0.01)
    assert (stepping.busiest, round(stepping.step, 2)) == ("step", 1.0)
    looping = flow(
        pipeline(**many, decoders=64, image_s=0.0001, step_s=0.0), Costs(task_s=0.02, block_s=1e-9, batch_s=1e-9)
    )
    assert looping.images_per_s == pytest.approx(64 * 8 / 0.04, rel=0.05)
    assert (looping.busiest, round(looping.loop, 1)) == ("loop", 1.0)


def test_no_rate_is_above_what_any_stage_can_do() -> None:
    costs = Costs(task_s=0.01, block_s=0.01, batch_s=0.005)
    for ranks, decoders, image_s, step_s in itertools.product((1, 3, 16), (1, 5, 40), (0.001, 0.01), (0.0, 0.05)):
        one = pipeline(ranks=ranks, decoders=decoders, image_s=image_s, step_s=step_s, rounds=400, together=True)
        per_task = one.images_per_task
        most = min(
            decoders / image_s,
            per_task / (2 * costs.task_s),
            ranks * per_task / (0.01 + one.steps_per_task * (0.005 + step_s)),
        )
        # the start is left out of the rate, but blocks that waited then are taken later
        assert flow(one, costs).images_per_s <= 1.05 * most


def test_what_shares_cores_is_not_faster_than_they_are() -> None:
    """A task costs the loop 2 x 10 ms, its rank 10 and 2 x 5, its decoder 20: 60 ms, of which two cores do 33 a second."""
    costs = Costs(task_s=0.01, block_s=0.01, batch_s=0.005, made_s=0.02)
    one = pipeline(ranks=4, decoders=8, image_s=0.0, step_s=0.0, rounds=100)
    assert flow(dataclasses.replace(one, cores=2.0), costs).images_per_s == pytest.approx(20 / 0.03)
    assert flow(dataclasses.replace(one, cores=8.0), costs) == flow(one, costs)
    assert flow(one, costs).images_per_s == pytest.approx(20 / 0.02, rel=0.05)


def test_more_of_anything_never_slows_a_run() -> None:
    costs = Costs(task_s=0.004, block_s=0.002, batch_s=0.0)
    rates = [flow(pipeline(ranks=4, decoders=count, rounds=200), costs).images_per_s for count in (1, 2, 4, 8, 16)]
    assert all(later >= 0.99 * earlier for earlier, later in itertools.pairwise(rates))


def test_a_rate_by_hand() -> None:
    """The second half counts: rank 0 takes blocks at 4, 6 and 8 s, rank 1 at 5, 9 and 13 s."""
    taken_rw = np.array([[0.0, 0.0], [1.0, 1.0], [4.0, 5.0], [6.0, 9.0], [8.0, 13.0]])
    assert settled_rate(taken_rw, 100) == 100 * (2 / 4 + 2 / 8)
    with pytest.raises(ValueError, match="found a pass without a length"):
        settled_rate(taken_rw[:1], 100)
    with pytest.raises(ValueError, match="found a pass without a length"):
        settled_rate(np.zeros((4, 1)), 100)


def test_costs_are_found_again_from_passes_that_the_model_made() -> None:
    costs = Costs(task_s=0.0071, block_s=0.02, batch_s=0.004)
    shown = [
        pipeline(ranks=4, decoders=16, steps_per_task=1, image_s=0.0, step_s=0.0, rounds=60),
        pipeline(ranks=1, decoders=4, steps_per_task=1, image_s=0.0, step_s=0.0, rounds=100),
        pipeline(ranks=1, decoders=4, steps_per_task=16, image_s=0.0, step_s=0.0, rounds=100),
    ]
    kept = pipeline(ranks=8, decoders=8, image_s=0.002, step_s=0.01, rounds=40)
    passes = [
        Measured(pipeline=one, images_per_s=flow(one, costs).images_per_s, task_s=0.0071, fit=one is not kept)
        for one in (*shown, kept)
    ]
    found = fitted(passes)
    assert dataclasses.astuple(found)[:3] == pytest.approx(dataclasses.astuple(costs)[:3], rel=0.05)
    assert max(map(abs, errors(passes, found, fit=True))) < 0.02
    assert errors(passes, found, fit=False) == [pytest.approx(0, abs=0.02)]
    with pytest.raises(ValueError, match="found no pass to fit to"):
        fitted([dataclasses.replace(one, fit=False) for one in passes])
