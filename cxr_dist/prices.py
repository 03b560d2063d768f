"""What a node costs by the hour: a table of dated, sourced rows, and which row a node falls under.

A row is an instance type, a market (`on-demand` or `spot`), a region and US dollars an hour. Without a row there is no price:
nothing is guessed, and whoever asks is told why. Of a spot instance without one it is known what it costs at most: its
on-demand price (AWS, EC2 User Guide, Spot Instance pricing history).
"""

import datetime
import difflib
import logging
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist import storage
from cxr_dist.config import CostConfig
from cxr_dist.errors import DataError

__all__ = ["MARKETS", "OURS", "Kind", "Price", "Prices", "read_prices"]

log = logging.getLogger(__name__)

FORMAT = "cxr-dist/prices/1"
MARKETS = ("on-demand", "spot")
OURS = Path(__file__).resolve().parents[1] / "infra" / "prices.toml"
"""The table that comes with the code, also in the working directory of a submitted job."""

_KEYS = ("instance", "market", "region", "usd_per_hour", "date", "source")
_OPTIONAL = ("region",)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What kind of node it is, as far as it says; None where it does not."""

    instance: str | None
    market: str | None
    region: str | None = None

    def __str__(self) -> str:
        named = [self.instance or "unknown type", *filter(None, (self.market, self.region))]
        return " ".join(named)


@dataclass(frozen=True, kw_only=True)
class Price:
    """A row of the table."""

    instance: str
    market: str
    usd_per_hour: float
    date: datetime.date
    """The day that the figure is of."""
    source: str
    region: str = ""
    """Empty: it holds everywhere."""

    def __str__(self) -> str:
        where = f" in {self.region}" if self.region else ""
        return (
            f"{self.usd_per_hour:g} USD an hour for {self.instance} {self.market}{where} ({self.source}, {self.date})"
        )


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The table."""

    rows: tuple[Price, ...]
    where: str
    """Where it is from, for people."""

    def find(self, kind: Kind) -> tuple[Price | None, str]:
        """The row of a node, or None and why there is none.

        Where a node does not say its region, a row counts if the table has this type and market in one region only.
        """
        if kind.instance is None:
            return None, "the node does not say its type (label cxr-instance)"
        if kind.market is None:
            return None, f"the node does not say whether {kind.instance} is on-demand or spot (label cxr-market)"
        fitting = [row for row in self.rows if (row.instance, row.market) == (kind.instance, kind.market)]
        if not fitting:
            return None, f"{self.where} has no row for {kind.instance} {kind.market}{self._near(kind)}"
        there = [row for row in fitting if row.region == kind.region] or [row for row in fitting if not row.region]
        if there:
            return there[0], ""
        regions = ", ".join(sorted(row.region for row in fitting))
        if kind.region is not None:
            return None, f"{self.where} has {kind.instance} {kind.market} in {regions}, not in {kind.region}"
        if len(fitting) > 1:
            return None, f"{self.where} has {kind.instance} {kind.market} in {regions}; set cost.region to one of them"
        return fitting[0], ""

    def at_most(self, kind: Kind) -> Price | None:
        """The row that bounds the price of a node from above: its own, or of a spot node the on-demand row."""
        markets = ("spot", "on-demand") if kind.market == "spot" else (kind.market,)
        for market in markets:
            found, _ = self.find(Kind(instance=kind.instance, market=market, region=kind.region))
            if found is not None:
                return found
        return None

    def _near(self, kind: Kind) -> str:
        known = sorted({row.instance for row in self.rows})
        near = difflib.get_close_matches(kind.instance or "", known, n=1, cutoff=0.8)
        return f" (did you mean {near[0]}?)" if near and kind.instance not in known else ""


def read_prices(config: CostConfig) -> Prices:
    """The table that `cost.prices` names, or the one that comes with the code; an empty one where that is not there, as in an
    installed package. DataError for a file that is none."""
    if config.prices:
        where = storage.shown(config.prices)
        try:
            return parse(storage.read_bytes(config.prices), f"cost.prices {where}")
        except FileNotFoundError:
            raise DataError(f"cost.prices: found no file at {where}; give a table such as infra/prices.toml") from None
    try:
        return parse(OURS.read_bytes(), "infra/prices.toml")
    except FileNotFoundError:
        return Prices(rows=(), where="no table of prices (give one by cost.prices): it")


def parse(data: bytes, where: str) -> Prices:
    """The table in a TOML file; DataError that names the row."""
    try:
        found = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{where}: found no TOML ({error}), expected a table such as infra/prices.toml") from None
    if found.get("format") != FORMAT:
        raise DataError(
            f"{where}: found format {found.get('format')!r}, expected {FORMAT!r}; write format = {FORMAT!r}"
        )
    if unknown := sorted(found.keys() - {"format", "price"}):
        raise DataError(f"{where}: found {unknown[0]!r}, expected format and price alone; take it out")
    rows: dict[tuple[str, str, str], Price] = {}
    listed = found.get("price", [])
    if not isinstance(listed, list):
        raise DataError(f"{where}: found price = {listed!r}, expected a list of rows; write price = [ {{…}}, {{…}} ]")
    for number, raw in enumerate(listed, 1):
        row = _row(raw, f"{where}: price {number}")
        key = (row.instance, row.market, row.region)
        if key in rows:
            raise DataError(f"{where}: price {number}: found {' '.join(key)} a second time, expected one; take one out")
        rows[key] = row
    return Prices(rows=tuple(rows.values()), where=where)


def _row(raw: Any, where: str) -> Price:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: found {raw!r}, expected a row with {', '.join(_KEYS)}")
    for key in raw:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise DataError(
                f"{where}: unknown key {key}: "
                + (f"did you mean {near[0]}?" if near else f"expected {', '.join(_KEYS)}")
            )
    for key in _KEYS:
        if key not in raw and key not in _OPTIONAL:
            raise DataError(f"{where}: found no {key}, expected one; a price without {key} is left out of the table")
    for key in ("instance", "market", "region", "source"):
        value = raw.get(key, "-")
        if not isinstance(value, str) or not re.fullmatch(r"[^\x00-\x1f]{1,500}", value):
            raise DataError(f"{where}: found {key} {value!r}, expected text of one line")
    if raw["market"] not in MARKETS:
        raise DataError(f"{where}: found market {raw['market']!r}, expected {' or '.join(MARKETS)}")
    usd = raw["usd_per_hour"]
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not math.isfinite(usd) or usd < 0:
        raise DataError(f"{where}: found usd_per_hour {usd!r}, expected a number of US dollars, 0 or more")
    if not isinstance(raw["date"], datetime.date) or isinstance(raw["date"], datetime.datetime):
        raise DataError(f"{where}: found date {raw['date']!r}, expected a day without quotes, such as 2026-02-09")
    return Price(**{**raw, "usd_per_hour": float(usd)})
