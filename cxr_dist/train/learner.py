"""What learns on one rank: the frozen prefix, the tail in DDP, its optimizer, schedule and scaler."""

import contextlib
import time
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from cxr_dist import storage
from cxr_dist.data.stream import Batch
from cxr_dist.errors import RunFaultError
from cxr_dist.model import weights
from cxr_dist.model.batchnorm import discard_statistics, group_norms, update_running_statistics
from cxr_dist.model.features import from_bytes
from cxr_dist.model.network import Network, masked_loss
from cxr_dist.train.distributed import Ranks, parallel
from cxr_dist.train.job import TrainJob
from cxr_dist.train.optimize import Schedule, make_optimizer

__all__ = ["Learner"]


class Learner:
    """The network of one rank and all that changes it. Raises RunFaultError where the ranks' devices do not go together."""

    def __init__(self, job: TrainJob, ranks: Ranks, device: torch.device):
        self.job, self.ranks = job, ranks
        self.config = job.config.train
        if device.type == "cpu":
            torch.set_num_threads(self.config.threads_per_worker)
        else:
            torch.cuda.set_device(device)
        initial = weights.restore(storage.read_bytes(storage.join(job.folder, "initial.pt")), "initial.pt")
        self.network = Network.build(
            initial, job.config.model, num_findings=len(job.findings), precision=self.config.precision, device=device
        )
        kinds = ranks.gather(self.network.precision)
        if len(set(kinds)) > 1:
            raise RunFaultError(
                f"train.precision: auto is {', '.join(kinds)} on ranks 0, 1, …, which cannot be mixed; name one that all "
                "devices can do"
            )
        tail = self.network.tail.train()
        self.model = parallel(tail, ranks)
        self.norms = group_norms(tail)
        trained = [parameter for parameter in tail.parameters() if parameter.requires_grad]
        self.gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.optimizer = make_optimizer(job.config.optimizer, trained, self.config.global_batch)
        self.schedule = Schedule(
            job.config.optimizer,
            self.optimizer,
            steps_per_epoch=job.plan.train_steps,
            epochs=self.config.epochs,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.network.autocast is torch.float16)
        self.pos_weight = None
        if job.pos_weight is not None:
            self.pos_weight = torch.tensor(job.pos_weight, device=device, dtype=self.network.dtype)
        self.own_s = 0.0
        """Seconds up to the first backward of every step: what a rank does before it meets the others."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def settle_buckets(self) -> None:
        """Two throw-away backwards: DDP orders its gradient buckets anew after the first, and the order decides how
        sums round. Without them a resumed run would not repeat an uninterrupted one bit for bit."""
        share = self.config.micro_batch or self.job.plan.rank_batch(self.ranks.world_size)
        features = self.network.features(np.zeros((1, self.job.size, self.job.size), dtype=np.uint8))
        features = features.new_zeros((share, *features.shape[1:])).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            with self.network.mixed():
                self.model(features).float().sum().mul(0.0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        discard_statistics(self.norms)

    def features_of(self, batch: Batch) -> torch.Tensor:
        """The prefix's output for a batch: stored, or computed now."""
        if batch.features is not None:
            found = self.job.features["validation", 0]  # type: ignore[index]  # features come only where the job has them
            return self.network.stored(from_bytes(batch.features, found.shape_HWC, found.kind))
        augmented = self.config.augment and batch.step.kind == "train"
        return self.network.features(batch.images_BSS, batch.draws_B6 if augmented else None)

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; this rank's part of the global loss, on the device."""
        network, findings = self.network, len(self.job.findings)
        began = time.perf_counter()
        features = self.features_of(batch)
        labels, valid = network.transfer(batch.labels_BK), network.transfer(batch.valid_B)
        micro = self.config.micro_batch or len(labels)
        divisor = self.config.global_batch * findings
        total = torch.zeros((), device=network.device, dtype=network.dtype)
        for start in range(0, len(labels), micro):
            part = slice(start, start + micro)
            last = start + micro >= len(labels)
            with self.gradients_stay_local(not last):
                with network.mixed():
                    logits = self.model(features[part])
                if start == 0:
                    self.own_s += time.perf_counter() - began
                loss = masked_loss(logits, labels[part], valid[part], self.pos_weight, divisor=divisor)
                # DDP averages over the ranks; the sum is wanted
                self.scaler.scale(loss * self.ranks.world_size).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_running_statistics(self.norms)
        self.schedule.after_step()
        return total

    def gradients_stay_local(self, local: bool) -> contextlib.AbstractContextManager:
        if local and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def score(self, batch: Batch) -> np.ndarray:
        """Logits of a batch, without learning from it, float32 [B, K]."""
        return self.network.score_features(self.features_of(batch))

    def state_dict(self) -> dict[str, Any]:
        """What goes on after an interruption, and the precision that it is only good for."""
        return {
            "tail": self.network.tail.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.network.precision,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; RunFaultError if it is one of another precision."""
        if state["precision"] != self.network.precision:
            raise RunFaultError(
                f"train.precision: found {self.network.precision} on these devices, expected {state['precision']}, which the "
                "run was begun in; use such devices again, or another run.name"
            )
        self.network.tail.load_state_dict(state["tail"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
