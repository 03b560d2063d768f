"""What a job cost: worked by hand, over kinds of nodes with and without prices, and over attempts."""

import pytest

from cxr_dist.cost import Cost, NodeTime, bill, kind_of, metrics, money, sentence
from cxr_dist.prices import Kind, parse

PRICES = parse(
    b"""format = "cxr-dist/prices/1"
price = [
  { instance = "cpu", market = "on-demand", usd_per_hour = 0.2, date = 2026-02-09, source = "list" },
  { instance = "gpu", market = "on-demand", usd_per_hour = 1.2, date = 2026-02-09, source = "list" },
  { instance = "gpu", market = "spot", usd_per_hour = 0.4, date = 2026-11-01, source = "bill" },
]
""",
    "the table",
)
CPU = Kind(instance="cpu", market="on-demand")
GPU = Kind(instance="gpu", market="spot")


def times(*nodes: tuple[str, Kind, float]) -> list[NodeTime]:
    return [NodeTime(node_id=node_id, kind=kind, seconds=3600 * hours) for node_id, kind, hours in nodes]


def test_hours_times_prices() -> None:
    cost = bill(times(("h", CPU, 2.0), ("a", GPU, 1.5), ("b", GPU, 0.5)), PRICES, images=48_000, gpu_utilization=0.83)
    assert cost.amount == pytest.approx(2 * 0.2 + 2 * 0.4)
    assert (cost.node_hours, cost.unpriced_node_hours, cost.nodes) == (4.0, 0.0, 3)
    assert cost.images_per_usd == pytest.approx(40_000)
    assert [(charge.nodes, charge.hours) for charge in cost.charges] == [(1, 2.0), (2, 2.0)]
    assert metrics(cost) == {
        "cost/node_hours": 4.0,
        "cost/unpriced_node_hours": 0.0,
        "cost/usd": pytest.approx(1.2),
        "cost/images_per_usd": pytest.approx(40_000),
        "cost/gpu_utilization_fraction": 0.83,
    }
    assert sentence(cost) == (
        "1.20 USD for 4 node-hours of 3 nodes (1 x cpu on-demand for 2 h, 2 x gpu spot for 2 h); 40,000 images per USD; "
        "GPUs busy 83% of the time"
    )
    assert (
        cost.words()
        == "0.2 USD an hour for cpu on-demand (list, 2026-02-09); 0.4 USD an hour for gpu spot (bill, 2026-11-01)"
    )


def test_a_node_of_several_attempts_is_one_node_with_all_its_time() -> None:
    cost = bill(times(("a", CPU, 1.0), ("a", CPU, 2.0), ("b", CPU, 0.5)), PRICES, attempts=2)
    assert (cost.nodes, cost.node_hours, cost.amount) == (2, 3.5, pytest.approx(0.7))
    assert "2 attempts" in sentence(cost)


def test_hours_without_a_price_are_counted_and_make_no_amount() -> None:
    strange = Kind(instance="other", market="spot")
    cost = bill(times(("h", CPU, 1.0), ("x", strange, 3.0)), PRICES, images=1000)
    assert (cost.amount, cost.at_most, cost.images_per_usd) == (None, None, None)
    assert (cost.node_hours, cost.unpriced_node_hours) == (4.0, 3.0)
    assert metrics(cost) == {"cost/node_hours": 4.0, "cost/unpriced_node_hours": 3.0}
    assert sentence(cost) == (
        "4 node-hours of 2 nodes (1 x cpu on-demand for 1 h, 1 x other spot for 3 h); 3 of them without a price: the table has no "
        "row for other spot"
    )
    assert [charge["amount"] for charge in cost.to_json()["charges"]] == [pytest.approx(0.2), None]


def test_a_spot_node_without_a_row_has_a_bound() -> None:
    spot = Kind(instance="cpu", market="spot")
    cost = bill(times(("h", CPU, 1.0), ("x", spot, 3.0)), PRICES, images=1000)
    assert (cost.amount, cost.images_per_usd) == (None, None)
    assert cost.at_most == pytest.approx(4 * 0.2)
    assert metrics(cost) == {
        "cost/node_hours": 4.0,
        "cost/unpriced_node_hours": 3.0,
        "cost/usd_at_most": pytest.approx(0.8),
    }
    assert "at most 0.8 USD, 3 of them without a price" in sentence(cost)


def test_no_node_no_price() -> None:
    cost = bill([], PRICES)
    assert cost == Cost(charges=(), prices="the table")
    assert (cost.amount, cost.at_most, cost.node_hours, cost.words()) == (None, None, 0, "no node was seen")
    assert sentence(cost) == "0 node-hours of 0 nodes"


def test_a_free_machine_has_no_images_per_dollar() -> None:
    free = parse(
        b'format = "cxr-dist/prices/1"\nprice = [{ instance = "own", market = "on-demand", usd_per_hour = 0, '
        b'date = 2026-02-09, source = "ours" }]\n',
        "t",
    )
    cost = bill(times(("a", Kind(instance="own", market="on-demand"), 1.0)), free, images=10)
    assert (cost.amount, cost.images_per_usd) == (0.0, None)
    assert cost.to_json()["amount"] == 0.0


@pytest.mark.parametrize(
    ("labels", "region", "kind"),
    [
        ({}, "", Kind(instance=None, market=None)),
        ({"cxr-instance": "a", "cxr-market": "spot"}, "", Kind(instance="a", market="spot")),
        ({"cxr-instance": "a", "ray.io/market-type": "spot"}, "", Kind(instance="a", market="spot")),
        (
            {"cxr-instance": "a", "cxr-market": "on-demand", "ray.io/market-type": "spot"},
            "",
            Kind(instance="a", market="on-demand"),
        ),
        ({"cxr-instance": "", "cxr-market": "SPOT"}, "", Kind(instance=None, market=None)),
        ({"ray.io/availability-region": "east"}, "", Kind(instance=None, market=None, region="east")),
        (
            {"cxr-region": "south", "ray.io/availability-region": "east"},
            "",
            Kind(instance=None, market=None, region="south"),
        ),
        ({"ray.io/availability-region": "east"}, "west", Kind(instance=None, market=None, region="west")),
    ],
)
def test_what_a_node_says_it_is(labels: dict[str, str], region: str, kind: Kind) -> None:
    assert kind_of(labels, region) == kind


def test_money_has_the_digits_that_a_small_run_needs() -> None:
    assert [money(x) for x in (None, 0.001234, 0.5, 1.0, 1234.5)] == [
        "unknown",
        "0.00123 USD",
        "0.5 USD",
        "1.00 USD",
        "1,234.50 USD",
    ]
