"""The table of prices: the one that comes with the code, a user's own, rows that are none, and which row a node falls under."""

import datetime
from pathlib import Path

import pytest
import yaml

from cxr_dist.config import CostConfig
from cxr_dist.errors import DataError
from cxr_dist.prices import OURS, Kind, parse, read_prices
from tests.conftest import ROOT

ROW = 'instance = "a", market = "spot", region = "r", usd_per_hour = 0.5, date = 2026-02-09, source = "s"'


def table(*rows: str) -> bytes:
    return ('format = "cxr-dist/prices/1"\nprice = [' + ", ".join(f"{{ {row} }}" for row in rows) + "]\n").encode()


def test_every_row_of_our_table_has_a_source_and_a_day_that_has_been() -> None:
    found = read_prices(CostConfig())
    assert len(found.rows) > 30
    assert found.where == "infra/prices.toml"
    for row in found.rows:
        assert row.source
        assert datetime.date(2026, 1, 1) < row.date <= datetime.date.today()
        assert row.usd_per_hour > 0


def test_every_instance_type_of_the_cluster_file_has_a_price() -> None:
    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    prices = read_prices(CostConfig(region=cluster["provider"]["region"]))
    for name, node in cluster["available_node_types"].items():
        kind = Kind(
            instance=node["node_config"]["InstanceType"], market="on-demand", region=cluster["provider"]["region"]
        )
        assert prices.find(kind)[0] is not None, name
        spot = Kind(instance=kind.instance, market="spot", region=kind.region)
        assert prices.at_most(spot) == prices.find(kind)[0], name


def test_our_table_travels_with_a_submitted_job() -> None:
    assert OURS == ROOT / "infra" / "prices.toml"
    left_at_home = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text())["excludes"]
    assert not {"infra", "infra/prices.toml", "*.toml"} & set(left_at_home)


def test_a_table_of_ones_own_replaces_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(
        table('instance = "rack", market = "on-demand", usd_per_hour = 2, date = 2026-11-01, source = "our bill"')
    )
    found = read_prices(CostConfig(prices=str(tmp_path / "mine.toml")))
    price, why = found.find(Kind(instance="rack", market="on-demand", region="anywhere"))
    assert price is not None
    assert (price.usd_per_hour, price.source, why) == (2.0, "our bill", "")
    assert str(price) == "2 USD an hour for rack on-demand (our bill, 2026-11-01)"
    assert found.find(Kind(instance="g5.2xlarge", market="on-demand"))[0] is None


def test_without_the_table_nothing_has_a_price(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cxr_dist.prices.OURS", tmp_path / "none.toml")
    found = read_prices(CostConfig())
    assert found.rows == ()
    assert "cost.prices" in found.find(Kind(instance="g5.2xlarge", market="spot"))[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"\xff\xfe", "found no TOML"),
        (lambda text: b"format = ", "found no TOML"),
        (lambda text: text.replace(b"prices/1", b"prices/2"), "found format 'cxr-dist/prices/2', expected"),
        (
            lambda text: b'format = "cxr-dist/prices/1"\nprices = []\n',
            "found 'prices', expected format and price alone",
        ),
        (lambda text: b'format = "cxr-dist/prices/1"\nprice = 3\n', "found price = 3, expected a list"),
        (lambda text: b'format = "cxr-dist/prices/1"\nprice = [3]\n', "price 1: found 3, expected a row"),
        (
            lambda text: text.replace(b"usd_per_hour", b"usd_per_huor"),
            "unknown key usd_per_huor: did you mean usd_per_hour",
        ),
        (lambda text: text.replace(b', source = "s"', b""), "price 1: found no source, expected one"),
        (lambda text: text.replace(b", date = 2026-02-09", b""), "price 1: found no date, expected one"),
        (lambda text: text.replace(b"2026-02-09", b'"yesterday"'), "found date 'yesterday', expected a day"),
        (lambda text: text.replace(b"2026-02-09", b"2026-02-09T10:00:00"), "found date datetime"),
        (lambda text: text.replace(b"0.5", b'"0.5"'), "found usd_per_hour '0.5', expected a number"),
        (lambda text: text.replace(b"0.5", b"-0.5"), "found usd_per_hour -0.5, expected a number"),
        (lambda text: text.replace(b"0.5", b"nan"), "found usd_per_hour nan, expected a number"),
        (lambda text: text.replace(b"0.5", b"true"), "found usd_per_hour True, expected a number"),
        (lambda text: text.replace(b'"spot"', b'"Spot"'), "found market 'Spot', expected on-demand or spot"),
        (lambda text: text.replace(b'"a"', b'""'), "found instance '', expected text"),
        (lambda text: table(ROW, ROW), "price 2: found a spot r a second time"),
    ],
)
def test_a_table_that_is_none_is_named_with_its_row(change, message: str) -> None:
    with pytest.raises(DataError, match=r"^where") as caught:
        parse(change(table(ROW)), "where")
    assert message in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cost\.prices: found no file at .*none\.toml"):
        read_prices(CostConfig(prices=str(tmp_path / "none.toml")))


def rows(*keys: tuple[str, str, str | None]) -> bytes:
    return table(
        *(
            f'instance = "{instance}", market = "{market}", usd_per_hour = {n}, date = 2026-02-09, source = "s"'
            + (f', region = "{region}"' if region else "")
            for n, (instance, market, region) in enumerate(keys, 1)
        )
    )


@pytest.mark.parametrize(
    ("kind", "usd", "why"),
    [
        (Kind(instance="a", market="spot", region="east"), 1, ""),
        (Kind(instance="a", market="spot", region="west"), 2, ""),
        (Kind(instance="a", market="spot"), None, "set cost.region"),
        (Kind(instance="a", market="spot", region="south"), None, "in east, west, not in south"),
        (Kind(instance="b", market="spot"), 3, ""),
        (Kind(instance="b", market="spot", region="west"), None, "in east, not in west"),
        (Kind(instance="c", market="spot", region="west"), 4, ""),
        (Kind(instance="b", market="on-demand"), None, "t has no row for b on-demand"),
        (Kind(instance=None, market="spot"), None, "label cxr-instance"),
        (Kind(instance="a", market=None), None, "label cxr-market"),
        (Kind(instance="abc", market="spot"), None, "t has no row for abc spot"),
    ],
)
def test_which_row_a_node_falls_under(kind: Kind, usd: float | None, why: str) -> None:
    prices = parse(rows(("a", "spot", "east"), ("a", "spot", "west"), ("b", "spot", "east"), ("c", "spot", None)), "t")
    price, reason = prices.find(kind)
    assert (price.usd_per_hour if price else None) == usd
    assert why in reason
    assert bool(reason) == (price is None)


def test_a_type_that_is_misspelt_is_said() -> None:
    assert "did you mean g5.2xlarge?" in read_prices(CostConfig()).find(Kind(instance="g5.2xlrge", market="spot"))[1]


def test_a_spot_node_costs_at_most_its_on_demand_price() -> None:
    prices = parse(rows(("a", "on-demand", None), ("b", "spot", None), ("b", "on-demand", None)), "t")
    bounds = [
        ("a", "spot", 1),
        ("a", "on-demand", 1),
        ("b", "spot", 2),
        ("c", "spot", None),
        (None, "spot", None),
        ("a", None, None),
    ]
    for instance, market, usd in bounds:
        found = prices.at_most(Kind(instance=instance, market=market))
        assert (found.usd_per_hour if found else None) == usd
