"""What a training rank needs to know, as one picklable value made by the driver."""

import uuid
from dataclasses import dataclass

from cxr_dist.config import Config, TrainConfig
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.features import FeatureSet
from cxr_dist.data.plan import Plan
from cxr_dist.data.rows import RowSource
from cxr_dist.data.sizing import steps_per_task
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.notice import Request

__all__ = ["TrainJob", "training_views"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A run as its ranks see it."""

    config: Config
    plan: Plan
    findings: tuple[str, ...]
    columns: tuple[int, ...]
    """Place of each finding among the stored ones."""
    size: int
    encoding: str
    train: RowSource
    validation: RowSource
    pos_weight: tuple[float, ...] | None
    folder: str
    """URI of the run's folder in storage."""
    manifest_sha256: str
    pixels_version: str
    tracking_uri: str
    run_id: str
    use_gpu: bool
    world_sizes: tuple[int, ...] = (1,)
    """Numbers of ranks that the run may have, ascending."""
    owner: int = 0
    """Number of the lease under which the run is written (`train.lease`)."""
    attempt: str = ""
    """Name of the driver's attempt at the run."""
    requests: tuple[Request, ...] = ()
    """Where others ask for a checkpoint at once."""
    features: dict[tuple[str, int], FeatureSet] | None = None
    """Stored features that take the place of the images, by (split, view); None where the prefix runs in training."""

    @property
    def row_size(self) -> int:
        """Side of the images that the stream brings; 0 where it brings features."""
        return 0 if self.features else self.size

    def position(self) -> int:
        """First step that is still to be done, by the latest whole checkpoint."""
        latest = Checkpoints(self.folder).latest_whole()
        if latest is None:
            return 0
        return self.plan.num_steps if latest.finished else latest.index

    def remaining(self, world_size: int) -> StreamSpec:
        """The stream of the steps after the latest whole checkpoint."""
        return self.stream_spec(world_size, self.position())

    def stream_spec(self, world_size: int, start: int) -> StreamSpec:
        """The stream of the run's steps from `start` on."""
        train, validation = self.train, self.validation
        views: tuple[RowSource, ...] = ()
        if self.features:
            validation = self.features["validation", 0].reader(self.config.data)
            readers = [
                self.features["train", view].reader(self.config.data) for view in training_views(self.config.train)
            ]
            train, views = readers[0], tuple(readers) if self.config.train.augment else ()
        encoding = "features" if self.features else self.encoding
        feature_bytes = self.features["validation", 0].row_bytes if self.features else 0
        return StreamSpec(
            plan=self.plan,
            train=train,
            train_views=views,
            validation=validation,
            world_size=world_size,
            start=start,
            steps_per_task=steps_per_task(
                train,
                images=self.config.data.task_images,
                encoding=encoding,
                row_group=self.plan.train.row_group,
                row_bytes=feature_bytes or self.size**2,
                share=self.plan.rank_batch(world_size),
            ),
            size=self.size,
            encoding=encoding,
            feature_bytes=feature_bytes,
            findings=self.columns,
            views=self.config.train.views,
            augment=self.config.train.augment,
            token=uuid.uuid4().hex,
        )


def training_views(config: TrainConfig) -> range:
    """Numbers of the views of a training image that a run with recurring views shows."""
    return range(1, config.views + 1) if config.augment else range(1)
