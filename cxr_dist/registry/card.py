"""The model card: what a model is for, what it was made from, how it did and where it fails, in Markdown.

After Mitchell et al., Model Cards for Model Reporting, 2019. Numbers are those of the evaluation ("cxr-dist/evaluation/1")
and of the model's own `model.json`; what was not evaluated is said to be so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cxr_dist.evaluate.thresholds import RULES
from cxr_dist.registry.package import CARD, Contents
from cxr_dist.serve.model import DEFAULT_RULE

__all__ = ["LONGEST", "About", "model_card", "recipe", "shortened"]

LONGEST = 5000
"""Characters that MLflow keeps of a version's description."""

NOT_CLINICAL = (
    "**For research. Not a medical device: not for diagnosis, triage or any decision about a patient.** It has not been "
    "validated at any site, and its labels were not read from the images by radiologists."
)
LIMITS = (
    "Labels were mined from radiology reports (Wang et al. 2017): they are wrong for a part of the images that no figure "
    "here can see, and what a report does not mention counts as absent.",
    "All images are of one institution, adults and children, PA and AP, in 8 bits; other devices, processing and "
    "populations are untested.",
    "A finding's probability speaks of the prevalence of the validation split. The official test list is sicker, and so may be "
    "another population: calibration does not carry over to it by itself.",
    "Flags cut the network's own probability (raw), as the report does; calibration keeps the order of images, so it "
    "moves no flag.",
)
RANDOM = (
    "> **RANDOM WEIGHTS. This model was trained from random weights, not from ImageNet: it is a demonstration of the "
    "machinery. Its outputs mean nothing about radiographs.**"
)


@dataclass(frozen=True, kw_only=True)
class About:
    """The run that a model is from, for people; empty where it is not known."""

    run: str = ""
    run_id: str = ""
    label_set: str = ""
    split: str = ""
    commit: str = ""
    recipe: str = ""


def recipe(config: Mapping[str, Any]) -> str:
    """What was trained and how, in one line, of dotted keys and values as `run.json` has them."""
    return (
        f"{config.get('model.trainable')} trained, batch-norm {config.get('model.batch_norm')}, {config.get('model.pooling')} "
        f"pooling; {config.get('optimizer.name')} {config.get('optimizer.lr')}, batch {config.get('train.global_batch')}, at most "
        f"{config.get('train.epochs')} epochs, seed {config.get('train.seed')}"
    )


def model_card(name: str, found: Contents, about: About, evaluation: Mapping[str, Any] | None) -> str:
    """The card of a model that will be registered as `name`."""
    facts, model = found.facts, found.config
    size = facts["size"]
    parts = [f"# {name}: {facts['model_version']}"]
    if found.origin == "random":
        parts.append(RANDOM)
    parts += [NOT_CLINICAL, "## Model"]
    parts.append(
        f"DenseNet121 over grey radiographs of {size} × {size} pixels ({facts['pixels_version']}), {len(facts['findings'])} "
        f"independent findings: {', '.join(facts['findings'])}. Starting weights: {found.origin}; everything before "
        f"{model['trainable']} is frozen as it came. {about.recipe or 'Recipe: unknown'}. Checkpoint of epoch {found.epoch}, chosen "
        f"by validation mean AUROC{'' if found.score is None else f' ({found.score:.4f})'}."
    )
    parts += ["## Data", _data(found, about), "## Results", _results(evaluation)]
    parts += ["## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
    parts += ["## Operating points and calibration", _points(found)]
    parts += ["## Use", _use(name, size)]
    return "\n\n".join(parts) + "\n"


def shortened(card: str) -> str:
    """The card as MLflow's description holds it; one too long ends with where the whole of it is."""
    if len(card) <= LONGEST:
        return card
    rest = f"\n\n… the whole card is {CARD} among the model's artifacts.\n"
    return card[: LONGEST - len(rest)].rsplit("\n", 1)[0] + rest


def _data(found: Contents, about: About) -> str:
    validation = found.validation
    count = "" if validation is None else f", validation {len(validation):,} images"
    made = [f"run {about.run} ({about.run_id})"] if about.run else []
    made += [f"commit {about.commit[:12]}"] if about.commit else []
    return (
        f"NIH ChestX-ray14, label set {about.label_set or 'unknown'}; split: {about.split or 'unknown'}{count}. "
        f"Dataset's manifest {found.manifest_sha256[:12]}. {'; '.join(made) or 'The run is unknown'}. No "
        "patient is in two of its splits; what the starting weights were trained on is another matter."
    )


def _results(evaluation: Mapping[str, Any] | None) -> str:
    """Discrimination of each finding, and how the default rule's flags did."""
    if not evaluation:
        return "Not evaluated: no report of this checkpoint was at hand when the model was registered."
    rows = evaluation.get("discrimination", {})
    points = evaluation.get("operating_points", {}).get(DEFAULT_RULE, {})
    flags = {**points.get("findings", {}), "mean": points.get("mean", {})}
    told = (
        f"{evaluation['split'].capitalize()} split: {evaluation['n_images']:,} images of {evaluation['n_patients']:,} patients. "
        "In brackets 95 % intervals that resample patients."
    )
    if evaluation["split"] != "test":
        told += " **The checkpoint was chosen on this split: these figures are optimistic.**"
    lines = ["| finding | positives | AUROC | average precision | sensitivity | specificity |", "| --- " * 6 + "|"]
    for finding, row in rows.items():
        flag = flags.get(finding, {})
        values = [row.get("auroc"), row.get("average_precision"), flag.get("sensitivity"), flag.get("specificity")]
        positives = row.get("positives")
        count = "" if positives is None else f"{positives:,}"
        lines.append("| " + " | ".join([finding.replace("_", " "), count, *map(_value, values)]) + " |")
    return told + "\n\n" + "\n".join(lines)


def _points(found: Contents) -> str:
    thresholds = found.facts["thresholds"]
    if found.validation is None:
        return "None and none: the checkpoint has no validation scores with it. Flags are empty, calibrated is raw."
    lines = ["| finding | " + " | ".join(thresholds) + " | calibration |", "| --- " * (len(thresholds) + 2) + "|"]
    for finding in found.facts["findings"]:
        values = [points[finding] for points in thresholds.values()]
        curve = found.facts["calibration"]["findings"][finding]
        shown = ["–" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {finding.replace('_', ' ')} | {' | '.join(shown)} | {curve['kind']} |")
    rules = "; ".join(f"{rule}: {RULES[rule]}" for rule in thresholds if rule in RULES)
    fitted = found.facts["calibration"]["fitted_on"]
    return (
        f"Chosen and fitted on the {fitted}. Flags are of `{DEFAULT_RULE}` unless the parameter `rule` says another. {rules}."
        "\n\n" + "\n".join(lines)
    )


def _value(value: Mapping[str, Any] | None) -> str:
    """A figure with its interval; a dash where it is undefined."""
    if not value or value.get("value") is None:
        return "–"
    if value.get("lower") is None or value.get("upper") is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['lower']:.3f}, {value['upper']:.3f}]"


def _use(name: str, size: int) -> str:
    return (
        f'`mlflow.pyfunc.load_model("models:/{name}@champion").predict({{"image": [png_bytes, …]}})`; input and output: the '
        f"signature. It decodes, scales to {size} × {size} and normalises by itself; nothing is unpickled."
    )
