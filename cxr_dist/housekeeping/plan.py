"""What may go, and why: a pure function of facts.

A run goes if it ended long ago, MLflow has all of it, and nothing needs it: no living driver, no version of a registered
model, no run that started from its weights. Of a run that stays go the checkpoints of owners that a later one has
succeeded, files that a finished run's index does not name, and what writes that were cut off left behind. A set of
features goes if it was not used for long and no run may go on with it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cxr_dist.data import features
from cxr_dist.housekeeping.facts import Cache, Facts, File, Run
from cxr_dist.train.sync import UNFINISHED

__all__ = ["DAY_S", "Item", "as_json", "follows", "judge_cache", "judge_checkpoints", "judge_run", "plan", "table"]

LEFTOVER_S = 3600.0
"""Age of a temporary file that nobody writes any more, seconds."""
DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that goes or stays, whole."""

    kind: Literal["run", "checkpoints", "features", "folder"]
    """`checkpoints`: files of a run that stays; `folder`: nothing that is known."""
    name: str
    bytes: int
    changed: float
    """When it was last written to, seconds since 1970; 0 where that is not known."""
    goes: bool
    why: str
    paths: tuple[str, ...] = ()
    """Of `checkpoints`: the files, below the run's folder."""


def plan(facts: Facts, *, older_s: float) -> list[Item]:
    """An item for each run, each part of a run that stays and that something is to be said of, and each set of features.

    Those that go come in an order in which they may: runs before those that they started from, features last.
    """
    judged = {run.name: judge_run(run, facts, older_s=older_s) for run in facts.runs}
    staying = [run for run in facts.runs if not judged[run.name].goes]
    while True:
        # a run that stays protects the one that it started from, which may protect another
        again = {run.name: judge_run(run, facts, older_s=older_s, others=staying) for run in facts.runs}
        staying = [run for run in facts.runs if not again[run.name].goes]
        if again == judged:
            break
        judged = again
    going = _dependents_first([run for run in facts.runs if judged[run.name].goes])
    parts = [item for run in staying for item in judge_checkpoints(run, facts)]
    caches = [judge_cache(cache, facts, older_s=older_s, others=staying) for cache in facts.caches]
    return [*(judged[run.name] for run in (*staying, *going)), *parts, *sorted(caches, key=lambda item: item.goes)]


def judge_run(run: Run, facts: Facts, *, older_s: float, others: Iterable[Run] = ()) -> Item:
    """Whether a run goes, as far as it is for itself and `others`, which stay."""
    item = Item(kind="run", name=run.name, bytes=run.bytes, changed=run.ended, goes=False, why="")
    age_s = facts.now - run.ended
    pointer = next((pointer.what for pointer in facts.pointers if names(pointer.text, run)), "")
    user = next((other.name for other in others if other is not run and starts_from(other, run)), "")
    if run.problem:
        return replace(item, kind="folder", why=f"not touched: {run.problem}")
    if run.driver:
        return replace(item, why=f"being written by {run.driver}")
    if run.is_remains:
        return replace(item, goes=True, why="nothing is left of it but its lease")
    if pointer:
        return replace(item, why=f"{pointer} points to it" + " (its removal had begun)" * run.removing)
    if user:
        return replace(item, why=f"run {user} started from its weights")
    if _holds(run, facts.features_uri):
        return replace(item, why="train.features_uri lies in it")
    if run.removing:
        return replace(item, goes=True, why="its removal was cut off")
    if not run.ended:
        return replace(item, why="the store does not say how old it is")
    if age_s < older_s:
        return replace(item, why=f"{run.status or 'ended'}, younger than {older_s / DAY_S:g} days")
    if not run.status:
        return replace(item, why=f"MLflow does not know its run {run.run_id}; give the server that does (tracking.uri)")
    if run.status in UNFINISHED or run.lacking:
        lacks = "how it ended" if run.status in UNFINISHED else "some of its metrics"
        return replace(item, why=f"MLflow does not have {lacks}; run jobs/sync.py first")
    return replace(item, goes=True, why=f"{run.status}, older than {older_s / DAY_S:g} days")


def judge_checkpoints(run: Run, facts: Facts) -> list[Item]:
    """What is left over in a run that stays: nothing, what may go, what may not, or both.

    While an owner's index is there, nobody reads an earlier owner's folder any more. Other files that the index does not
    name go only once the training is finished: until then a driver that was taken for dead may be about to name them.
    """
    if run.problem or run.driver or run.is_remains or run.removing:
        return []
    texts = [pointer.text for pointer in facts.pointers]
    texts += [_weights(other) for other in facts.runs if other is not run]
    pinned = {
        owner for text in texts for owner in re.findall(rf"{re.escape(run.name)}/+checkpoints/+(\d{{6}})\b", text)
    }
    going: list[File] = []
    waiting: dict[str, list[File]] = {}
    for file in run.files:
        found = _OWNED.fullmatch(file.path)
        owner, name = (int(found[1]), found[2]) if found else (-1, "")
        if _TEMPORARY.search(file.path):
            if file.time and facts.now - file.time > LEFTOVER_S:
                going.append(file)
        elif (
            found is None
            or file.path.removeprefix("checkpoints/") in run.named
            or (owner == run.owner and name == "index.json")
        ):
            continue
        elif found[1] in pinned:
            waiting.setdefault("a model or a run points there", []).append(file)
        elif owner < run.owner or (owner == run.owner and run.finished):
            going.append(file)
        else:
            waiting.setdefault("the next driver of the run clears them", []).append(file)
    items = [_part(run, files, goes=False, why=why) for why, files in waiting.items()]
    if going and not run.status:
        items.append(_part(run, going, goes=False, why=f"MLflow does not know run {run.run_id}"))
    elif going and run.status in UNFINISHED:
        items.append(_part(run, going, goes=False, why="MLflow does not have how it ended; run jobs/sync.py first"))
    elif going:
        items.append(_part(run, going, goes=True, why="superseded, named by no index, or cut off in the writing"))
    return items


def judge_cache(cache: Cache, facts: Facts, *, older_s: float, others: Iterable[Run]) -> Item:
    """Whether a set of features goes; `others` are the runs that stay."""
    item = Item(kind="features", name=cache.name, bytes=cache.bytes, changed=cache.used, goes=False, why="")
    # a set that was set aside is not begun with any more, but may still be read
    user = next((run.name for run in others if may_use(run, cache) and (cache.aside is None or run.driver)), "")
    later = [other.name for other in facts.caches if follows(other, cache)]
    if cache.problem:
        return replace(item, kind="folder", why=f"not touched: {cache.problem}")
    if later and {file.path for file in cache.files} <= {features.ASIDE, features.USED}:
        return replace(item, why=f"its mark leads to {later[0]}")
    if cache.removing:
        return replace(item, goes=True, why="its removal was cut off")
    if user:
        return replace(item, why=f"run {user} may go on with it")
    if not cache.used:
        return replace(item, why="the store does not say how old it is")
    if facts.now - cache.used < older_s:
        return replace(item, why=f"used in the last {older_s / DAY_S:g} days")
    if cache.aside is not None:
        return replace(item, goes=True, why=f"set aside: {cache.aside}")
    kind = "half built, and not gone on with" if cache.inputs is None else "not used"
    return replace(item, goes=True, why=f"{kind} for {older_s / DAY_S:g} days")


def table(items: Iterable[Item], now: float) -> str:
    """The plan for people: what goes at the end."""
    rows = [("", "kind", "name", "size", "age", "why")]
    for item in sorted(items, key=lambda item: item.goes):
        age = f"{(now - item.changed) / DAY_S:.1f} d" if item.changed else "?"
        rows.append(("goes" if item.goes else "stays", item.kind, item.name, _size(item.bytes), age, item.why))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
    lines = (
        "  ".join([*(fit(text, width) for fit, text, width in zip(align, row, widths, strict=False)), row[5]])
        for row in rows
    )
    return "\n".join(lines)


def as_json(item: Item, now: float) -> dict[str, Any]:
    """An item as the job's result has it."""
    age = round((now - item.changed) / DAY_S, 2) if item.changed else None
    values = {"kind": item.kind, "name": item.name, "bytes": item.bytes, "age_days": age}
    return {**values, "goes": item.goes, "why": item.why}


def names(text: str, run: Run) -> bool:
    """Whether a text names a run: its MLflow id, its folder or something in it, or, wherever the prefix is mounted, its
    checkpoints, weights or scores."""
    if run.run_id and run.run_id in text:
        return True
    end = r"""(?:[/?"'\s]|$)"""
    places = "|".join(re.escape(place) for place in run.places)
    anywhere = rf"""(?:^|[/"'\s]){re.escape(run.name)}(?:/+(?:checkpoints|initial\.pt|scores){end}|/*(?:[?"'\s]|$))"""
    return bool(re.search(anywhere, text) or (places and re.search(rf"(?:{places}){end}", text)))


def starts_from(run: Run, other: Run) -> bool:
    """Whether a run's weights are another's, as far as its run.json can tell; one that cannot be read may name it anywhere."""
    return names(_weights(run), other)


def may_use(run: Run, cache: Cache) -> bool:
    """Whether a run may go on with a set of features; True where one cannot know."""
    if run.problem:
        return bool(run.text)
    if run.is_remains or run.removing or run.record.get("features") is False:
        return False
    if not run.driver and run.status == "FINISHED":
        return False
    if cache.inputs is None:
        return True
    config: Mapping[str, Any] = run.record["config"]
    known = {
        "manifest_sha256": run.record.get("manifest_sha256"),
        "boundary": config.get("model.trainable"),
        "type": config.get("train.features_type"),
        "seed": config.get("train.seed"),
    }
    return all(value is None or cache.inputs.get(key, value) == value for key, value in known.items())


def follows(later: Cache, earlier: Cache) -> bool:
    """Whether a set stands in for another that was set aside before it."""
    (base, _, number), (other_base, _, other_number) = later.name.partition("."), earlier.name.partition(".")
    return base == other_base and number.isdigit() and int(number) > int(other_number or 0)


_OWNED = re.compile(r"checkpoints/(\d{6})/([^/]+)")
_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}\.tmp$")
"""What `storage.put_atomic` writes before it renames."""


def _part(run: Run, files: list[File], *, goes: bool, why: str) -> Item:
    return Item(
        kind="checkpoints",
        name=run.name,
        bytes=sum(file.bytes for file in files),
        changed=max(file.time for file in files),
        goes=goes,
        why=f"{why}: {', '.join(sorted({_group(file.path) for file in files}))}",
        paths=tuple(file.path for file in files),
    )


def _group(path: str) -> str:
    return path.removeprefix("checkpoints/")


def _weights(run: Run) -> str:
    if run.problem or not run.record:
        return run.text
    weights = str(run.record["config"].get("model.weights") or "")
    return "" if weights in ("imagenet", "random") else weights


def _holds(run: Run, uri: str) -> bool:
    return uri == run.folder or uri.startswith(run.folder + "/")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _dependents_first(runs: list[Run]) -> list[Run]:
    """The runs in an order in which each comes before the one that it started from."""
    ordered: list[Run] = []
    left = list(runs)
    while left:
        free = [run for run in left if not any(starts_from(other, run) for other in left if other is not run)] or left
        ordered += free
        left = [run for run in left if run not in free]
    return ordered
