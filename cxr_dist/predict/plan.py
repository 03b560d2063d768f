"""What a prediction is made of, written before it begins: model, images, thresholds, and how the images are cut in parts.

    OUT/predict.json             model, source, thresholds, sizes; everything that decides a part's content
    OUT/_work/images.parquet     a prefix's listing, to say what changed in it
    OUT/part-00000.parquet, …    predictions: `part`
    OUT/done.json                counts, size and SHA-256 of each part, when all are there and checked

A part is `part_images` consecutive images of the sorted listing, or of a split's rows, so it is the same part in every
attempt. What is in OUT already is gone on with if it is of the same plan, and refused by name if it is not.
"""

import dataclasses
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data.tables import read_table
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.predict.model import Model, Thresholds
from cxr_dist.predict.source import Section, Source

__all__ = ["DONE", "PLAN", "Cut", "Plan", "claim", "part_images_of", "part_name"]

FORMAT = 1
PLAN, DONE, LISTING = "predict.json", "done.json", "_work/images.parquet"

PART_IMAGES = 1024
PART_BYTES = 64 << 20
"""Most that a part's decoded images take where the number of images is left open: one task decodes them."""
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of predict.json."""

    model: dict[str, Any]
    """uri (as asked), version, sha256, findings, size."""
    source: dict[str, Any]
    """kind, uri, split, images, sha256 (of the listing or manifest)."""
    thresholds: dict[str, Any]
    """source (for people), values (a number a finding)."""
    part_images: int
    """Images of a part, as asked; whole row groups of them are taken."""
    sha256: str = ""
    """Of predict.json as it lies; not in it."""

    @classmethod
    def of(cls, model: Model, source: Source, thresholds: Thresholds, part_images: int) -> "Plan":
        """What is asked for now."""
        return cls(
            model={
                "uri": model.asked,
                "version": model.version,
                "sha256": model.sha256,
                "findings": list(model.findings),
                "size": model.size,
            },
            source={
                "kind": source.kind,
                "uri": storage.shown(source.uri),
                "split": source.split,
                "images": source.num_images,
                "sha256": source.sha256,
            },
            thresholds=asdict(thresholds),
            part_images=part_images,
        )

    def to_json(self) -> bytes:
        """The bytes of predict.json."""
        raw = {name: value for name, value in asdict(self).items() if name != "sha256"}
        return (json.dumps({"format": FORMAT, **raw}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Plan":
        """The plan in the bytes of a predict.json; DataError for anything else."""
        try:
            raw = json.loads(data)
            version = raw.pop("format")
            if version != FORMAT:
                raise DataError(f"{where}: found format {version}, expected {FORMAT}; use the version that wrote it")
            return cls(**raw, sha256=hashlib.sha256(data).hexdigest())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{where}: found no plan of predictions in it; give another --out, or delete it") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """The images of a source as parts, numbered through all its sections."""

    source: Source
    part_images: int

    def groups_per_part(self, section: Section) -> int:
        """Row groups of each of its parts but the last."""
        return max(1, self.part_images // section.split.row_group)

    def part_rows(self, section: Section) -> int:
        """Images of each of its parts but the last."""
        return self.groups_per_part(section) * section.split.row_group

    def parts_of(self, section: Section) -> range:
        """Numbers of a section's parts."""
        counts = [-(-one.split.num_rows // self.part_rows(one)) for one in self.source.sections]
        at = self.source.sections.index(section)
        return range(sum(counts[:at]), sum(counts[: at + 1]))

    @property
    def num_parts(self) -> int:
        return self.parts_of(self.source.sections[-1]).stop

    def image_ids(self, part: int) -> list[str]:
        """The images of a part, in order."""
        section = next(one for one in self.source.sections if part in self.parts_of(one))
        rows = self.part_rows(section)
        return section.image_ids.slice((part - self.parts_of(section).start) * rows, rows).to_pylist()


def part_name(number: int) -> str:
    """File name of a part."""
    return f"part-{number:05d}.parquet"


def part_images_of(size: int) -> int:
    """Images of a part where none are asked for: 1024, fewer of large ones."""
    return max(1, min(PART_IMAGES, PART_BYTES // size**2))


def claim(out: str, model: Model, source: Source, thresholds: Thresholds, part_images: int) -> Plan:
    """The plan in `out`: the one that is there if it is of the same things, else, in an empty folder, a new one.

    `part_images` 0 leaves the size of parts to the plan. Raises DataError naming what is different.
    """
    where = storage.join(out, PLAN)
    try:
        found = Plan.from_json(storage.read_bytes(where), storage.shown(where))
    except FileNotFoundError:
        return _begin(out, Plan.of(model, source, thresholds, part_images or part_images_of(model.size)), source)
    asked = Plan.of(model, source, thresholds, part_images or found.part_images)
    _check_listing(out, found, asked, source)
    _compare(out, found, asked)
    return found


def _begin(out: str, plan: Plan, source: Source) -> Plan:
    strange = [path for path, _ in storage.list_files(out, recursive=False) if path.startswith("part-")]
    if strange:
        raise ConfigError(
            f"--out {storage.shown(out)}: found {strange[0]} and no {PLAN} that says what it is of; give another --out, or "
            "delete what is there"
        )
    if source.listing is not None:
        sink = io.BytesIO()
        pq.write_table(source.listing, sink, compression="zstd")
        storage.put_atomic(storage.join(out, LISTING), sink.getvalue())
    data = plan.to_json()
    storage.put_atomic(storage.join(out, PLAN), data)
    return dataclasses.replace(plan, sha256=hashlib.sha256(data).hexdigest())


def _compare(out: str, found: Plan, asked: Plan) -> None:
    pairs = {
        "the model": (found.model["version"], asked.model["version"]),
        "weights with SHA-256": (found.model["sha256"], asked.model["sha256"]),
        "images": (found.source["uri"], asked.source["uri"]),
        "split": (found.source["split"], asked.source["split"]),
        "the dataset with manifest": (found.source["sha256"], asked.source["sha256"]),
        "part_images": (found.part_images, asked.part_images),
        **{
            f"threshold of {name}": (found.thresholds["values"].get(name), asked.thresholds["values"].get(name))
            for name in sorted({*found.thresholds["values"], *asked.thresholds["values"]})
        },
    }
    different = [f"{name} {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
    if different:
        raise DataError(
            f"--out {storage.shown(out)}: found predictions of {'; '.join(different)}; give another --out, or delete what "
            "is there"
        )


def _check_listing(out: str, found: Plan, asked: Plan, source: Source) -> None:
    """DataError that names what is new, gone or of another size in a prefix since its predictions began."""
    same_place = all(found.source[name] == asked.source[name] for name in ("kind", "uri"))
    if source.listing is None or not same_place or found.source["sha256"] == source.sha256:
        return
    where = storage.join(out, LISTING)
    try:
        old = read_table(storage.read_bytes(where))
    except (FileNotFoundError, pa.ArrowException, OSError):
        raise DataError(
            f"{storage.shown(where)}: cannot be read, and the images at {found.source['uri']} are not those that "
            "predictions began with; give another --out"
        ) from None
    before, now = (
        dict(zip(table["image_id"].to_pylist(), table["bytes"].to_pylist(), strict=True))
        for table in (old, source.listing)
    )
    kinds = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    told = [f"{len(names)} {kind} ({', '.join(names[:NAMED])})" for kind, names in kinds.items() if names]
    raise DataError(
        f"--images {found.source['uri']}: found {', '.join(told)}, expected the {len(before)} images that the predictions in "
        f"{storage.shown(out)} began with; put them back as they were, or give another --out"
    )
