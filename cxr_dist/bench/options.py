"""What a stage of the bench is asked to do, and the images it does it with."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cxr_dist import storage
from cxr_dist.config import Config
from cxr_dist.data import nih, synth
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.store_errors import shown

__all__ = ["BenchOptions", "Given", "ImageSet", "load_images", "scratch", "write_release"]

NUM_DRAWN = 64
"""Synthetic images that are drawn at most; more are repeats of these."""

NUM_READ = 512
"""Given images that are read at most (about 0.2 GB of NIH's); more are repeats of these."""

IMAGES_PER_PATIENT = 4


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the reader says of machines that are not here."""

    rank_images_per_s: tuple[float, ...] = (250.0, 1000.0, 4000.0)
    """Images a second that a rank trains on where it never waits: whatever its GPU, network and batch make of it."""
    network_gbit: float = 10.0
    """Bandwidth between nodes, Gbit/s each way."""
    network_latency_us: float = 20.0
    """Of one message between nodes."""
    store_gbit: float = 5.0
    """What a node reads from or writes to the object storage, Gbit/s."""
    share: int = 64
    """Images of a rank in a step."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What every stage is given."""

    out: Path
    """Folder for whatever a stage writes; it exists, and may hold what an earlier stage or run left."""
    images: str = ""
    """Folder or prefix of PNG files; empty: synthetic ones."""
    num_images: int = 0
    """Images to measure with, repeated under names of their own up to this number; 0: the stage's own number."""
    peers: bool = False
    """Whether other loaders are measured too."""
    cpus: int = 1
    """Processes that may work at once, and CPUs of a Ray cluster that a stage starts."""
    repeats: int = 5
    """Times that each variant is measured, in turns; the best counts."""
    seed: int = 0
    """Of synthetic images and of everything that is drawn."""
    given: Given = field(default_factory=Given)
    """What the reader says of machines that are not here (`simulate`)."""
    max_images: int = 10**8
    """Largest dataset whose tables are written (`simulate`)."""
    config: Config = field(default_factory=Config)
    """The run's config, for stages that need a size, a network or a batch."""

    def count(self, default: int) -> int:
        """Number of images, or a stage's own."""
        return self.num_images or default


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Encoded images in memory, each used as often as it takes to have `num_images`."""

    distinct: tuple[bytes, ...]
    num_images: int
    source: str
    """Where they come from: a URI, or how they were drawn."""

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        return self.distinct[index % len(self.distinct)]

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(self.num_images))

    def name(self, index: int) -> str:
        """A file name as NIH's, unlike that of any other index."""
        patient, follow_up = divmod(index, IMAGES_PER_PATIENT)
        return f"{patient + 1:08d}_{follow_up:03d}.png"

    @property
    def num_bytes(self) -> int:
        """Bytes of all images, each repeat counted."""
        return sum(len(data) for data in self)


@contextmanager
def scratch(options: BenchOptions, name: str) -> Iterator[Path]:
    """A new empty folder in the bench's, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=options.out) as folder:
        yield Path(folder)


def load_images(options: BenchOptions, default: int) -> ImageSet:
    """The given images, or drawn ones; `default` of them where the options do not say how many."""
    num_images = options.count(default)
    if options.images:
        return ImageSet(distinct=_given(options.images, num_images), num_images=num_images, source=options.images)
    folder = options.out / f"synthetic-{options.seed}-{min(num_images, NUM_DRAWN)}"
    # a patient has at least one image, so there are enough
    synth.write_release(folder, num_patients=max(2, min(num_images, NUM_DRAWN)), seed=options.seed)
    files = sorted((folder / "images").iterdir())[:NUM_DRAWN]
    distinct = tuple(file.read_bytes() for file in files[:num_images])
    return ImageSet(distinct=distinct, num_images=num_images, source=f"drawn, seed {options.seed}")


def _given(uri: str, num_images: int) -> tuple[bytes, ...]:
    names = [name for name, _ in storage.list_files(uri) if name.lower().endswith(".png")]
    if not names:
        raise InputError(f"{shown(uri)}: found no .png file, expected a folder or prefix of PNG images")
    return tuple(storage.read_bytes(storage.join(uri, name)) for name in names[: min(num_images, NUM_READ)])


def write_release(images: ImageSet, folder: Path) -> None:
    """The images as an NIH-shaped release: images/ (repeats are hard links), Data_Entry_2017.csv and the two lists.

    Image i shows finding i % 15 (14 is none); every fifth patient is in the test list. The labels say nothing.
    """
    (folder / "images").mkdir(parents=True)
    rows = [synth.LABEL_HEADER]
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    first: dict[int, Path] = {}
    for index in range(images.num_images):
        name = images.name(index)
        path = folder / "images" / name
        which = index % len(images.distinct)
        if which in first:
            path.hardlink_to(first[which])
        else:
            first[which] = path
            path.write_bytes(images.distinct[which])
        patient, follow_up = divmod(index, IMAGES_PER_PATIENT)
        finding = (*nih.FINDINGS, "No Finding")[index % (len(nih.FINDINGS) + 1)]
        rows.append(f"{name},{finding},{follow_up},{patient + 1},50,{'MF'[patient % 2]},PA,1024,1024,0.143,0.143")
        lists["test_list.txt" if patient % 5 == 4 else "train_val_list.txt"].append(name)
    (folder / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n")
    for file, names in lists.items():
        (folder / file).write_text("\n".join(names))


def checked(options: BenchOptions) -> BenchOptions:
    """The options with paths made absolute, or a ConfigError."""
    for name, least in (("num_images", 0), ("cpus", 1), ("repeats", 1), ("max_images", 100_000)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}: found {getattr(options, name)}, expected {least} or more")
    for name in ("rank_images_per_s", "network_gbit", "network_latency_us", "store_gbit"):
        values = getattr(options.given, name)
        if any(value <= 0 for value in (values if isinstance(values, tuple) else (values,))):
            raise ConfigError(f"--{name}: found {values}, expected more than 0")
    return replace(options, out=options.out.absolute())
