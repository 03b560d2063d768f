"""The order of samples as data: which row groups each rank reads at each step of a whole run.

A run is one sequence of steps, numbered from 0: the training steps of epoch 0, its validation steps, the training
steps of epoch 1, and so on. That number, `index`, is the run's whole position. Everything here is a pure function of
a few integers, so any process can work out any step without asking another, at a cost that does not grow with the
dataset. No Ray, no randomness but the seed's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from cxr_dist.errors import ConfigError

__all__ = ["EMPTY", "Plan", "Split", "Step", "allowed_world_sizes", "draws", "draws_of", "permute", "view_of"]

EMPTY = -1
"""Row group number that stands for no row group: its rows are padding."""

Int64 = npt.NDArray[np.int64]

NUM_DRAWS = 6
"""Random numbers behind one augmented view: rotation, shift x, shift y, scale, shear, flip."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split as the plan sees it: rows in placement order, cut into row groups that are full but for the last."""

    num_rows: int
    row_group: int

    @property
    def num_groups(self) -> int:
        return -(-self.num_rows // self.row_group)

    @property
    def num_full_groups(self) -> int:
        return self.num_rows // self.row_group

    def rows(self, groups: Int64) -> Int64:
        """Rows of the row groups, in order, [len(groups) * row_group]; -1 where a group is empty or short."""
        rows = groups[:, None] * self.row_group + np.arange(self.row_group)
        return np.where((groups[:, None] == EMPTY) | (rows >= self.num_rows), -1, rows).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the run: `groups` are its row groups in global order, all ranks together (or one rank's, see `share`)."""

    index: int
    kind: Literal["train", "validation"]
    epoch: int
    number: int
    """Number of the step among those of its kind in the epoch."""
    groups: Int64

    def of_rank(self, rank: int, world_size: int) -> Int64:
        """The contiguous slice of row groups that a rank takes."""
        share = len(self.groups) // world_size
        return self.groups[rank * share : (rank + 1) * share]


def allowed_world_sizes(global_batch: int, row_group: int) -> list[int]:
    """World sizes that can share a global batch in whole row groups."""
    groups = global_batch // row_group
    if global_batch % row_group:
        return []
    return [size for size in range(1, groups + 1) if groups % size == 0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps of a run. Raises ConfigError where the batch cannot be dealt in whole row groups.

    A training epoch reads every full row group once, in an order of its own; the split's short last group and the
    groups that do not fill a last step are left out (`dropped_rows`). Validation steps cover every row, in placement
    order, padded to full shape. `max_steps` cuts both kinds, for trial runs.
    """

    train: Split
    validation: Split
    seed: int
    epochs: int
    global_batch: int
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.global_batch % self.train.row_group:
            raise ConfigError(
                f"train.global_batch: found {self.global_batch}, expected a multiple of the dataset's row group of "
                f"{self.train.row_group} images"
            )
        if self.train.row_group != self.validation.row_group:
            raise ConfigError(
                f"row groups: found {self.train.row_group} images in train and {self.validation.row_group} in "
                "validation, expected the same; ingest the dataset again"
            )
        if self.train_steps == 0:
            raise ConfigError(
                f"train.global_batch: found {self.global_batch}, expected at most "
                f"{self.train.num_full_groups * self.train.row_group}, the images in the train split's full row groups"
            )

    @property
    def groups_per_step(self) -> int:
        return self.global_batch // self.train.row_group

    @property
    def train_steps(self) -> int:
        """Training steps of an epoch."""
        return self._capped(self.train.num_full_groups // self.groups_per_step)

    @property
    def validation_steps(self) -> int:
        """Validation steps of an epoch."""
        return self._capped(-(-self.validation.num_groups // self.groups_per_step))

    @property
    def steps_per_epoch(self) -> int:
        return self.train_steps + self.validation_steps

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, both kinds."""
        return self.epochs * self.steps_per_epoch

    @property
    def dropped_rows(self) -> int:
        """Training rows that one epoch does not read."""
        return self.train.num_rows - self.train_steps * self.global_batch

    def _capped(self, steps: int) -> int:
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rank_batch(self, world_size: int) -> int:
        """Images of one rank in one step; ConfigError if the batch cannot be dealt to so many ranks."""
        if self.groups_per_step % world_size:
            allowed = ", ".join(map(str, allowed_world_sizes(self.global_batch, self.train.row_group)))
            raise ConfigError(
                f"train.num_workers: found {world_size}, expected one of {allowed}, so that a global batch of "
                f"{self.global_batch} images is dealt in whole row groups of {self.train.row_group}"
            )
        return self.global_batch // world_size

    def step(self, index: int) -> Step:
        """The run's step number `index`."""
        return self._step(index, slice(0, self.groups_per_step))

    def share(self, index: int, rank: int, world_size: int) -> Step:
        """The step with `groups` of one rank alone, at the cost of these: `step(index).of_rank(rank, world_size)`."""
        share = self.groups_per_step // world_size
        return self._step(index, slice(rank * share, (rank + 1) * share))

    def _step(self, index: int, part: slice) -> Step:
        """The run's step number `index` with that part of its row groups."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of a run of {self.num_steps} steps")
        epoch, offset = divmod(index, self.steps_per_epoch)
        if offset < self.train_steps:
            first = offset * self.groups_per_step
            places = np.arange(first + part.start, first + part.stop)
            groups = permute(places, self.train.num_full_groups, self._epoch_keys(epoch))
            return Step(index=index, kind="train", epoch=epoch, number=offset, groups=groups)
        number = offset - self.train_steps
        first = number * self.groups_per_step
        groups = np.arange(first + part.start, first + part.stop)
        groups = np.where(groups < self.validation.num_groups, groups, EMPTY)
        return Step(index=index, kind="validation", epoch=epoch, number=number, groups=groups)

    def epoch_groups(self, epoch: int, first: int = 0, last: int | None = None) -> Int64:
        """Row groups of the train split that training steps `first` to `last` of an epoch read, in order.

        From `train_steps` on: those that the epoch leaves out, for they fill no step.
        """
        end = self.train.num_full_groups if last is None else last * self.groups_per_step
        places = np.arange(first * self.groups_per_step, end)
        return permute(places, self.train.num_full_groups, self._epoch_keys(epoch))

    def places(self, groups: Int64, epoch: int) -> Int64:
        """Where in the epoch's order of training row groups each of these full ones stands: the inverse of `step`.

        Place p is read in the epoch's training step p // groups_per_step; places past the last step are not read.
        """
        return permute(groups, self.train.num_full_groups, self._epoch_keys(epoch), inverse=True)

    def split_of(self, step: Step) -> Split:
        return self.train if step.kind == "train" else self.validation

    def _epoch_keys(self, epoch: int) -> npt.NDArray[np.uint64]:
        digest = hashlib.blake2b(f"order {self.seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        return np.frombuffer(digest, dtype="<u8")

    @cached_property
    def sha256(self) -> str:
        """Hash of what fixes the order: sizes, seed, batch. Equal hashes mean the same steps."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


_ROUNDS = 6


def permute(places: Int64, size: int, keys: npt.NDArray[np.uint64], *, inverse: bool = False) -> Int64:
    """Values of a keyed permutation of range(size) at `places`: a Feistel network with cycle walking.

    Costs the same at any place and any size and keeps no table, unlike a shuffled array; and it stays the same over
    library versions. (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.) `inverse` gives the places back.
    """
    if size == 1:
        return np.zeros_like(places)
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    turn = _unfeistel if inverse else _feistel
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = turn(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << np.uint64(half)) | right


def _unfeistel(values: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys[::-1]:
        left, right = right ^ (_mix(left ^ key) & mask), left
    return (left << np.uint64(half)) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def view_of(epoch: int, *, views: int, augment: bool) -> int:
    """Number of the view of an image that an epoch shows: 0 is the plain image, augmented views count from 1."""
    if not augment:
        return 0
    return 1 + (epoch % views if views else epoch)


def draws(seed: int, image_id: str, view: int) -> bytes:
    """Six numbers in [0, 1) behind an augmented view, as 24 bytes of little-endian float32.

    A pure function of its arguments, so it does not matter which rank, process or attempt asks.
    """
    return draws_of(seed, [image_id], view).tobytes()


def draws_of(seed: int, image_ids: Sequence[str], view: int) -> npt.NDArray[np.float32]:
    """`draws` of many images [images, NUM_DRAWS], in a third of the time."""
    key = f"view {seed} {view} "
    digests = [hashlib.blake2b((key + name).encode(), digest_size=4 * NUM_DRAWS).digest() for name in image_ids]
    numbers = (np.frombuffer(b"".join(digests), dtype="<u4") >> 8) * np.float32(2**-24)
    return numbers.astype("<f4").reshape(-1, NUM_DRAWS)
