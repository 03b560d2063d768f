"""Batch inference: every image of a source scored once by one model, in parts that are each whole or not there.

A part is decoded by one task on a CPU and scored and stored by one actor, on a GPU if there are any; what is in memory is
the listing and what Ray Data lets decoders be ahead, however many images there are. A part in storage was put there in
one piece, so a job that was killed lost the parts under way and no more: the same command checks what is there and makes
the rest.
"""

import builtins
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray

from cxr_dist import cluster, errors, storage
from cxr_dist.capacity import wants_gpu
from cxr_dist.config import Config
from cxr_dist.data.rows import RowDecoder
from cxr_dist.errors import DataError, RunError
from cxr_dist.evaluate.inference import DecodeGroups, pipeline, scorers
from cxr_dist.predict.model import Model, find_model, pack, thresholds_of
from cxr_dist.predict.part import NAMED, DamagedPartError, PartFile, read_part
from cxr_dist.predict.plan import DONE, Cut, Plan, claim, part_name
from cxr_dist.predict.source import Section, open_source
from cxr_dist.predict.workers import DecodeParts, ScoreParts, Store

__all__ = ["predict"]

log = logging.getLogger(__name__)

WAVE = 512
"""Parts in one Ray Data execution, which keeps an object for each in the driver's node: half a million images."""
CHECKS = 8
"""Parts that are read and checked at the same time."""
PROGRESS_S = 10.0
"""Time between progress lines, seconds."""


def predict(
    config: Config,
    *,
    model: str,
    images: str,
    out: str,
    split: str | None = None,
    thresholds: str = "youden",
    part_images: int = 0,
    num_scorers: int = 0,
) -> dict[str, Any]:
    """Predictions of `model` for `images` in `out`, or the rest of them; the job's JSON result.

    Raises InputError before anything is scored, and where files change while they are; RunError unless at the end the
    parts together hold each image of the plan exactly once. An unreadable image has a row with the reason and is no error.
    `part_images` and `num_scorers` of 0 are chosen here.
    """
    began = time.monotonic()
    out = storage.absolute(out)
    with find_model(model, config.tracking.uri) as found:
        points = thresholds_of(found, thresholds)
        source = open_source(images, split, config.data, size=found.size)
        plan = claim(out, found, source, points, part_images)
        cut = Cut(source=source, part_images=plan.part_images)
        files, damaged = _existing(out, plan, cut)
        missing = [number for number in range(cut.num_parts) if number not in files]
        scoring_s = 0.0
        if missing:
            storage.delete(storage.join(out, DONE))
            scoring = time.monotonic()
            _Work(config, out, plan, cut, found).score(missing, num_scorers)
            scoring_s = time.monotonic() - scoring
    scored = sum(len(cut.image_ids(number)) for number in missing)
    if missing:
        files, broken = _existing(out, plan, cut)
        if broken or len(files) != cut.num_parts:
            lost = [part_name(number) for number in range(cut.num_parts) if number not in files]
            raise RunError(
                f"{storage.shown(out)}: found {len(files)} whole parts of {cut.num_parts} after scoring, without {lost[0]} "
                f"({broken.get(lost[0], 'not there')}); run the same command again, and alone"
            )
    parts = [files[number] for number in range(cut.num_parts)]
    _write_done(out, plan, parts)
    unreadable = sum(part.unreadable for part in parts)
    return {
        "out": storage.shown(out),
        "images": source.num_images,
        "readable": source.num_images - unreadable,
        "unreadable": unreadable,
        "unreadable_first": dict([one for part in parts for one in part.first][:NAMED]),
        "left_out_by_ingest": source.left_out,
        "parts": {"written": len(missing), "found": cut.num_parts - len(missing), "damaged": damaged},
        "model": {name: plan.model[name] for name in ("uri", "version", "sha256")},
        "thresholds": plan.thresholds,
        "scored": scored,
        "images_per_s": round(scored / scoring_s, 1) if scored else None,
        "wall_s": round(time.monotonic() - began, 2),
    }


def _existing(out: str, plan: Plan, cut: Cut) -> tuple[dict[int, PartFile], dict[str, str]]:
    """The whole parts in storage by number, and why others that are there are not whole.

    DataError for a part that is none of the plan's: who reads all parts would read it too.
    """
    names = {path for path, _ in storage.list_files(out, recursive=False) if path.startswith("part-")}
    numbers = [number for number in range(cut.num_parts) if part_name(number) in names]
    if strange := sorted(names - {part_name(number) for number in numbers}):
        raise DataError(
            f"--out {storage.shown(out)}: found {strange[0]}, expected parts up to {part_name(cut.num_parts - 1)}; take it "
            "away, or give another --out"
        )

    def check(number: int) -> PartFile | str:
        try:
            return read_part(out, number, plan.sha256, cut.image_ids(number), plan.model["findings"])
        except (DamagedPartError, FileNotFoundError) as error:
            return str(error)

    files: dict[int, PartFile] = {}
    damaged: dict[str, str] = {}
    with ThreadPoolExecutor(CHECKS) as pool:
        for number, checked in zip(numbers, pool.map(check, numbers), strict=True):
            if isinstance(checked, PartFile):
                files[number] = checked
            else:
                damaged[part_name(number)] = checked
                log.warning("%s is no whole part, it is made again: %s", part_name(number), checked)
    return files, damaged


def _write_done(out: str, plan: Plan, parts: Sequence[PartFile]) -> None:
    unreadable = sum(part.unreadable for part in parts)
    rows = sum(part.rows for part in parts)
    content = {
        "format": 1,
        "plan_sha256": plan.sha256,
        "images": rows,
        "readable": rows - unreadable,
        "unreadable": unreadable,
        "parts": [{name: value for name, value in asdict(part).items() if name != "first"} for part in parts],
    }
    storage.put_atomic(storage.join(out, DONE), (json.dumps(content, indent=1) + "\n").encode())


@dataclass(frozen=True)
class _Work:
    """The scoring of missing parts on a cluster."""

    config: Config
    out: str
    plan: Plan
    cut: Cut
    model: Model

    def score(self, missing: Sequence[int], num_scorers: int) -> None:
        """Score and store these parts."""
        source = self.cut.source
        checkpoint = self.model.uri
        if self.model.local:
            checkpoint = pack(checkpoint, storage.join(self.out, "_work", f"model-{self.model.sha256[:12]}"))
        cluster.connect(2)
        resources = ray.cluster_resources()
        use_gpu = wants_gpu(self.config, resources)
        scorers(self.config, use_gpu=use_gpu)
        actors = _num_scorers(resources, use_gpu=use_gpu)
        actors = min(num_scorers or actors, actors, len(missing))
        cluster.check_visible({"--out": self.out, "--images": source.uri, "--model": checkpoint})
        total = sum(len(self.cut.image_ids(number)) for number in missing)
        log.info(
            "scoring %d images in %d parts with %d actors on %s",
            total,
            len(missing),
            actors,
            "GPU" if use_gpu else "CPU",
        )
        began = told = time.monotonic()
        done = 0
        for section in source.sections:
            numbers = self.cut.parts_of(section)
            here = [number for number in missing if number in numbers]
            for wave in (here[at : at + WAVE] for at in range(0, len(here), WAVE)):
                for rows in self._parts(section, wave, checkpoint, actors, use_gpu):
                    done += rows
                    if time.monotonic() - told > PROGRESS_S:
                        told = time.monotonic()
                        log.info("%d of %d images, %.1f images/s", done, total, done / (told - began))

    def _parts(
        self, section: Section, numbers: Sequence[int], checkpoint: str, actors: int, use_gpu: bool
    ) -> Iterator[int]:
        """Images of each part as soon as it is stored."""
        first, rows = self.cut.parts_of(section).start, self.cut.part_rows(section)
        decode = DecodeParts(
            DecodeGroups(
                RowDecoder(
                    source=section.reader,
                    split=section.split,
                    size=self.model.size,
                    encoding=section.encoding,
                    findings=(0,),  # labels are not used; a column cannot be of no width
                ),
                token=uuid.uuid4().hex,
                groups_per_task=self.cut.groups_per_part(section),
                num_groups=section.split.num_groups,
                padded=True,
            ),
            section,
        )
        store = Store(
            out=self.out,
            plan_sha256=self.plan.sha256,
            thresholds=self.plan.thresholds["values"],
            model_version=self.plan.model["version"],
            first_part=first,
            part_rows=rows,
        )
        blocks = pipeline(
            decode,
            [number - first for number in numbers],
            ScoreParts,
            (checkpoint, self.config.train.threads_per_worker, store),
            rows_per_task=rows,
            num_scorers=actors,
            use_gpu=use_gpu,
        )
        try:
            for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from block["rows"].to_pylist()
        except Exception as error:
            raise _cause(error) from error


def _num_scorers(resources: dict[str, float], *, use_gpu: bool) -> int:
    """Actors that score: one a GPU; on CPUs six for each that decodes, as a forward pass takes six times as long."""
    if use_gpu:
        return int(resources.get("GPU", 0))
    cpus = int(resources.get("CPU", 0))
    return max(1, min(cpus - 1, cpus * 6 // 7))


def _cause(error: Exception) -> Exception:
    """What a task or actor raised, out of the text that Ray Data makes of it: the error itself does not always travel."""
    raised = re.findall(r"^([\w.]+): (.+)$", str(error), re.MULTILINE)
    for name, sentence in reversed(raised):
        kind = getattr(errors, name.removeprefix(f"{errors.__name__}."), None)
        if isinstance(kind, type):
            return kind(sentence)
        if isinstance(kind := getattr(builtins, name, None), type) and issubclass(kind, OSError):
            return RunError(f"storage failed while images were scored ({sentence}); run the same command again")
    return error
