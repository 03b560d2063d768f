"""The NIH ChestX-ray14 label table and official lists: reading, cleaning, the split by patient, and its audit.

Labels are a pyarrow Table, one row an image in the file's order: image_id (string), patient_id (int32), view, age
(int32, years, null where the file says more than 120), sex, follow_up (int32), findings (14 bools in the order of
`FINDINGS`). Its metadata carry `sha256` (of the unpacked CSV) and `label_version`.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from cxr_dist.data import texts
from cxr_dist.errors import ConfigError, DataError

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The fourteen findings, in NIH's order: the order of `findings` in every table and shard."""

NIH8 = (
    "Pneumothorax",
    "Mass",
    "Atelectasis",
    "Nodule",
    "Consolidation",
    "Pleural_Thickening",
    "Effusion",
    "Infiltration",
)
"""The notebooks' eight findings, in their order."""

LABEL_SETS: dict[str, tuple[str, ...]] = {"nih14": FINDINGS, "nih8": NIH8}
SPLITS = ("train", "validation", "test")
NO_FINDING = "No Finding"
MAX_AGE = 120
SEXES = ("M", "F")
VIEWS = ("PA", "AP")

LABELS_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.int32()),
        ("view", pa.string()),
        ("age", pa.int32()),
        ("sex", pa.string()),
        ("follow_up", pa.int32()),
        ("findings", pa.list_(pa.bool_(), len(FINDINGS))),
    ]
)

_COLUMNS = {
    "image_id": ("image index",),
    "findings": ("finding labels",),
    "follow_up": ("follow-up #", "follow-up"),
    "patient_id": ("patient id",),
    "age": ("patient age",),
    "sex": ("patient gender", "patient sex"),
    "view": ("view position",),
}
_KNOWN_CSV = {"dc1d2df67fdc1c5a7601d48699cda2b13dc2c4841488b4183dcf04884dbaca11": "v2020"}
_ALL_IMAGES = 112_120
_PNEUMONIA = {1353: "2017", 1431: "v2020"}
"""Pneumonia positives of the whole release, which tell the two label versions apart."""


def read_labels(data: bytes, name: str) -> pa.Table:
    """The label table from a `Data_Entry_2017*.csv` of either version, plain or gzipped.

    `name` is what errors call the file. Raises DataError for a missing or repeated column, an unknown finding, a
    duplicate image, an image named after another patient, a row longer or shorter than the header or unreadable (with its
    row number, the header being row 1) and an empty file.
    """
    text, digest = texts.decode(data, name)
    rows = texts.csv_rows(text, name)
    header = [cell.strip().lower() for cell in next(rows, [])]
    if not header:
        raise DataError(f"{name}: found an empty file, expected the NIH label CSV")
    at = {column: _column(header, names, name) for column, names in _COLUMNS.items()}
    width = max(index for index, cell in enumerate(header, start=1) if cell)  # NIH's first version ends in a comma
    columns: dict[str, list] = {column: [] for column in at}
    seen: dict[str, int] = {}
    codes: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < width or any(row[width:]):
            raise DataError(f"{name}: row {number}: found {len(row)} columns, expected the header's {width}")
        image_id = texts.image_name(row[at["image_id"]], f"{name}: row {number}")
        if seen.setdefault(image_id, number) != number:
            raise DataError(f"{name}: row {number}: {image_id} is already in row {seen[image_id]}; keep one of them")
        label = row[at["findings"]].strip()
        if label not in codes:
            codes[label] = _parse_findings(label, f"{name}: row {number}")
        columns["image_id"].append(image_id)
        columns["findings"].append(codes[label])
        columns["patient_id"].append(_patient(row[at["patient_id"]], image_id, name, number))
        columns["follow_up"].append(_whole_number(row[at["follow_up"]], "Follow-up #", name, number))
        columns["age"].append(_age(row[at["age"]], name, number))
        columns["sex"].append(_one_of(SEXES, row[at["sex"]], "Patient Gender", name, number))
        columns["view"].append(_one_of(VIEWS, row[at["view"]], "View Position", name, number))
    if not seen:
        raise DataError(f"{name}: found a header and no rows, expected one row an image")
    matrix = np.stack(columns["findings"])
    columns["findings"] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), len(FINDINGS))
    table = pa.table({field.name: columns[field.name] for field in LABELS_SCHEMA}, schema=LABELS_SCHEMA)
    version = _label_version(digest, matrix)
    return table.replace_schema_metadata({"sha256": digest, "label_version": version})


def read_list(data: bytes, name: str) -> list[str]:
    """The image names of an official list, in its order. Raises DataError for a duplicate, no name, or an empty list."""
    text, _ = texts.decode(data, name)
    seen: dict[str, int] = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        image_id = texts.image_name(line, f"{name}: line {number}")
        if seen.setdefault(image_id, number) != number:
            raise DataError(f"{name}: line {number}: {image_id} is already in line {seen[image_id]}; keep one of them")
    if not seen:
        raise DataError(f"{name}: found an empty file, expected one image name a line")
    return list(seen)


def findings_matrix(table: pa.Table) -> np.ndarray:
    """The findings column as bool [N, 14]."""
    flat = table.column("findings").combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).astype(bool).reshape(-1, len(FINDINGS))


def finding_columns(label_set: str) -> list[int]:
    """Positions in the 14 columns of a label set's findings, in the label set's order."""
    return [FINDINGS.index(finding) for finding in _label_set(label_set)]


def clean(labels: pa.Table, label_set: str) -> pa.Table:
    """The rows that a label set keeps: nih14 all; nih8 those without any of the six findings it drops."""
    dropped = [index for index, finding in enumerate(FINDINGS) if finding not in _label_set(label_set)]
    return labels.filter(pa.array(~findings_matrix(labels)[:, dropped].any(axis=1)))


def split_patients(
    labels: pa.Table, train_val: Sequence[str], test: Sequence[str], fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Row numbers (int64, ascending) of `labels` in train, validation and test; rows in neither list are in none.

    Test is the official list. A train_val patient goes to validation if a hash of (seed, patient) falls below
    `fraction`, so the side never depends on which other images are there. Raises DataError if a patient has images in
    both lists.
    """
    if both := set(train_val) & set(test):
        raise DataError(
            f"the official lists share {len(both)} images (e.g. {min(both)}), expected none; check that train_val_list.txt and test_list.txt are right"
        )
    ids = labels.column("image_id").to_numpy(zero_copy_only=False)
    patients = labels.column("patient_id").to_numpy()
    in_train_val = _member(ids, train_val)
    in_test = _member(ids, test)
    if shared := set(patients[in_train_val].tolist()) & set(patients[in_test].tolist()):
        raise DataError(
            f"{len(shared)} patients (e.g. {min(shared)}) have images in both official lists, expected none; use the official lists, which split by patient"
        )
    validation_patients = [p for p in set(patients[in_train_val].tolist()) if in_validation(p, fraction, seed)]
    in_validation_cut = in_train_val & np.isin(patients, validation_patients)
    masks = (in_train_val & ~in_validation_cut, in_validation_cut, in_test)
    return {split: np.flatnonzero(mask) for split, mask in zip(SPLITS, masks, strict=True)}


def in_validation(patient_id: int, fraction: float, seed: int) -> bool:
    """Whether a train_val patient is on the validation side of the seeded cut."""
    digest = hashlib.blake2b(f"{seed}:{patient_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def positives(labels: pa.Table, label_set: str) -> dict[str, int]:
    """Images that show each finding of the label set, in its order."""
    counts = findings_matrix(labels).sum(axis=0)
    return {finding: int(counts[FINDINGS.index(finding)]) for finding in _label_set(label_set)}


def audit(labels: pa.Table, splits: Mapping[str, np.ndarray], label_set: str, hashes: Mapping[str, str]) -> dict:
    """What can be said of a split before any training: counts, prevalence, shared patients, where the labels are from.

    `splits` maps a name to row numbers of `labels`; `hashes` names the SHA-256 of each source file. The result holds
    plain numbers and strings only.
    """
    metadata = {key.decode(): value.decode() for key, value in (labels.schema.metadata or {}).items()}
    result: dict = {"label_set": label_set}
    patients: dict[str, set[int]] = {}
    for split, rows in splits.items():
        part = labels.take(pa.array(rows))
        patients[split] = set(part.column("patient_id").to_pylist())
        counts = positives(part, label_set)
        result[split] = {
            "images": part.num_rows,
            "patients": len(patients[split]),
            "positives": counts,
            "prevalence": {f: round(n / part.num_rows, 6) if part.num_rows else None for f, n in counts.items()},
        }
    names = list(splits)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    result["patients_shared"] = sum(len(patients[a] & patients[b]) for a, b in pairs)
    result["label_version"] = metadata.get("label_version", "unknown")
    result["ages_missing"] = labels.column("age").null_count
    result["sha256"] = dict(hashes)
    return result


def _column(header: list[str], names: tuple[str, ...], file: str) -> int:
    found = [index for index, cell in enumerate(header) if cell in names]
    if len(found) > 1:
        raise DataError(
            f"{file}: row 1: found column {names[0]!r} {len(found)} times, expected it once; keep the right one"
        )
    if found:
        return found[0]
    near = difflib.get_close_matches(names[0], header, 1)
    hint = f" (nearest: {texts.shown(near[0])})" if near else ""
    raise DataError(f"{file}: row 1: found no column {names[0]!r}{hint}, expected the header of NIH's Data_Entry_2017")


def _parse_findings(label: str, where: str) -> np.ndarray:
    row = np.zeros(len(FINDINGS), bool)
    names = [name.strip() for name in label.split("|")]
    if names == [NO_FINDING]:
        return row
    for name in names:
        if name not in FINDINGS:
            near = difflib.get_close_matches(name, (*FINDINGS, NO_FINDING), 1, 0.0)[0]
            raise DataError(
                f"{where}: found finding {texts.shown(name)}, expected one of the fourteen or {NO_FINDING!r}; nearest: {near}"
            )
        row[FINDINGS.index(name)] = True
    return row


def _whole_number(cell: str, column: str, name: str, number: int) -> int:
    cell = cell.strip()
    if not re.fullmatch(r"\d{1,9}", cell):
        raise DataError(f"{name}: row {number}: found {texts.shown(cell)} in {column}, expected a whole number")
    return int(cell)


def _patient(cell: str, image_id: str, name: str, number: int) -> int:
    """The patient, who must be the one that NIH's image names begin with: the split goes by patient."""
    patient = _whole_number(cell, "Patient ID", name, number)
    named = re.fullmatch(r"(\d{8})_\d{3}\.png", image_id)
    if named and int(named[1]) != patient:
        raise DataError(
            f"{name}: row {number}: found patient {patient} for {image_id}, expected {int(named[1])}; mend the row"
        )
    return patient


def _one_of(known: tuple[str, ...], cell: str, column: str, name: str, number: int) -> str:
    """The cell, one of the known values or blank."""
    cell = cell.strip()
    if cell and cell not in known:
        raise DataError(f"{name}: row {number}: found {texts.shown(cell)} in {column}, expected {' or '.join(known)}")
    return cell


def _age(cell: str, name: str, number: int) -> int | None:
    """Whole years of `58`, `058Y`, `013M` or `001D`; None where blank or above MAX_AGE (NIH has a few like 412)."""
    cell = cell.strip()
    if not cell:
        return None
    match = re.fullmatch(r"(\d{1,4})([YMD]?)", cell)
    if not match:
        raise DataError(f"{name}: row {number}: found age {texts.shown(cell)}, expected years such as 58 or 058Y")
    years = int(match[1]) // {"": 1, "Y": 1, "M": 12, "D": 365}[match[2]]
    return years if years <= MAX_AGE else None


def _member(ids: np.ndarray, names: Sequence[str]) -> np.ndarray:
    wanted = set(names)
    return np.fromiter((image_id in wanted for image_id in ids), bool, len(ids))


def _label_version(digest: str, matrix: np.ndarray) -> str:
    if digest in _KNOWN_CSV:
        return _KNOWN_CSV[digest]
    if len(matrix) == _ALL_IMAGES:
        return _PNEUMONIA.get(int(matrix[:, FINDINGS.index("Pneumonia")].sum()), "unknown")
    return "unknown"


def _label_set(label_set: str) -> tuple[str, ...]:
    if label_set not in LABEL_SETS:
        raise ConfigError(f"data.label_set: found {label_set!r}, expected one of {', '.join(LABEL_SETS)}")
    return LABEL_SETS[label_set]
