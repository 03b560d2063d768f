"""What a job cost: the hours of the cluster's nodes times their prices. Arithmetic only; `spending` counts the hours.

All nodes count, busy or not, since all are paid for. Hours without a price are said and never priced by a guess.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cxr_dist.prices import MARKETS, Kind, Price, Prices

__all__ = ["Charge", "Cost", "NodeTime", "bill", "kind_of", "metrics", "money", "sentence"]

INSTANCE, MARKET, REGION = "cxr-instance", "cxr-market", "cxr-region"
"""Labels that the cluster files give their nodes."""
RAYS_MARKET, RAYS_REGION = "ray.io/market-type", "ray.io/availability-region"
"""Ray's own, which some providers set."""


def kind_of(labels: Mapping[str, str], region: str = "") -> Kind:
    """What kind of node has these labels; `region`, where given, counts before what it says."""
    market = labels.get(MARKET) or labels.get(RAYS_MARKET)
    return Kind(
        instance=labels.get(INSTANCE) or None,
        market=market if market in MARKETS else None,
        region=region or labels.get(REGION) or labels.get(RAYS_REGION) or None,
    )


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """How long one node was there."""

    node_id: str
    kind: Kind
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Charge:
    """The nodes of one kind: their hours, and what an hour costs."""

    kind: Kind
    nodes: int
    hours: float
    price: Price | None
    why: str
    """Why there is no price; empty: there is one."""
    at_most: Price | None
    """What bounds it from above, where something does: its own price, or that of the same machine on demand."""

    @property
    def amount(self) -> float | None:
        """US dollars."""
        return None if self.price is None else self.hours * self.price.usd_per_hour

    @property
    def bound(self) -> float | None:
        """US dollars at most."""
        return None if self.at_most is None else self.hours * self.at_most.usd_per_hour


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job cost in all its attempts so far."""

    charges: tuple[Charge, ...]
    prices: str
    """Which table the prices are from."""
    attempts: int = 1
    unread: int = 0
    """Attempts among them whose node-hours cannot be read, and are not in it."""
    images: int | None = None
    """Images that it is for: of a training run those trained on, each time one was shown."""
    gpu_utilization: float | None = None
    """Mean part of the time that the GPUs were computing, 0 to 1; None without GPUs, or where nothing tells."""

    @property
    def node_hours(self) -> float:
        return sum(charge.hours for charge in self.charges)

    @property
    def unpriced_node_hours(self) -> float:
        return sum(charge.hours for charge in self.charges if charge.price is None)

    @property
    def nodes(self) -> int:
        return sum(charge.nodes for charge in self.charges)

    @property
    def amount(self) -> float | None:
        """US dollars; None unless every hour has a price."""
        amounts = [charge.amount for charge in self.charges]
        return sum(amount for amount in amounts if amount is not None) if amounts and None not in amounts else None

    @property
    def at_most(self) -> float | None:
        """What it cost at most, US dollars; None unless every hour is bounded."""
        bounds = [charge.bound for charge in self.charges]
        return sum(bound for bound in bounds if bound is not None) if bounds and None not in bounds else None

    @property
    def images_per_usd(self) -> float | None:
        """Images for a dollar; None where either is not known."""
        return self.images / self.amount if self.images is not None and self.amount else None

    def to_json(self) -> dict[str, Any]:
        """The cost as plain values, as a job's result and a run's record have it."""
        return {
            "amount": self.amount,
            "currency": "USD",
            "price": self.words(),
            "at_most": self.at_most,
            "node_hours": self.node_hours,
            "unpriced_node_hours": self.unpriced_node_hours,
            "nodes": self.nodes,
            "attempts": self.attempts,
            "unread_attempts": self.unread,
            "images": self.images,
            "images_per_usd": self.images_per_usd,
            "gpu_utilization": self.gpu_utilization,
            "prices": self.prices,
            "charges": [_charge_json(charge) for charge in self.charges],
        }

    def words(self) -> str:
        """Where the prices are from, or why there are none, in one line."""
        rows = dict.fromkeys(str(charge.price) for charge in self.charges if charge.price)
        reasons = dict.fromkeys(charge.why for charge in self.charges if charge.why)
        return "; ".join([*rows, *(f"no price: {why}" for why in reasons)]) or "no node was seen"


def _charge_json(charge: Charge) -> dict[str, Any]:
    price = charge.price
    return {
        **dataclasses.asdict(charge.kind),
        "nodes": charge.nodes,
        "node_hours": charge.hours,
        "usd_per_hour": price.usd_per_hour if price else None,
        "usd_per_hour_at_most": charge.at_most.usd_per_hour if charge.at_most else None,
        "amount": charge.amount,
        "date": price.date.isoformat() if price else None,
        "source": price.source if price else None,
        "why": charge.why,
    }


def bill(times: Iterable[NodeTime], prices: Prices, **about: Any) -> Cost:
    """The cost of so much time of nodes; a node that is named twice counts as one, with both times. `about` is Cost's."""
    seconds: dict[Kind, float] = {}
    nodes: dict[Kind, set[str]] = {}
    for one in times:
        seconds[one.kind] = seconds.get(one.kind, 0.0) + one.seconds
        nodes.setdefault(one.kind, set()).add(one.node_id)
    charges = []
    for kind in sorted(seconds, key=str):
        price, why = prices.find(kind)
        charges.append(
            Charge(
                kind=kind,
                nodes=len(nodes[kind]),
                hours=seconds[kind] / 3600,
                price=price,
                why=why,
                at_most=prices.at_most(kind),
            )
        )
    return Cost(charges=tuple(charges), prices=prices.where, **about)


def metrics(cost: Cost) -> dict[str, float]:
    """What a run logs: `cost/usd` where every node-hour has a price, else `cost/usd_at_most` where that is known."""
    values = {
        "node_hours": cost.node_hours,
        "unpriced_node_hours": cost.unpriced_node_hours,
        "usd": cost.amount,
        "usd_at_most": cost.at_most if cost.amount is None else None,
        "images_per_usd": cost.images_per_usd,
        "gpu_utilization_fraction": cost.gpu_utilization,
    }
    return {f"cost/{name}": value for name, value in values.items() if value is not None}


def sentence(cost: Cost) -> str:
    """The cost in one line, for a person."""
    hours = f"{cost.node_hours:.3g} node-hours of {_plural(cost.nodes, 'node')}"
    kinds = ", ".join(f"{charge.nodes} x {charge.kind} for {charge.hours:.3g} h" for charge in cost.charges)
    parts = [f"{money(cost.amount)} for {hours}" if cost.amount is not None else hours]
    if cost.amount is None and cost.charges:
        bound = f"at most {money(cost.at_most)}, " if cost.at_most is not None else ""
        why = "; ".join(dict.fromkeys(charge.why for charge in cost.charges if charge.why))
        parts.append(f"{bound}{cost.unpriced_node_hours:.3g} of them without a price: {why}")
    if kinds:
        parts[0] += f" ({kinds})"
    if cost.attempts > 1:
        lost = f", of which {cost.unread} left no account that can be read and are not in it" if cost.unread else ""
        parts.append(f"{cost.attempts} attempts{lost}")
    if cost.images_per_usd is not None:
        parts.append(f"{cost.images_per_usd:,.0f} images per USD")
    if cost.gpu_utilization is not None:
        parts.append(f"GPUs busy {cost.gpu_utilization:.0%} of the time")
    return "; ".join(parts)


def money(amount: float | None) -> str:
    """US dollars, with as many digits as a small run needs."""
    if amount is None:
        return "unknown"
    return f"{amount:,.2f} USD" if amount >= 1 else f"{amount:.3g} USD"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
