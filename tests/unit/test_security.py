"""Nothing that lies in storage is executed, no file name in it leads out of its folder, nothing unpacks without end, and
what the code may not do stands nowhere in it. docs/security.md says which test shows which measure."""

import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torchvision
from ray._private import ray_constants
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from cxr_dist import cluster, writes
from cxr_dist.data import archives, nih, sidetables, tables
from cxr_dist.errors import DataError, InputError
from cxr_dist.evaluate import external
from cxr_dist.folders import private_folder
from cxr_dist.journal import MetricJournal
from cxr_dist.model import weights
from cxr_dist.predict.model import find_model
from cxr_dist.train.checkpoint import Checkpoints, load_checkpoint
from infra import audit
from infra.local import parts
from tests.releases import noise, png

ROOT = Path(__file__).resolve().parents[2]
CODE = [path for folder in ("cxr_dist", "jobs", "infra") for path in sorted((ROOT / folder).rglob("*.py"))]

PICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
PARQUET_READERS = ("cxr_dist/data/tables.py", "cxr_dist/data/pages.py", "cxr_dist/bench/decode.py")
"""Who may open Parquet: what checks its columns, what decides them itself, what has just written them."""


def faults(source: str, path: str) -> Iterator[str]:
    """What a file of code does that none may."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *names]
            yield from (f"import {name}" for name in names if name.split(".")[-1] in PICKLERS)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"(?<![\d.])0\.0\.0\.0(?![\d./])", node.value) or node.value == "::":
                yield f"binds to {node.value}"
        elif isinstance(node, ast.Call):
            yield from _call_faults(node, path)


def _call_faults(call: ast.Call, path: str) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rsplit(".", 1)[-1]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    loads = name == "torch.load" or last in ("get_state_dict", "load_state_dict_from_url")
    wrong = {
        "weights_only": loads and given.get("weights_only") != "True",
        "allow_pickle": given.get("allow_pickle", "False") != "False",
        "loader": name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in ast.unparse(call),
        "unsafe": last in ("unsafe_load", "full_load", "read_pickle", "mktemp"),
        "code": name in ("eval", "exec", "compile", "__import__"),
        "shell": given.get("shell", "False") != "False" or name in ("os.system", "os.popen"),
        "parquet": last in ("read_table", "ParquetFile", "read_parquet", "ParquetDataset")
        and name != "read_table"
        and not path.endswith(PARQUET_READERS),
    }
    yield from (f"{name}: {what}" for what, found in wrong.items() if found)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "Weights.V1.get_state_dict(check_hash=True)",
        "import pickle",
        "from ray import cloudpickle as c, x",
        "import joblib, os",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "serve(host='0.0.0.0')",
        "options = ['--host=0.0.0.0']",
        "listen('::')",
        "pd.read_parquet(path)",
        "pq.ParquetFile(path)",
        "tempfile.mktemp()",
    ],
)
def test_the_walk_finds(line: str) -> None:
    assert len(list(faults(line, "cxr_dist/x.py"))) == 1


def test_no_code_executes_or_opens_more_than_it_says() -> None:
    assert len(CODE) > 100
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text(), str(path))) for path in CODE}
    assert not {path: wrong for path, wrong in found.items() if wrong}


def test_no_file_that_starts_servers_opens_them_to_everybody() -> None:
    """Containers listen within their own network: test_deployments.py and test_kubernetes.py have what reaches it; what may
    come in to the AWS stack is test_aws_template.py's."""
    others = {ROOT / "infra" / "compose.yaml", ROOT / "infra" / "aws" / "stack.yaml"}
    others.update((ROOT / "infra" / "kubernetes").rglob("*.yaml"))
    everything = [ROOT / "ray-cluster.yaml", ROOT / "Makefile", ROOT / "README.md", *(ROOT / "infra").rglob("*.yaml")]
    files = [path for path in everything if path not in others]
    assert not [str(path) for path in files if "0.0.0.0" in path.read_text()]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The folder that a payload makes."""
    return tmp_path / "executed"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Payload], bytes]] = {
    "pickle": pickle.dumps,
    "saved": saved,
    "inside": lambda payload: saved({"format": 1, "tail": {"x": torch.ones(1)}, "state": {"y": payload}}),
}


def write_run(folder: Path, data: bytes) -> Path:
    """A run whose checkpoint is these bytes, as whoever may write there can make it: the index holds their SHA-256."""
    where = folder / "checkpoints" / "000000"
    where.mkdir(parents=True)
    (where / "000000001.pt").write_bytes(data)
    entry = {"index": 1, "epoch": 0, "file": "000000/000000001.pt", "bytes": len(data), "score": 0.5, "finished": True}
    index = {"format": 2, "checkpoints": [entry | {"sha256": hashlib.sha256(data).hexdigest()}]}
    (where / "index.json").write_text(json.dumps(index))
    (folder / "initial.pt").write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", PAYLOADS)
def test_no_loader_executes_what_a_checkpoint_holds(tmp_path: Path, trace: Path, kind: str) -> None:
    data = PAYLOADS[kind](Payload(trace))
    run = str(write_run(tmp_path / "run", data))

    def predicted() -> None:
        with find_model(run, "sqlite:///none.db"):
            pass

    loaders: list[Callable[[], object]] = [
        lambda: weights.initial(f"{run}/initial.pt", num_findings=2, seed=0),
        lambda: weights.load(f"{run}/checkpoints/000000/000000001.pt"),
        lambda: weights.restore(data, "initial.pt"),
        lambda: load_checkpoint(run),
        lambda: Checkpoints(run).load(Checkpoints(run).entries()[0]),
        predicted,
    ]
    for load in loaders:
        with pytest.raises(InputError, match=r"cannot be read as saved tensors .* expected a state dict"):
            load()
        assert not trace.exists()
    torch.load(io.BytesIO(data), weights_only=False) if kind != "pickle" else pickle.loads(data)
    assert trace.exists()  # it would have


def test_torchs_cache_is_not_executed_either(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(saved({"x": Payload(trace)}))
    with pytest.raises(InputError, match=r"model\.weights: found no way to download"):
        weights.initial("imagenet", num_findings=2, seed=0)
    assert not trace.exists()


def pickled_column(payload: Payload, wrap: Callable[[pa.Array], pa.Array] = lambda cells: cells) -> bytes:
    """A Parquet file with a column `path` that Ray's Arrow type unpickles when it is looked at."""
    cells = pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([pickle.dumps(payload)], pa.large_binary())
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": wrap(cells), "image_id": ["a.png"], "prob_Mass": [0.5]}), sink)
    return sink.getvalue()


def test_a_pickled_column_would_be_executed(trace: Path) -> None:
    pq.read_table(io.BytesIO(pickled_column(Payload(trace))))["path"].to_pylist()
    assert trace.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda cells: cells,
        lambda cells: pa.ListArray.from_arrays([0, 1], cells),
        lambda cells: pa.StructArray.from_arrays([cells], ["x"]),
        lambda cells: pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([cells], ["x"])),
    ],
)
def test_no_column_of_pickles_is_read_at_whatever_depth(trace: Path, wrap: Callable[[pa.Array], pa.Array]) -> None:
    with pytest.raises(pa.ArrowTypeError, match=r"column path of type .*expected plain values"):
        tables.read_table(pickled_column(Payload(trace), wrap))
    assert not trace.exists()


def test_no_table_of_storage_is_executed(tmp_path: Path, trace: Path) -> None:
    data = pickled_column(Payload(trace))
    (tmp_path / "row_groups.parquet").write_bytes(data)
    side = sidetables.SideTable(
        path="row_groups.parquet", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=1
    )
    with pytest.raises(DataError, match=r"cannot be read .*expected plain values"):
        sidetables.opened(str(tmp_path), side)
    labels = nih.read_labels(
        b"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\na.png,Mass,0,1,1,M,PA",
        "labels",
    )
    with pytest.raises(DataError, match=r"cannot be read .*expected plain values"):
        external.read_external(tmp_path / "row_groups.parquet", labels, ("Mass",))
    assert not trace.exists()


def archive(folder: Path, members: list[tuple[str, bytes]], start: bytes = b"") -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "images_001.tar.gz").write_bytes(gzip.compress(start + out.getvalue()))


def read(folder: Path) -> list[tuple[str, bytes]]:
    return list(archives.members(str(folder), "images_001.tar.gz"))


def test_an_archive_does_not_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ("images/a.png", png(noise(0, 64)))
    archive(tmp_path, [*((f"note{n}.txt", bytes(1 << 20)) for n in range(4)), image])
    assert read(tmp_path) == [("a.png", image[1])]
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 16)
    with pytest.raises(DataError, match=r"broken archive .more than .* bytes when unpacked"):
        read(tmp_path)
    archive(tmp_path, [(f"images/{n}.png", png(noise(n, 64))) for n in range(200)])  # 1 MB that is not packed further
    assert len(read(tmp_path)) == 200


def test_an_archive_of_names_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 100)
    archive(tmp_path, [(f"{n}.txt", b"") for n in range(100)])
    assert read(tmp_path) == []
    archive(tmp_path, [(f"{n}.txt", b"") for n in range(101)])
    with pytest.raises(DataError, match=r"broken archive .more than 100 members"):
        read(tmp_path)


def test_extended_headers_after_one_another_are_no_crash(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.size, header.type = 512, tarfile.XHDTYPE
    archive(tmp_path, [], (header.tobuf() + b"11 foo=bar\n".ljust(512, b"\0")) * 2000)
    with pytest.raises(DataError, match="broken archive"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../../stolen.txt", "/{}/stolen.txt", "a/../../../stolen.txt", "..\\stolen.txt"])
def test_kept_files_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    name = name.format(str(tmp_path).strip("/"))
    where = tmp_path / "run" / "unsent" / "0"
    (where / "0").mkdir(parents=True)
    entry = {"kind": "artifacts", "what": "x", "content": {"artifact_path": None}, "path": "x", "files": [name]}
    (where / "writes.json").write_text(json.dumps([entry | {"is_file": False}]))
    (tmp_path / "run" / "unsent" / "stolen.txt").write_text("planted")
    with pytest.raises(DataError, match=r"found the file name .*stolen\.txt', expected one in a folder"):
        writes.kept(str(where), tmp_path / "local")
    assert [path.parent.name for path in tmp_path.rglob("stolen.txt")] == ["unsent"]


def test_only_kept_artifacts_name_files_to_send(tmp_path: Path) -> None:
    where = tmp_path / "unsent" / "0"
    where.mkdir(parents=True)
    entry = {"kind": "artifacts", "what": "x", "content": {"artifact_path": None}, "path": "", "files": []}
    (where / "writes.json").write_text(json.dumps([entry | {"is_file": False}]))
    with pytest.raises(DataError, match="no write of ours"):  # MLflow would take it for the current folder
        writes.kept(str(where), tmp_path / "local")


@pytest.mark.parametrize("field", ["file", "scores"])
def test_a_checkpoint_index_names_nothing_outside_of_its_folder(tmp_path: Path, field: str) -> None:
    run = write_run(tmp_path / "run", b"x")
    index = run / "checkpoints" / "000000" / "index.json"
    found = json.loads(index.read_text())
    found["checkpoints"][0][field] = "000000/../../../victim"
    index.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"found the file name .*victim', expected OWNER/STEP\.pt"):
        Checkpoints(str(run)).entries()


def test_local_metrics_are_their_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0)
    try:
        MetricJournal(tmp_path / "j.jsonl", "http://127.0.0.1:1", "r").close(30)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        folder = private_folder("cxr-dist-x")
    finally:
        os.umask(old)
    assert (tmp_path / "j.jsonl").stat().st_mode & 0o777 == 0o600
    assert folder == private_folder("cxr-dist-x") == tmp_path / "cxr-dist-x"
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cxr-dist-y").symlink_to("elsewhere")  # what another user may have put there
    other = private_folder("cxr-dist-y")
    assert other.parent == tmp_path
    assert other.name.startswith("cxr-dist-y-")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert private_folder("cxr-dist-x") != folder


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_a_local_ray_listens_on_loopback(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    started: list[dict[str, Any]] = []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv(name, before or "")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    if before is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    cluster.connect()
    assert (os.environ[name], ray_constants.ENABLE_RAY_CLUSTER) == (after, after == "1")
    assert started[0]["address"] == "local"
    assert started[0].get("dashboard_host", "127.0.0.1") == "127.0.0.1"


def test_the_tracking_server_is_on_loopback_and_answers_to_its_own_names(tmp_path: Path) -> None:
    credentials = {"postgres_password": "planted-p", "s3_key": "k", "s3_secret": "planted-s"}
    part = parts.mlflow(tmp_path, {"mlflow": 5001, "postgres": 5002, "s3": 5003}, credentials)
    assert "--host=127.0.0.1" in part.command
    assert "--allowed-hosts=127.0.0.1:5001,localhost:5001" in part.command  # against rebinding of a browser's names
    assert "planted" not in " ".join(part.command)


FOUND = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]}
CLEAN = {"name": "b", "version": "1", "vulns": []}
UNKNOWN = {"name": "c", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "triaged", "code", "said"),
    [
        ([CLEAN], {}, 0, "audited: 1 packages"),
        ([CLEAN, FOUND], {}, 1, "a 1: PYSEC-1 CVE-1, mended in 2; not triaged"),
        ([CLEAN, FOUND], {"CVE-1": "not used here"}, 0, "a 1: PYSEC-1 CVE-1, mended in 2; not used here"),
        ([UNKNOWN, UNKNOWN], {}, 0, "not audited: PyPI could not be asked about any of 2 packages"),
        ([CLEAN, UNKNOWN], {}, 0, "not audited: c: PyPI knows nothing of this version"),
    ],
)
def test_an_audit_says_what_it_did_not_see(
    dependencies: list[dict[str, Any]], triaged: dict[str, str], code: int, said: str
) -> None:
    found, lines = audit.verdict(dependencies, triaged)
    assert (found, lines[0]) == (code, said)


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "said"),
    [
        (json.dumps({"dependencies": [CLEAN]}), "warning", 0, "audited: 1 packages"),
        ("", "Traceback\nrequests.exceptions.ProxyError: refused", 0, "not audited: no network"),
        ("", "No module named pip_audit", 1, "pip-audit failed: No module named pip_audit"),
    ],
)
def test_an_audit_without_network_goes_on_and_another_failure_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdout: str, stderr: str, code: int, said: str
) -> None:
    done = subprocess.CompletedProcess([], 1, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert audit.main("requirements.lock") == code
    assert said in "".join(capsys.readouterr())
