"""What a training rank needs to know, as one picklable value made by the driver."""

import uuid
from dataclasses import dataclass

from cxr_dist.config import Config
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.plan import Plan
from cxr_dist.data.rows import RowSource
from cxr_dist.train.checkpoint import Checkpoints

__all__ = ["TrainJob"]

PNG_TASK_IMAGES, PIXELS_TASK_IMAGES = 128, 512
"""Images in a decoding task where the config leaves it open: about half a second of work of either kind."""


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

    def remaining(self, world_size: int) -> StreamSpec:
        """The stream of the steps after the latest whole checkpoint."""
        latest = Checkpoints(self.folder).latest_whole()
        if latest is None:
            return self.stream_spec(world_size, 0)
        return self.stream_spec(world_size, self.plan.num_steps if latest.finished else latest.index)

    def stream_spec(self, world_size: int, start: int) -> StreamSpec:
        """The stream of the run's steps from `start` on."""
        images = self.config.data.task_images
        if not images:
            images = PIXELS_TASK_IMAGES if self.encoding == "pixels" else PNG_TASK_IMAGES
        left = max(1, self.plan.num_steps - start)
        return StreamSpec(
            plan=self.plan,
            train=self.train,
            validation=self.validation,
            world_size=world_size,
            start=start,
            steps_per_task=min(left, max(1, images // self.plan.rank_batch(world_size))),
            size=self.size,
            encoding=self.encoding,
            findings=self.columns,
            views=self.config.train.views,
            augment=self.config.train.augment,
            token=uuid.uuid4().hex,
        )
