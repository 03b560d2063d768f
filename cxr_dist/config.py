"""One frozen dataclass per concern; together they are a whole run.

Every field is followed by a string with its meaning and unit: `--help` of every job prints it. A value that cannot be
right raises `ConfigError` here, once, with the name of the field; what depends on data or hardware is checked in
`preflight`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from cxr_dist.errors import ConfigError

__all__ = [
    "Config",
    "CostConfig",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "flatten",
]

Trainable = Literal["head", "denseblock4", "denseblock3", "denseblock2", "all"]


def _require(condition: bool, field_name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field_name}: found {found!r}, expected {expected}")


def _require_plain(section: str, values: object) -> None:
    """Numbers that are finite and fit a machine's, text of one line: what would only fail hours later."""
    for name, value in vars(values).items():
        field_name = f"{section}.{name}"
        if isinstance(value, float):
            _require(math.isfinite(value), field_name, value, "a finite number")
        elif isinstance(value, int):
            _require(abs(value) < 1 << 63, field_name, value, "a number of at most 63 bits")
        elif isinstance(value, str):
            _require(value.isprintable(), field_name, value, "text of one line")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from, where the shards go, and how both are read."""

    release: str = ""
    """URI of the NIH release that ingest reads: a folder, a folder of images_*.tar.gz, or an object-store prefix."""
    labels: str = ""
    """URI of the label CSV (plain or .gz); empty: the one Data_Entry_2017*.csv found in the release."""
    train_val_list: str = ""
    """URI of the official training and validation list; empty: train_val_list.txt in the release."""
    test_list: str = ""
    """URI of the official test list; empty: test_list.txt in the release."""
    uri: str = ""
    """URI of the dataset: where ingest writes shards and manifest, and where training reads them."""
    label_set: Literal["nih14", "nih8"] = "nih14"
    """Findings and cleaning: all fourteen, or the notebooks' eight without images that show one of the other six."""
    size: int = 224
    """Side of the square grey image that the network sees, pixels."""
    encoding: Literal["png", "pixels"] = "pixels"
    """What a shard row holds: the original PNG bytes, or decoded and resized grey pixels (size*size bytes)."""
    in_place: bool = False
    """Write a manifest over the PNG files where they lie instead of copying them into shards."""
    row_group: int = 8
    """Images in a Parquet row group: the unit that is read whole and dealt to ranks."""
    shard_mb: int = 128
    """Aimed size of a shard, MiB."""
    validation_fraction: float = 0.2
    """Part of the train_val patients that the seeded cut gives to validation."""
    split_seed: int = 0
    """Seed of the validation cut and of the rows' placement in shards."""
    max_corrupt: float = 0.001
    """Part of the delivered images that may be unreadable before the job fails."""
    decode_workers: int = 0
    """Decoding processes in the stream, on nodes labelled `cxr-role: ingest` first; 0: one per CPU that the trainers leave free."""
    task_images: int = 0
    """Images in one decoding task, rounded down to whole steps of a rank; 0: 2 s of a core's work, 32 MiB at most."""
    cache_dir: str = ""
    """Folder on each node's own disk that keeps what was read from storage, for later epochs and runs; empty: none."""
    cache_gb: float = 50.0
    """Most that the node's cache holds, GB; once it is full, the rest is read from storage every epoch."""
    read_timeout_s: float = 120.0
    """Longest wait for bytes from storage before the read fails, seconds; a stalled read is asked for again long before."""

    def __post_init__(self) -> None:
        _require(16 <= self.size <= 1024, "data.size", self.size, "16 to 1024 pixels")
        _require(1 <= self.row_group <= 4096, "data.row_group", self.row_group, "1 to 4096 images")
        _require(1 <= self.shard_mb <= 4096, "data.shard_mb", self.shard_mb, "1 to 4096 MiB")
        _require(
            0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "between 0 and 1"
        )
        _require(0 <= self.max_corrupt <= 1, "data.max_corrupt", self.max_corrupt, "0 to 1")
        _require(self.decode_workers >= 0, "data.decode_workers", self.decode_workers, "0 or more processes")
        _require(self.task_images >= 0, "data.task_images", self.task_images, "0 or more images")
        _require("://" not in self.cache_dir, "data.cache_dir", self.cache_dir, "a folder on the nodes' own disks")
        _require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "a positive number of GB")
        _require(self.read_timeout_s >= 1, "data.read_timeout_s", self.read_timeout_s, "1 or more seconds")
        _require_plain("data", self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """DenseNet121, cut into a frozen prefix and a trained tail."""

    weights: str = "imagenet"
    """`imagenet` (torchvision), `random`, or the URI of a state dict, of a TorchXRayVision state dict or of a run's checkpoint."""
    trainable: Trainable = "denseblock4"
    """First part that is trained; everything before it is the frozen prefix."""
    train_final_norm: bool = False
    """Train norm5's scale and shift too (the notebooks left them frozen)."""
    pooling: Literal["lse", "avg"] = "lse"
    """Head pooling over the last feature map: log-sum-exp or average."""
    lse_r: float = 10.0
    """Sharpness of log-sum-exp pooling."""
    batch_norm: Literal["group", "frozen"] = "group"
    """Batch-norm in the tail: statistics of fixed groups of images, or frozen running statistics."""
    bn_group: int = 16
    """Images of one batch-norm group, consecutive in the global step."""
    prefix_chunk: int = 0
    """Images in one call of the frozen prefix, padded, so that its output does not depend on who asks; 0: as suits the device."""
    prefix_form: Literal["folded", "plain"] = "folded"
    """How the frozen prefix is computed: norms, input channels and pooling folded (equal to rounding), or layer by layer."""
    cuda_graph: bool = False
    """Start the folded prefix's kernels on a GPU as one CUDA graph (not yet measured on one)."""

    def __post_init__(self) -> None:
        _require(bool(self.weights), "model.weights", self.weights, "imagenet, random, or the URI of a state dict")
        _require(self.lse_r > 0, "model.lse_r", self.lse_r, "a positive number")
        _require(self.bn_group >= 2, "model.bn_group", self.bn_group, "2 or more images")
        _require(self.prefix_chunk >= 0, "model.prefix_chunk", self.prefix_chunk, "0 or more images")
        _require_plain("model", self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rate and its schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule; sgd has momentum 0.9."""
    lr: float = 1e-3
    """Learning rate at the reference batch."""
    lr_reference_batch: int = 16
    """Global batch, in images, that `lr` is stated for."""
    lr_rule: Literal["none", "sqrt", "linear"] = "none"
    """How `lr` grows with global_batch / lr_reference_batch."""
    weight_decay: float = 1e-4
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """plateau: a tenth after more than `plateau_patience` epochs without a lower validation loss; cosine: per step, to zero."""
    plateau_patience: int = 3
    """Epochs without a lower validation loss that the plateau schedule waits out; the next one lowers the rate."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, epochs (cosine and constant)."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        _require(self.lr_reference_batch >= 1, "optimizer.lr_reference_batch", self.lr_reference_batch, "1 or more")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.plateau_patience >= 0, "optimizer.plateau_patience", self.plateau_patience, "0 or more epochs")
        _require(self.warmup_epochs >= 0, "optimizer.warmup_epochs", self.warmup_epochs, "0 or more epochs")
        _require(
            not (self.warmup_epochs and self.schedule == "plateau"),
            "optimizer.warmup_epochs",
            self.warmup_epochs,
            "0 with the plateau schedule; use cosine or constant",
        )
        _require_plain("optimizer", self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop and the workers that run it."""

    num_workers: int | tuple[int, int] = 1
    """DDP ranks, one a GPU (or one a CPU process). [MIN, MAX]: as many as there is room for; the run goes on with fewer when a
    node is lost, and with more when one comes."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether a rank holds a GPU; auto: if the cluster has any."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that Ray reserves for a rank."""
    threads_per_worker: int = 1
    """Compute threads of a rank on CPU; how sums round depends on it: bitwise equality holds at one number only."""
    global_batch: int = 16
    """Images in one optimizer step, over all ranks."""
    micro_batch: int = 0
    """Images of one rank in one forward and backward; 0: the rank's whole share (no gradient accumulation)."""
    epochs: int = 20
    """Most epochs to train."""
    seed: int = 0
    """Seed of the order of samples, the augmentation, and every random initial weight."""
    views: int = 0
    """Different augmented views of an image that recur over the epochs; 0: a fresh one every epoch."""
    features: Literal["auto", "on", "off"] = "auto"
    """Compute the frozen prefix once an image and view and keep its output; auto: where that is faster, by measurement."""
    features_uri: str = ""
    """URI under which features are kept, for every run that can use them; empty: features, beside storage_path's runs."""
    features_type: Literal["fp16", "bf16", "fp32"] = "fp16"
    """What features are kept in; fp32 repeats an uncached run bit for bit on a CPU, at twice the size."""
    features_memory: Literal["auto", "device", "store", "stream"] = "auto"
    """Where a rank takes features from: its device's memory, the node's object store, or the shards; auto: the first that fits."""
    augment: bool = True
    """Random affine and flip of the training images (rotation and shear 5 degrees, shift 2 %, scale 5 %, flip 1/2)."""
    pos_weight: bool = True
    """Weigh positives by negatives / positives of the train split, per finding."""
    skip_findings: tuple[str, ...] = ()
    """Findings left out of loss and scores, for a split that has no positive of them."""
    patience: int = 5
    """Epochs without a higher validation mean AUROC before training stops early; 0: never."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the network; auto: bf16 where native, fp16 with a scaler on older GPUs, fp32 on CPU."""
    storage_path: str = ""
    """URI under which the run's checkpoints and scores are kept."""
    checkpoint_every_steps: int = 1000
    """Training steps between checkpoints within an epoch, beside those at its end; 0: none."""
    keep_checkpoints: int = 1
    """Checkpoints kept besides the best and the last."""
    max_failures: int = 3
    """Times that a failed group of workers is started again from the last checkpoint."""
    wait_for_nodes_s: int = 0
    """Longest wait for an autoscaling cluster to bring up the nodes of this run, seconds; 0: they must be there. GPUs that did
    not come in a third of it are asked for where they are not labelled `cxr-market: spot`."""
    log_every_steps: int = 50
    """Steps between progress lines and metrics."""
    process_group_timeout_s: int = 300
    """Longest that a rank waits in a collective for the others, seconds."""
    fast_dev_run: bool = False
    """Two steps of everything, to see that the job runs."""

    def __post_init__(self) -> None:
        least, most = self.workers
        _require(1 <= least <= most, "train.num_workers", self.num_workers, "1 or more, or [MIN, MAX] of them")
        for name in ("threads_per_worker", "global_batch", "epochs", "log_every_steps"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        _require(
            not (self.wait_for_nodes_s and self.use_gpu == "auto"),
            "train.use_gpu",
            self.use_gpu,
            "yes or no with train.wait_for_nodes_s: what to ask the cluster for is not to be guessed",
        )
        for name in ("micro_batch", "views", "patience", "checkpoint_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in ("max_failures", "wait_for_nodes_s", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _require(self.cpus_per_worker > 0, "train.cpus_per_worker", self.cpus_per_worker, "a positive number of CPUs")
        _require(
            self.process_group_timeout_s >= 10,
            "train.process_group_timeout_s",
            self.process_group_timeout_s,
            "10 or more seconds",
        )
        _require_plain("train", self)

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most ranks."""
        found = self.num_workers
        return (found, found) if isinstance(found, int) else (found[0], found[1])


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How scores become a report."""

    test: bool = True
    """End a training run with the test report of its best checkpoint."""
    bootstrap: int = 1000
    """Patient resamples behind every 95 % interval; 0: no intervals."""
    bootstrap_seed: int = 0
    """Seed of the resamples."""
    calibration: Literal["platt", "isotonic"] = "platt"
    """Curve per finding that makes probabilities of scores, fitted on validation: Platt's two numbers, or rising steps."""
    second_labels: str = ""
    """URI of another source's labels of the same images (CSV or Parquet: image ids, columns of 0/1 named as findings); empty:
    none."""
    saliency: int = 3
    """Images of each finding that are shown with a heat map, of true positives, false positives and false negatives each; 0: none."""
    boxes: str = ""
    """URI of NIH's BBox_List_2017.csv (plain or .gz), which heat maps are held against; empty: they are not."""
    box_side: int = 1024
    """Side of the images that the boxes' coordinates are pixels of; NIH's are 1024, whatever was ingested."""

    def __post_init__(self) -> None:
        _require(self.bootstrap >= 0, "evaluate.bootstrap", self.bootstrap, "0 or more resamples")
        _require(self.bootstrap_seed >= 0, "evaluate.bootstrap_seed", self.bootstrap_seed, "0 or more")
        _require(0 <= self.saliency <= 100, "evaluate.saliency", self.saliency, "0 to 100 images")
        _require(16 <= self.box_side <= 1 << 15, "evaluate.box_side", self.box_side, "16 to 32768 pixels")
        _require_plain("evaluate", self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run's identity."""

    name: str = ""
    """Name under storage_path and in MLflow; the same name resumes the same run."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the last checkpoint if there is one; must: fail without one; never: fail if there is one."""
    commit: str = ""
    """Git commit of the code, for the record; empty: asked of git (a submitted job travels without its .git)."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None or self.name == "",
            "run.name",
            self.name,
            "up to 100 letters, digits, dots, dashes and underscores",
        )
        _require_plain("run", self)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The MLflow server and experiment that hold the run."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking URI: sqlite:///…, http(s)://… or a database (postgresql+psycopg2://USER@HOST/NAME; PGPASSWORD)."""
    experiment: str = "cxr-dist"
    """MLflow experiment."""
    log_model: bool = True
    """Log the run's best checkpoint as an MLflow model that loads without this project (some 60 MB)."""
    registered_model: str = "cxr-densenet121"
    """Name of the model in MLflow's registry that versions are registered under."""
    register: bool = False
    """Register the logged model as a version."""
    promote: bool = False
    """Register it, and make it the champion if a patient-paired test on validation scores finds it better than the one there is."""
    required: bool = True
    """Whether a run may only begin if MLflow answers; false: it begins in any case, and what MLflow missed is told to it later."""
    tags: tuple[str, ...] = ()
    """Tags of your own for the run, KEY=VALUE each; those that the job sets itself win."""

    def __post_init__(self) -> None:
        _require(bool(self.experiment), "tracking.experiment", self.experiment, "a name")
        _require(
            not self.uri.startswith("file:") and "://" in self.uri,
            "tracking.uri",
            self.uri,
            "a database or a server (MLflow no longer keeps runs in plain files); use sqlite:///mlflow.db or http://HOST:5000",
        )
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.registered_model) is not None,
            "tracking.registered_model",
            self.registered_model,
            "up to 100 letters, digits, dots, dashes and underscores",
        )
        _require(
            self.log_model or not (self.register or self.promote),
            "tracking.log_model",
            self.log_model,
            "true with tracking.register or tracking.promote: a version is a logged model",
        )
        for tag in self.tags:
            _require(
                re.fullmatch(r"[\w\-. /]{1,250}=[^\x00-\x1f]*", tag) is not None,
                "tracking.tags",
                tag,
                "KEY=VALUE, a key of letters, digits and _-. /",
            )
        _require_plain("tracking", self)


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What the cluster's nodes cost, for the account of what a job cost."""

    prices: str = ""
    """URI of a table of prices (TOML, as infra/prices.toml, US dollars an hour); empty: that one, which travels with the code."""
    region: str = ""
    """Region whose prices hold; empty: what the nodes say (labels cxr-region, ray.io/availability-region), or the table's only one."""

    def __post_init__(self) -> None:
        _require_plain("cost", self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cost: CostConfig = field(default_factory=CostConfig)


def flatten(config: Config) -> dict[str, object]:
    """The run as dotted keys and plain values, as MLflow params and checkpoints hold it."""
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }
