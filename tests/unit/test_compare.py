"""Models on the same images: known winners, the notebooks' table against scikit-learn, and tables that do not fit."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import classification_report

from cxr_dist.compare.classification import AVERAGES, CHOSEN_HERE, classify, half, own, swept
from cxr_dist.compare.judge import Entry, judge
from cxr_dist.compare.page import html, markdown
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate.metrics import auroc
from cxr_dist.evaluate.thresholds import fit
from tests.comparing import FINDINGS, noised, table


def judged(*entries: Entry, **changes) -> dict:
    return judge(entries, **{"bootstrap": 200, "seed": 0} | changes)[0]


def entry(name: str, scores, validation=None) -> Entry:
    return Entry(name=name, scores=scores, validation=validation)


def decisions(result: dict, name: str) -> dict[str, str]:
    return {finding: one["decision"] for finding, one in result["differences"][name]["auroc"].items()}


def test_the_same_scores_tie_at_exactly_nothing_with_p_one() -> None:
    result = judged(entry("a", table()), entry("b", table()))
    for one in result["differences"]["b"]["auroc"].values():
        assert one["difference"] == {"value": 0.0, "lower": 0.0, "upper": 0.0}
        assert one["p"] == one["p_holm"] == 1.0
        assert one["decision"] == "tie"
    assert all(one["p"] == 1.0 for one in result["differences"]["b"]["delong"]["findings"].values())
    assert "b has the very scores of a" in result["cautions"]


def test_noise_loses_exactly_where_it_is() -> None:
    result = judged(entry("a", table()), entry("b", noised(table(), "Mass")))
    assert decisions(result, "b") == {"Effusion": "tie", "Mass": "loss", "Nodule": "tie", "mean": "loss"}
    assert result["differences"]["b"]["auroc_counts"] == {"win": 0, "loss": 1, "tie": 2, "undecided": 0}


def test_the_reference_is_who_the_others_are_held_against() -> None:
    entries = entry("a", table()), entry("b", noised(table(), "Mass")), entry("c", table())
    result = judged(*entries, reference="b")
    assert set(result["differences"]) == {"a", "c"}
    assert decisions(result, "a")["Mass"] == "win"
    one = result["differences"]["a"]["auroc"]["Mass"]
    found = result["discrimination"]
    assert one["difference"]["value"] == found["a"]["Mass"]["auroc"]["value"] - found["b"]["Mass"]["auroc"]["value"]


def test_scores_put_through_a_rising_function_tie() -> None:
    scores = table()
    bent = dataclasses.replace(scores, probabilities_NK=scores.probabilities_NK**0.5)
    result = judged(entry("a", scores), entry("b", bent))
    assert set(decisions(result, "b").values()) == {"tie"}
    assert {one["difference"]["value"] for one in result["differences"]["b"]["auroc"].values()} == {0.0}
    assert result["models"]["b"]["same_scores_as"] == []


def test_rows_and_columns_may_come_in_any_order() -> None:
    scores = table()
    mixed = scores.select(np.random.default_rng(3).permutation(len(scores))).with_findings(FINDINGS[::-1])
    assert set(decisions(judged(entry("a", scores), entry("b", mixed)), "b").values()) == {"tie"}


def test_every_number_of_a_model_is_its_own() -> None:
    scores, other = table(), noised(table(), "Mass")
    result = judged(entry("a", scores), entry("b", other))
    for name, of in (("a", scores), ("b", other)):
        for k, finding in enumerate(FINDINGS):
            expected = auroc(of.probabilities_NK[:, k], of.labels_NK[:, k])
            assert result["discrimination"][name][finding]["auroc"]["value"] == pytest.approx(expected, abs=1e-12)


def test_the_classification_report_is_scikit_learns() -> None:
    scores = table(300)
    scores.labels_NK[:40] = False
    chosen = {"Effusion": 0.3, "Mass": 0.9995, "Nodule": 0.05}  # Mass is never called
    rows = classify(scores, chosen)
    called = scores.probabilities_NK >= np.array(list(chosen.values()))
    expected = classification_report(scores.labels_NK, called, target_names=FINDINGS, output_dict=True, zero_division=0)
    assert list(rows) == [*FINDINGS, *AVERAGES]
    for name, row in rows.items():
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[ours] == pytest.approx(expected[name][theirs], abs=1e-9), (name, ours)
        assert row["support"] == expected[name]["support"]


def test_a_finding_without_positives_is_in_no_average() -> None:
    scores = table()
    scores.labels_NK[:, 1] = False
    rows = classify(scores, half(scores).values)
    assert rows["Mass"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    rest = classify(scores.with_findings(("Effusion", "Nodule")), half(scores).values)
    assert {name: rows[name] for name in AVERAGES} == {name: rest[name] for name in AVERAGES}
    scores.labels_NK[:] = False
    assert {row["support"] for row in classify(scores, half(scores).values).values()} == {0}


def test_thresholds_are_each_models_own_from_validation() -> None:
    scores, fitted = table(), table(150, split="validation", first=5000)
    found = own(scores, fitted, "f1")
    assert found.values == {finding: one["f1"] for finding, one in fit(fitted).items()}
    assert "its own validation scores, 150 images" in found.chosen_on
    result = judged(entry("a", scores, fitted), entry("b", noised(scores, "Mass")), rule="f1")
    models = result["classification"]["own"]["models"]
    assert models["a"]["thresholds"] == found.values
    assert set(models["b"]["thresholds"].values()) == {0.5}
    assert "no validation scores of b: its own thresholds are 0.5" in result["cautions"]


def test_findings_that_validation_does_not_define_have_a_half() -> None:
    fitted = table(150, split="validation", first=5000)
    fitted.labels_NK[:, 2] = False
    found = own(table(), fitted.with_findings(("Mass", "Nodule")), "youden")
    assert found.values["Effusion"] == found.values["Nodule"] == 0.5
    assert "0.5 for Effusion, Nodule" in found.chosen_on


def test_the_shared_threshold_by_hand() -> None:
    scores = table(4, findings=("Mass",))
    four = dataclasses.replace(
        scores,
        probabilities_NK=np.array([[0.105], [0.305], [0.605], [0.905]]),
        labels_NK=np.array([[False], [True], [False], [True]]),
    )
    # called from 0.31 to 0.60: one of two, one of two; from 0.11 to 0.30: both, and one of two: 0.5 away. From 0.61
    # to 0.90: one of two and none: 0.5 away as well, and of equals the highest is taken
    found = swept(four)
    assert found.values == {"Mass": 0.90}
    assert found.chosen_on == CHOSEN_HERE
    four.labels_NK[:] = True
    assert swept(four) is None


def test_what_has_seen_the_labels_stands_under_that_name_alone() -> None:
    result = judged(entry("a", table()), entry("b", noised(table(), "Mass")))
    assert CHOSEN_HERE in result["classification"]["chosen_here"]["label"]
    for origin in ("own", "half"):
        assert CHOSEN_HERE not in json.dumps(result["classification"][origin])


def test_images_that_not_all_have_scored_are_an_error_unless_the_others_are_asked_for() -> None:
    scores = table()
    fewer = scores.select(np.arange(len(scores)) >= 6)
    with pytest.raises(
        DataError, match=r"b lacks 6 that another has \(first '00000000_000.png'\).*the 234 that all have"
    ):
        judged(entry("a", scores), entry("b", fewer))
    result = judged(entry("a", scores), entry("b", fewer), common=True)
    assert (result["n_images"], result["models"]["a"]["n_left_out"], result["models"]["b"]["n_left_out"]) == (234, 6, 0)
    assert "a: 6 of its 240 images are not judged, as others lack them" in result["cautions"]
    with pytest.raises(DataError, match="none that all models have scored"):
        judged(entry("a", scores), entry("b", table(first=9000)), common=True)


def test_a_finding_that_one_model_lacks_is_shown_and_in_no_mean() -> None:
    scores = table()
    less = scores.with_findings(("Effusion", "Nodule"))
    result = judged(entry("a", less), entry("b", scores))
    assert result["findings"] == ["Effusion", "Nodule", "Mass"]
    assert result["shared_findings"] == ["Effusion", "Nodule"]
    assert "Mass" not in result["discrimination"]["a"]
    assert result["discrimination"]["b"]["Mass"]["auroc"]["value"] is not None
    means = {name: result["discrimination"][name]["mean"]["auroc"] for name in ("a", "b")}
    assert means["a"] == means["b"]
    assert result["differences"]["b"]["auroc"]["mean"]["b"]["value"] == means["a"]["value"]
    assert "a does not score Mass" in " ".join(result["cautions"])
    assert "| Mass | – | 0." in markdown(result)
    with pytest.raises(DataError, match="none that all models score"):
        judged(entry("a", scores.with_findings(("Mass",))), entry("b", less))


def test_all_means_are_over_the_findings_that_all_models_score() -> None:
    scores = table()
    entries = (
        entry("a", scores),
        entry("b", noised(scores, "Mass")),
        entry("c", scores.with_findings(("Effusion", "Nodule"))),
    )
    result = judged(*entries)
    pair = result["differences"]["b"]["auroc"]
    assert set(pair) == {*FINDINGS, "mean"}
    assert pair["Mass"]["decision"] == "loss"
    means = [result["discrimination"][name]["mean"]["auroc"]["value"] for name in "ab"]
    assert pair["mean"]["difference"]["value"] == means[1] - means[0] == 0.0


def test_three_models_without_a_finding_that_all_have() -> None:
    pairs = [("Effusion", "Mass"), ("Mass", "Nodule"), ("Effusion", "Nodule")]
    entries = [entry("abc"[i], table().with_findings(pair)) for i, pair in enumerate(pairs)]
    with pytest.raises(DataError, match="none that all models score"):
        judged(*entries)


def test_other_labels_are_refused() -> None:
    scores = table()
    other = dataclasses.replace(scores, labels_NK=scores.labels_NK.copy())
    other.labels_NK[7, 1] ^= True
    with pytest.raises(DataError, match=r"b and a: .*1 labels that differ \(first Mass of '00000007_000.png'\)"):
        judged(entry("a", scores), entry("b", other))


@pytest.mark.parametrize(
    ("entries", "changes", "sentence"),
    [
        (("a",), {}, "found 1, expected at least two"),
        (("a", "a"), {}, "two that are called 'a'"),
        (("a", "b"), {"reference": "c"}, "expected one of a, b"),
        (("a", "b"), {"rule": "best"}, "expected one of youden"),
    ],
)
def test_what_cannot_be_asked_for(entries: tuple[str, ...], changes: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        judged(*(entry(name, table()) for name in entries), **changes)


def test_splits_do_not_mix_and_thresholds_do_not_see_what_they_are_judged_on() -> None:
    with pytest.raises(InputError, match="b: found scores of split validation, expected test"):
        judged(entry("a", table()), entry("b", table(split="validation")))
    with pytest.raises(DataError, match="b: thresholds: 240 images are both"):
        judged(entry("a", table()), entry("b", table(), table(split="validation")))


def test_too_few_resamples_decide_nothing_and_one_patient_neither() -> None:
    result = judged(entry("a", table()), entry("b", noised(table(), "Mass")), bootstrap=20)
    assert set(decisions(result, "b").values()) == {None}
    assert result["differences"]["b"]["auroc_counts"]["undecided"] == 3
    one = dataclasses.replace(table(), patient_ids=np.ones(240, np.int64))
    result = judged(entry("a", one), entry("b", noised(one, "Mass")))
    assert result["differences"]["b"]["auroc"]["Mass"]["difference"]["lower"] is None
    assert "one patient" in result["differences"]["b"]["auroc"]["Mass"]["reason"]


def test_the_result_is_plain_json_and_names_stay_text() -> None:
    name = "<script>alert(1)</script>|*x*"
    scores = dataclasses.replace(noised(table(), "Mass"), note="<b>seen</b>")
    result = judged(entry(name, table()), entry("b", scores), reference=name)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    page = html(result, {}, ["python <jobs>"])
    assert "<script" not in page
    assert "<b>seen" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|*x*" in page
    text = markdown(result)
    assert "<script" not in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|\*x\*" in text
