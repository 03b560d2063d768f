"""Worker groups that shrink and grow with the cluster, at numbers of ranks that the batch can be dealt to.

Ray Train's elastic policy decides when; this module adds what it does not know: which numbers are allowed, that a node
which is gone has no room (the policy's account of the cluster is up to 20 s old), and that a group should leave a
checkpoint before another takes its place. It holds all that the package needs of Ray's private API for that (2.60): the
policy's count of workers, its two decisions, and where a trainer takes its policy from.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from cxr_dist.errors import RunError
from cxr_dist.train.notice import Request

__all__ = ["ElasticTrainer", "WholeShares"]

log = logging.getLogger(__name__)

CHECKPOINT_S = 120.0
"""Longest that a new size waits for the checkpoint of the group before it, seconds; then steps are done again."""


class WholeShares(ElasticScalingPolicy):
    """Ray's elastic policy, at `world_sizes` only (ascending); `before_resize` is asked before a running group is replaced."""

    def __init__(
        self, scaling_config: ScalingConfig, world_sizes: tuple[int, ...], before_resize: Request, patience_s: float
    ):
        super().__init__(scaling_config)
        self.world_sizes, self.before_resize, self.patience_s = world_sizes, before_resize, patience_s
        self.next: ResizeDecision | None = None
        """The size that waits for a checkpoint."""
        self.asked_at = 0.0
        self.no_room_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """A size for a group that is not there; RunError if there was no room for one for `patience_s` seconds."""
        self.next = None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self.no_room_since = None
            return decision
        self.no_room_since = self.no_room_since or time.monotonic()
        if time.monotonic() - self.no_room_since > self.patience_s:
            raise RunError(
                f"found no room for {self.world_sizes[0]} ranks in {self.patience_s:.0f} s (train.num_workers, "
                "train.cpus_per_worker); add nodes and run the same command again"
            )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Another size for a running group, once it has stored a checkpoint; called about twice a second."""
        if self.next is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if not isinstance(decision, ResizeDecision):
                return decision
            self.next, self.asked_at = decision, time.monotonic()
            self.before_resize.ask()
        if not self.before_resize.answered() and time.monotonic() - self.asked_at < CHECKPOINT_S:
            return NoopDecision()
        decision, self.next = self.next, None
        return decision

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        reserved = {node: resources for node, resources in reserved_resources.items() if node in alive}
        room = super()._count_possible_workers(reserved)
        return max((size for size in self.world_sizes if size <= room), default=0)


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer with a policy of ours where the number of workers is a range."""

    def __init__(self, *args: Any, policy: Callable[[ScalingConfig], WholeShares], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.policy = policy

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = self.policy(self.scaling_config)
        return super()._initialize_and_run_controller(**options)
