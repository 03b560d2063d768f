"""The plan of a run as a table for people: what `dryrun` found, in words and rounded."""

from typing import Any

from cxr_dist.cost import money

__all__ = ["text"]


def text(plan: dict[str, Any]) -> str:
    """The plan for a person."""
    images, steps, read, held = plan["images"], plan["steps"], plan["read"], plan["memory"]
    workers, kept, nodes = plan["workers"], plan["written"], plan["cluster"]
    sizes = " or ".join(map(str, workers["numbers"]))
    lines = {
        "run": f"{plan['run_name']}, "
        + (f"goes on before step {plan['start']} of {steps['all']}" if plan["start"] else "from its beginning"),
        "recipe": plan["recipe"],
        "images": ", ".join(f"{images[name]:,} {name}" for name in ("train", "validation", "test"))
        + f"; {images['dropped_per_epoch']:,} fill no step of an epoch",
        "steps": f"{steps['train_per_epoch']:,} + {steps['validation_per_epoch']:,} of validation an epoch, at most {steps['epochs']} epochs: "
        f"{steps['train_left']:,} + {steps['validation_left']:,} to be done",
        "workers": f"{sizes}, {'a GPU' if workers['gpu'] else 'no GPU'} and {workers['cpus']:g} CPUs each; {workers['images_per_step']} images of a step",
        "features": f"{_kept(plan['features'])}: {plan['features']['why']}",
        "read": f"{_size(read['first_epoch_bytes'])} of {read['encoding']} in the first epoch, {_size(read['all_epochs_bytes'])} in all epochs"
        f"{' at most, the rest from the nodes’ caches' if read['node_cache'] else ''}, {_size(read['test_bytes'])} for the test"
        + (
            f"; with features {_size(plan['features']['bytes'])} of them"
            if plan["features"]["use"] is not False
            else ""
        ),
        f"{held['of']} memory": f"{_size(held['peak_bytes'])} of tensors on a worker ({_size(held['weights_bytes'])} weights, gradients, "
        f"optimizer; {_size(held['step_bytes'])} a step, {_size(held['prefix_call_bytes'])} a call of the prefix), without libraries and allocator",
        "object store": f"{_size(held['object_store_bytes'])}, and {_size(held['object_store_bytes_per_more_decoder'])} for each more decoder",
        "checkpoints": f"{_size(kept['checkpoint_bytes'])} each, {kept['at_epoch_ends']} at epoch ends and at most {kept['within_epochs']} within, "
        f"{kept['kept']} kept; {_size(kept['uploaded_bytes'])} written",
        "decoding": _decoding(nodes),
        "cluster": _cluster(nodes),
    }
    for name, way in plan["ways"].items():
        lines[f"time {name}"] = (
            f"{_span(way['all_s'])}, of it {_span(way['epoch_s'])} an epoch"
            + (f", {_span(way['features_s'])} for the features" if way["features_s"]["high"] else "")
            + f", {_span(way['test_s'])} for the test; without start-up, waiting for nodes and the report"
        )
    if plan["cost"]:
        low, high = plan["cost"]["low"], plan["cost"]["high"]
        bound = (
            f"{money(low)} to {money(high)}"
            if low is not None
            else f"at most {money(high)}"
            if high is not None
            else "unknown"
        )
        lines["cost"] = f"{bound} ({plan['cost']['price']})"
    width = max(map(len, lines))
    rows = [f"{name:<{width}}  {line}" for name, line in lines.items()]
    return "\n".join([*rows, *(f"{'note':<{width}}  {note}" for note in plan["notes"])])


def _kept(features: dict[str, Any]) -> str:
    if features["use"] is None:
        return f"decided when the run begins; {_size(features['bytes'])} if they are kept"
    return f"kept, {_size(features['bytes'])}" if features["use"] else "not kept"


def _decoding(nodes: dict[str, Any]) -> str:
    there, needed = nodes["decode_cpus"], nodes.get("decode_cpus_needed")
    has = "CPUs unknown" if there is None else f"{there} CPUs"
    return (
        f"{has}; the workers need {needed} by the measured rates"
        if needed
        else f"{has}; how many the workers need is not measured"
    )


def _cluster(nodes: dict[str, Any]) -> str:
    if not nodes["nodes"]:
        return "unknown: no node was seen"
    kinds = ", ".join(
        f"{kind['nodes']} x {kind['instance'] or 'unknown type'}{' ' + kind['market'] if kind['market'] else ''} "
        f"({kind['cpus']:g} CPUs, {kind['gpus']:g} GPUs)"
        for kind in nodes["nodes"]
    )
    more = f", {nodes['more_nodes']} of them still to come" if nodes["more_nodes"] else ""
    hour = nodes["cost_per_hour"]
    if not hour:
        return f"{kinds}{more}"
    price = (
        money(hour["amount"])
        if hour["amount"] is not None
        else f"at most {money(hour['at_most'])}"
        if hour["at_most"] is not None
        else "price unknown"
    )
    return f"{kinds}{more}: {price} an hour ({hour['price']})"


def _span(span: dict[str, float]) -> str:
    low, high = _duration(span["low"]), _duration(span["high"])
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(num_bytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
