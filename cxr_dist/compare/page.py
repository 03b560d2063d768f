"""compare.html and compare.md: several models side by side, as one page that needs nothing else, and as text.

Names come from file names and people: the page escapes them, and so does the text where Markdown would take them for more.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from cxr_dist.compare.figures import model_colour
from cxr_dist.evaluate.inline import inline_figure
from cxr_dist.evaluate.plots.panels import Picture

__all__ = ["html", "markdown", "summary"]

_ALT = {
    "roc_overlay": "ROC curves of each finding, one for each model",
    "auroc_difference": "Differences of AUROC from the reference, with intervals",
}


def html(result: Mapping[str, Any], pictures: Mapping[str, Picture], commands: Sequence[str] = ()) -> str:
    """The page of a compare.json."""
    names = list(result["models"])
    return _template().render(
        r=result,
        names=names,
        colours={name: model_colour(number) for number, name in enumerate(names)},
        figures={name: inline_figure(picture, _ALT[name]) for name, picture in pictures.items()},
        commands=commands,
        css=_css(),
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a compare.json as Markdown."""
    names = list(result["models"])
    lines = [
        "# Comparison of models",
        "",
        f"{result['split']} split: {result['n_images']:,} images of {result['n_patients']:,} patients. Reference: "
        f"{_cell(result['reference'])}.",
        "",
        *[f"- {_cell(text)}" for text in result["cautions"]],
        *["", "## AUROC (95 % interval over patients)", ""],
        *_row(["finding", *names]),
        "|---" + "|--:" * len(names) + "|",
    ]
    for finding in [*result["findings"], "mean"]:
        found = [result["discrimination"][name].get(finding) for name in names]
        lines += _row([finding, *(_value(one and one["auroc"]) for one in found)])
    for name, one in result["differences"].items():
        lines += [
            "",
            f"## {_cell(name)} against {_cell(result['reference'])}",
            "",
            f"Decided by {one['decided_by']}.",
            "",
        ]
        lines += _row(["finding", "difference of AUROC", "p", "p (Holm)", "decision", f"p ({one['delong']['label']})"])
        lines.append("|---|--:|--:|--:|---|--:|")
        for finding, difference in one["auroc"].items():
            beside = one["delong"]["findings"].get(finding)
            cells = [_value(difference["difference"], signed=True), _p(difference["p"]), _p(difference["p_holm"])]
            said = difference["decision"] or difference["reason"] or "–"
            lines += _row([finding, *cells, said, _p(beside and beside["p"])])
        counts = one["auroc_counts"]
        lines += [
            "",
            f"Wins {counts['win']}, losses {counts['loss']}, ties {counts['tie']}, undecided {counts['undecided']}.",
        ]
    for table in result["classification"].values():
        lines += [
            "",
            f"## Classification report: {_cell(table['label'])}",
            "",
            *_classification(table, result["split"]),
        ]
    return "\n".join(lines) + "\n"


def summary(result: Mapping[str, Any]) -> str:
    """AUROC of every model by finding, and how the differences were decided, for a terminal."""
    names = list(result["models"])
    heads = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    rows = [["finding", *heads]]
    for finding in [*result["findings"], "mean"]:
        cells = []
        for name in names:
            found = result["discrimination"][name].get(finding)
            value = found["auroc"]["value"] if found else None
            other = result["differences"].get(name, {}).get("auroc", {}).get(finding, {})
            mark = {"win": " +", "loss": " -", "tie": " ="}.get(other.get("decision"), "")
            cells.append((f"{value:.3f}" if value is not None else "-") + mark)
        rows.append([finding, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(
        f"{result['split']} split: {result['n_images']:,} images of {result['n_patients']:,} patients; + better, - worse, "
        f"= tied against {result['reference']}, by the paired patient bootstrap"
    )
    return "\n".join([*lines, *(f"note: {text}" for text in result["cautions"])])


def _classification(table: Mapping[str, Any], split: str) -> list[str]:
    models = table["models"]
    if not models:
        return ["No finding has both classes."]
    lines = [f"- {_cell(name)}: {_cell(one['chosen_on'])}" for name, one in models.items()] + [""]
    lines += _row(["finding", *(f"{measure} {name}" for name in models for measure in ("P", "R", "F1")), "support"])
    lines.append("|---" + "|--:" * (3 * len(models) + 1) + "|")
    first = next(iter(models.values()))["rows"]
    for finding, row in first.items():
        cells = [_number(one["rows"][finding][m]) for one in models.values() for m in ("precision", "recall", "f1")]
        lines += _row([finding, *cells, f"{row['support']:,}"])
    return lines


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(_cell(cell) for cell in cells) + " |"]


def _cell(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _value(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if value is None or value["value"] is None:
        return "–"
    shown = [
        f"{value[key]:{'+' if signed else ''}.3f}" for key in ("value", "lower", "upper") if value[key] is not None
    ]
    return shown[0] + (f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else "")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cxr_dist.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "words": lambda name: name.replace("_", " "),
        "value": _value,
        "signed": functools.partial(_value, signed=True),
        "p": _p,
        "number": _number,
        "sentence": lambda text: text[:1].upper() + text[1:],
    }
    return environment.get_template("compare.html.j2")


def _css() -> Markup:
    style = resources.files("cxr_dist.evaluate").joinpath("templates/report.css").read_text(encoding="utf-8")
    return Markup(style)  # noqa: S704 - a file of this package
