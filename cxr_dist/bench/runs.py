"""What stages that train need: a dataset of the bench's images, a cluster of its own, and a config for a short run."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from cxr_dist import environment
from cxr_dist.bench.options import BenchOptions, load_images, write_release
from cxr_dist.config import Config
from cxr_dist.data.ingest import ingest

__all__ = ["cluster", "dataset", "run_config"]


@contextmanager
def cluster(options: BenchOptions) -> Iterator[None]:
    """A local Ray of `options.cpus` logical CPUs, ended with the block; one that is up already is used as it is."""
    environment.apply()
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=options.cpus, include_dashboard=True, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def dataset(options: BenchOptions, folder: Path, num_images: int) -> str:
    """URI of a dataset of pixel shards made from the bench's images; a fifth of the patients is its test list."""
    write_release(load_images(options, num_images), folder / "release")
    uri = str(folder / "dataset")
    data = dataclasses.replace(options.config.data, release=str(folder / "release"), uri=uri, encoding="pixels")
    ingest(dataclasses.replace(options.config, data=data))
    return uri


def run_config(
    options: BenchOptions, folder: Path, uri: str, *, name: str, workers: int, share: int = 16, **train: object
) -> Config:
    """A run with `share` images a rank in a step (the notebooks had 16), from random weights, without a test report."""
    base = options.config
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, uri=uri, encoding="pixels"),
        model=dataclasses.replace(base.model, weights="random"),
        train=dataclasses.replace(
            base.train,
            num_workers=workers,
            cpus_per_worker=0.5 if workers >= options.cpus else 1.0,
            global_batch=share * workers,
            patience=0,
            views=1,
            storage_path=str(folder / "runs"),
            **train,  # type: ignore[arg-type]
        ),
        evaluate=dataclasses.replace(base.evaluate, test=False, bootstrap=0),
        run=dataclasses.replace(base.run, name=name),
        tracking=dataclasses.replace(base.tracking, uri=f"sqlite:///{folder}/mlflow.db"),
    )
