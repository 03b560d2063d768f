"""The feature cache of a run: whether it works from one, which sets of features it needs, and having them whole."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cxr_dist import storage
from cxr_dist.data.features import (
    FORMAT,
    ITEM_BYTES,
    FeatureSet,
    FeatureShard,
    finished_shards,
    key_of,
    locate,
    num_shards,
)
from cxr_dist.data.features import (
    use as begin_to_use,
)
from cxr_dist.errors import ConfigError
from cxr_dist.model.augment import AUGMENTATION
from cxr_dist.train.job import TrainJob, training_views
from cxr_dist.train.prefix_pass import Name, Place, Task, compute
from cxr_dist.train.survey import Decision, Survey, Work, decide, fits, settled, survey

__all__ = ["Cache", "build", "look", "prepare_features"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The features of a run: the sets, or None where it works without; why; and what building them took."""

    sets: dict[Name, FeatureSet] | None
    decision: Decision
    device_bytes: int = 0
    """Free memory of a rank's GPU."""
    computed: int = 0
    """Views of images that were computed."""
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """What the job's result says of features."""
        sets = self.sets or {}
        return {
            "used": self.sets is not None,
            "why": self.decision.why,
            "computed": self.computed,
            "seconds": round(self.seconds, 1),
            "bytes": sum(found.num_bytes for found in sets.values()),
            "keys": {f"{split}/{view}": found.key for (split, view), found in sets.items()},
        }


def prepare_features(job: TrainJob, *, use: bool | None = None) -> Cache:
    """Decide whether the run works from features, and have them whole.

    `use` is what a run that is resumed had decided. ConfigError if features are wanted and cannot be.
    """
    decision = settled(job.config)
    if use is not None:
        decision = Decision(use=use, why="as the run began")
    elif decision is not None and not decision.use and job.config.train.features == "on":
        raise ConfigError(f"train.features: found on, but {decision.why}; set it to auto or off")
    if decision is not None and not decision.use:
        log.info("features: not kept, %s", decision.why)
        return Cache(sets=None, decision=decision)
    found = survey(job, measure=decision is None)
    places = look(job, found)
    if decision is None:
        assert found.rates is not None
        decision = decide(work_of(job, places), found.rates, workers=job.world_sizes[-1], **room(job, found, places))
    elif decision.use and not fits(**room(job, found, places)):
        raise ConfigError(
            f"train.features_uri: features take {room(job, found, places)['needed_bytes'] / 1e9:.1f} GB, more than is free "
            "there; give another URI, or set train.features to off"
        )
    log.info("features: %s, %s", "kept" if decision.use else "not kept", decision.why)
    if not decision.use:
        return Cache(sets=None, decision=decision)
    while not all([begin_to_use(place.folder, storage.shown(job.folder)) for place in places.values()]):
        places = look(job, found)  # one of them is being deleted: another folder beside it
    began = time.perf_counter()
    sets = build(job, places, found)
    computed = sum(place.split.num_rows for place in places.values() if place.whole is None)
    return Cache(
        sets=sets,
        decision=decision,
        device_bytes=found.free_bytes,
        computed=computed,
        seconds=time.perf_counter() - began,
    )


def look(job: TrainJob, found: Survey) -> dict[Name, Place]:
    """The sets that the run needs, and those of them that are whole: validation, and each view of the training images."""
    base = job.config.train.features_uri or storage.join(job.config.train.storage_path, "features")
    places = {}
    for split, view in [("validation", 0), *(("train", view) for view in training_views(job.config.train))]:
        inputs = {
            "format": FORMAT,
            "manifest_sha256": job.manifest_sha256,
            "pixels_version": job.pixels_version,
            "size": job.size,
            "split": split,
            "view": view,
            "type": job.config.train.features_type,
            **({"seed": job.plan.seed, "augmentation": AUGMENTATION} if view else {}),
            **found.inputs,
        }
        rows = job.plan.train if split == "train" else job.plan.validation
        folder, whole = locate(base, inputs, rows)
        places[split, view] = Place(folder=folder, key=key_of(inputs), inputs=inputs, split=rows, whole=whole)
    return places


def work_of(job: TrainJob, places: Mapping[Name, Place]) -> Work:
    plan = job.plan
    return Work(
        epochs=plan.epochs,
        train=plan.train_steps * plan.global_batch,
        validation=min(plan.validation.num_rows, plan.validation_steps * plan.global_batch),
        missing=sum(place.split.num_rows for place in places.values() if place.whole is None),
        wanted=sum(place.split.num_rows for place in places.values()),
    )


def room(job: TrainJob, found: Survey, places: Mapping[Name, Place]) -> dict[str, Any]:
    """Free space where features go, and what the missing ones need."""
    height, width, channels = found.shape_HWC
    row_bytes = height * width * channels * ITEM_BYTES[job.config.train.features_type]
    folder = next(iter(places.values())).folder
    missing = sum(place.split.num_rows for place in places.values() if place.whole is None)
    return {"free_bytes": storage.free_bytes(folder), "needed_bytes": missing * row_bytes}


def build(
    job: TrainJob,
    places: Mapping[Name, Place],
    found: Survey,
    compute: Callable[[TrainJob, Mapping[Name, Place], list[Task]], Iterable[tuple[Name, FeatureShard]]] = compute,
) -> dict[Name, FeatureSet]:
    """All sets, whole: missing shards are computed and each set's index is written when its last shard is there."""
    shards = {
        name: finished_shards(place.folder, place.key, place.split)
        for name, place in places.items()
        if place.whole is None
    }
    tasks = [
        Task(split=split, shard=number, views=missing)
        for split in ("validation", "train")
        for number in range(max((num_shards(places[name].split) for name in shards if name[0] == split), default=0))
        if (missing := tuple(view for of, view in shards if of == split and number not in shards[of, view]))
    ]
    if tasks:
        for name, shard in compute(job, places, tasks):
            shards[name][int(shard.path.split(".")[0])] = shard
    sets = {}
    for name, place in places.items():
        if place.whole is not None:
            sets[name] = place.whole
            continue
        sets[name] = FeatureSet(
            folder=place.folder,
            key=place.key,
            inputs=place.inputs,
            shape_HWC=found.shape_HWC,
            kind=job.config.train.features_type,
            num_rows=place.split.num_rows,
            row_group=place.split.row_group,
            shards=tuple(shards[name][number] for number in range(num_shards(place.split))),
        )
        sets[name].save()
    return {name: sets[name] for name in places}
