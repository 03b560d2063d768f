"""A comparison from its beginning to its files, and, if asked, to MLflow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cxr_dist.compare.figures import difference_figure, roc_figure
from cxr_dist.compare.judge import judge
from cxr_dist.compare.page import html, markdown
from cxr_dist.compare.sources import read_entries
from cxr_dist.config import Config
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.evaluate.loading import read_labels
from cxr_dist.evaluate.plots.panels import save
from cxr_dist.experiment import absolute_uri, create_run, no_answer
from cxr_dist.scrub import scrub

__all__ = ["compare_models", "track"]


def compare_models(
    config: Config,
    models: Sequence[str],
    *,
    validation: Sequence[str] = (),
    reference: str = "",
    rule: str = "youden",
    split: str = "test",
    common: bool = False,
    out: str | Path,
    command: str = "",
) -> dict[str, Any]:
    """Compare models (`sources` says what may be named) and write the comparison to `out`; what compare.json holds.

    Files: compare.json, compare.md, compare.html, and in figures roc_overlay and auroc_difference as PNG and SVG.
    Raises InputError for models that cannot be read or compared.
    """
    if len(models) < 2:
        raise ConfigError(
            f"models: found {len(models)}, expected at least two; jobs/evaluate.py judges one model by itself"
        )
    result, entries = judge(
        read_entries(config, models, validation, split),
        reference=reference,
        rule=rule,
        common=common,
        bootstrap=config.evaluate.bootstrap,
        seed=config.evaluate.bootstrap_seed,
    )
    labels = read_labels(config.data)
    metadata = {} if labels is None else labels.schema.metadata or {}
    result["labels"] = {key.decode(): value.decode() for key, value in metadata.items()}
    result["command"] = scrub(command)
    if split == "test" and not config.data.test_list:
        result["cautions"].append("the images were not held to the official test list (data.test_list)")
    folder = Path(out)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pictures = {
        "roc_overlay": save(roc_figure(entries, result), folder / "figures", "roc_overlay"),
        "auroc_difference": save(difference_figure(result), folder / "figures", "auroc_difference"),
    }
    (folder / "compare.md").write_text(markdown(result), encoding="utf-8")
    page = html(result, pictures, [result["command"]] if command else [])
    (folder / "compare.html").write_text(page, encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return result


def track(config: Config, result: dict[str, Any], out: str | Path) -> str:
    """Keep a comparison as an MLflow run of its own; the run's id. InputError if MLflow does not take it."""
    from mlflow import MlflowClient  # seconds that an untracked comparison does not take
    from mlflow.exceptions import MlflowException

    uri = absolute_uri(config.tracking.uri)
    reason = no_answer(uri)
    if reason:
        raise InputError(f"tracking.uri: {scrub(reason)}; the comparison is in {out}")
    names = list(result["models"])
    try:
        client = MlflowClient(uri)
        run_id = create_run(
            client, uri, config.tracking.experiment, config.run.name or f"compare {' · '.join(names)}"[:250]
        )
        status = "FAILED"
        try:
            tags = {"job": "compare", "reference": result["reference"], "split": result["split"]}
            for key, value in tags.items():
                client.set_tag(run_id, key, scrub(value))
            for number, (name, one) in enumerate(result["models"].items()):
                client.log_param(run_id, f"model_{number}", scrub(f"{name}: {one['origin']}")[:6000])
            for key, number_of in metrics(result).items():
                client.log_metric(run_id, key, number_of)
            client.log_artifacts(run_id, str(out))
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    except (MlflowException, OSError) as error:
        raise InputError(
            f"tracking.uri: MLflow at {scrub(uri)} does not take the comparison ({scrub(' '.join(str(error).split()))[:300]}); "
            f"it is in {out}"
        ) from None
    return run_id


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """What the run's metrics are: mean AUROC of model i as model_i/auroc_mean, and its difference, wins and losses."""
    found: dict[str, float | None] = {}
    for number, (name, one) in enumerate(result["discrimination"].items()):
        found[f"model_{number}/auroc_mean"] = one["mean"]["auroc"]["value"]
        if name in result["differences"]:
            difference = result["differences"][name]
            found[f"model_{number}/auroc_mean_difference"] = difference["auroc"]["mean"]["difference"]["value"]
            found |= {f"model_{number}/{kind}": float(count) for kind, count in difference["auroc_counts"].items()}
    return {key: value for key, value in found.items() if value is not None}
