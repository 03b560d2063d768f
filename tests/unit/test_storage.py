"""Storage: what is read is what was put, writes are whole or absent, and only transient faults are tried again."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import fs

from cxr_dist import storage
from cxr_dist.errors import InputError

S3 = "s3://bucket/nih"
GS = "gs://bucket/nih"


def failing(*errors: Exception):
    """An operation that raises the errors in turn and then gives 'done'; `calls` counts."""
    left = list(errors)

    def operation() -> str:
        operation.calls += 1  # type: ignore[attr-defined]
        if left:
            raise left.pop(0)
        return "done"

    operation.calls = 0  # type: ignore[attr-defined]
    return operation


def test_local_round_trip_by_path_and_by_file_uri(tmp_path):
    uri = storage.join(str(tmp_path), "a dir", "x.bin")
    storage.put_atomic(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(f"file://{tmp_path}/a%20dir/x.bin") == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.size(uri) == 10
    assert storage.open_input(uri).read_at(2, 1) == b"12"
    assert storage.exists(uri)
    assert storage.exists(str(tmp_path))
    assert not storage.exists(uri + "x")


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.put_atomic("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute(S3) == S3


def test_join_keeps_the_query_at_the_end():
    assert storage.join("s3://b/x/?region=eu", "train/", "p.parquet") == "s3://b/x/train/p.parquet?region=eu"
    assert storage.join("/", "x") == "/x"
    assert storage.join("rel", "", "x") == "rel/x"


def test_listing_is_sorted_relative_and_recursive_if_asked(tmp_path):
    for name in ("b/2", "b/c/3", "a"):
        storage.put_atomic(storage.join(str(tmp_path), name), name.encode())
    assert storage.list_files(str(tmp_path)) == [("a", 1), ("b/2", 3), ("b/c/3", 5)]
    assert storage.list_files(str(tmp_path), recursive=False) == [("a", 1)]
    assert storage.list_files(str(tmp_path / "none")) == []


def test_a_scan_says_when_files_were_written_and_folders_are_listed(tmp_path):
    for name in ("b/2", "b/c/3", "a", ".hidden"):
        storage.put_atomic(storage.join(str(tmp_path), name), name.encode())
        os.utime(tmp_path / name, (5.5, 5.5))
    assert storage.scan(str(tmp_path)) == [(".hidden", 7, 5.5), ("a", 1, 5.5), ("b/2", 3, 5.5), ("b/c/3", 5, 5.5)]
    assert storage.list_folders(str(tmp_path)) == ["b"]
    assert storage.list_folders(str(tmp_path / "none")) == []


def test_only_folders_without_a_file_are_deleted_as_empty(tmp_path):
    storage.put_atomic(str(tmp_path / "x" / "y" / "file"), b"")
    assert not storage.delete_empty(str(tmp_path / "x"))
    assert (tmp_path / "x" / "y" / "file").exists()
    (tmp_path / "x" / "y" / "file").unlink()
    assert storage.delete_empty(str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []
    assert storage.delete_empty(str(tmp_path / "x"))


def test_a_put_that_fails_leaves_the_old_object_and_nothing_else(tmp_path, monkeypatch):
    uri = str(tmp_path / "x")
    storage.put_atomic(uri, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.put_atomic(uri, b"new and longer")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_put_appears_whole_by_a_rename(tmp_path, monkeypatch):
    uri = str(tmp_path / "x")
    storage.put_atomic(uri, b"old")
    rename, seen = os.replace, []

    def watched(source: str, target: str) -> None:
        seen.append((open(source, "rb").read(), open(target, "rb").read()))  # noqa: SIM115
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    storage.put_atomic(uri, b"new")
    assert seen == [(b"new", b"old")]
    assert storage.read_bytes(uri) == b"new"


def test_upload_and_delete(tmp_path):
    (tmp_path / "source").write_bytes(b"data")
    storage.upload_atomic(tmp_path / "source", str(tmp_path / "to" / "x"))
    assert (tmp_path / "to" / "x").read_bytes() == b"data"
    storage.delete(str(tmp_path / "to" / "x"))
    storage.delete(str(tmp_path / "to" / "x"))
    assert not storage.exists(str(tmp_path / "to" / "x"))
    storage.delete_dir(str(tmp_path / "to"))
    storage.delete_dir(str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_a_missing_local_file_stays_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        storage.size(str(tmp_path))


def test_transient_faults_are_tried_again_with_growing_pauses():
    pauses: list[float] = []
    operation = failing(*[OSError("AWS Error SLOW_DOWN during PutObject")] * 3)
    assert storage.retry(operation, S3, pauses.append) == "done"
    assert operation.calls == 4
    assert [0.25 <= pauses[0] <= 0.5, 0.5 <= pauses[1] <= 1.0, 1.0 <= pauses[2] <= 2.0] == [True] * 3


def test_a_fault_that_stays_is_an_input_error_after_the_last_try():
    pauses: list[float] = []
    operation = failing(*[OSError("AWS Error NETWORK_CONNECTION: curlCode: 7, Couldn't connect to server")] * 9)
    with pytest.raises(InputError, match=r"s3://bucket/nih: the object store does not answer.*AWS_ENDPOINT_URL"):
        storage.retry(operation, S3, pauses.append)
    assert operation.calls == storage.ATTEMPTS
    assert len(pauses) == storage.ATTEMPTS - 1


def google(status: str) -> str:
    return f"google::cloud::Status({status})"


@pytest.mark.parametrize(
    "error",
    [
        OSError(google("UNAVAILABLE: Retry policy exhausted, with a last message of CURL error [7]=Could not connect")),
        pa.lib.ArrowCapacityError(google("RESOURCE_EXHAUSTED: Retry policy exhausted: 429")),
        pa.lib.ArrowException("Unknown error: " + google("INTERNAL: Retry policy exhausted")),
        FileNotFoundError(google("NOT_FOUND: Permanent error {gcloud-cpp.retry.function=UploadChunk, reason=…}")),
    ],
)
def test_googles_transient_faults_are_tried_again_whatever_pyarrow_makes_of_them(error: Exception) -> None:
    operation = failing(error, error, error)
    assert storage.retry(operation, GS, lambda seconds: None) == "done"
    assert operation.calls == 4


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(google("UNAVAILABLE: Could not create a OAuth2 access token: CURL error [6]")), "access was refused"),
        (pa.lib.ArrowInvalid(google("INVALID_ARGUMENT: Could not create a OAuth2 access token")), "access was refused"),
        (PermissionError(google("PERMISSION_DENIED: 403")), "machine's service account"),
        (pa.lib.ArrowInvalid(google("OUT_OF_RANGE: 416")), "the object store failed"),
    ],
)
def test_what_a_person_must_mend_with_google_is_not_tried_again(error: Exception, words: str) -> None:
    operation = failing(error)
    with pytest.raises(InputError, match=words) as raised:
        storage.retry(operation, GS, pytest.fail)
    assert operation.calls == 1
    assert "AWS" not in str(raised.value)


def test_a_fault_of_arrow_itself_is_no_fault_of_a_store() -> None:
    for uri in (S3, GS, "/tmp/x"):
        with pytest.raises(pa.ArrowInvalid, match="not a Parquet file"):
            storage.retry(failing(pa.ArrowInvalid("not a Parquet file")), uri, pytest.fail)


def test_googles_client_gives_up_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    from_uri = SimpleNamespace(from_uri=lambda uri: (made.append(uri), ""))
    monkeypatch.setattr(storage, "pafs", SimpleNamespace(FileSystem=from_uri))
    for query in ("", "project_id=p", "retry_limit_seconds=60"):
        storage._filesystem.__wrapped__("gs", "bucket", query)
    assert made == [
        f"gs://bucket?retry_limit_seconds={storage.GOOGLE_RETRY_S}",
        f"gs://bucket?retry_limit_seconds={storage.GOOGLE_RETRY_S}&project_id=p",
        "gs://bucket?retry_limit_seconds=60",
    ]
    assert storage.GOOGLE_RETRY_S <= 30


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError("AWS Error UNKNOWN (HTTP status 400): MalformedXML"), InputError, "the object store failed"),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), InputError, "access was refused"),
        (PermissionError("AWS Error INVALID_ACCESS_KEY_ID: key AKIASECRET"), InputError, "access was refused"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), InputError, "bucket does not exist"),
        (FileNotFoundError("Bucket not found"), InputError, "bucket does not exist"),
        (OSError("AWS Error NO_SUCH_KEY during GetObject"), FileNotFoundError, "s3://bucket/nih"),
        (FileNotFoundError("Path does not exist"), FileNotFoundError, "Path does not exist"),
    ],
)
def test_what_a_person_must_mend_is_not_tried_again(error, kind, words, monkeypatch):
    monkeypatch.setattr(storage, "_check_bucket", lambda uri: None)
    operation = failing(error)
    with pytest.raises(kind, match=words) as raised:
        storage.retry(operation, S3, pytest.fail)
    assert operation.calls == 1
    assert "AKIASECRET" not in str(raised.value)


def test_nothing_found_for_want_of_the_bucket_is_an_input_error(monkeypatch):
    class NoBuckets:
        def get_file_info(self, path: str) -> fs.FileInfo:
            return fs.FileInfo(path, fs.FileType.NotFound)

    monkeypatch.setattr(storage, "_filesystem", lambda *_: NoBuckets())
    for operation in (lambda: storage.exists(S3), lambda: storage.size(S3)):
        with pytest.raises(InputError) as raised:
            operation()
        assert "s3://bucket: the bucket does not exist" in str(raised.value)


@pytest.mark.parametrize("name", ["x.bin", "labels.csv.gz", "images_001.tar.gz"])
def test_objects_are_stored_as_given_whatever_their_name(tmp_path, monkeypatch, name):
    (tmp_path / "bucket").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "_filesystem", lambda *_: store)
    storage.put_atomic(f"s3://bucket/{name}", b"plain")
    assert (tmp_path / "bucket" / name).read_bytes() == b"plain"
    (tmp_path / "source").write_bytes(b"other")
    storage.upload_atomic(tmp_path / "source", f"s3://bucket/{name}")
    assert storage.read_bytes(f"s3://bucket/{name}") == b"other"
    with storage.open_stream(f"s3://bucket/{name}") as stream:
        assert stream.read() == b"other"
    storage.delete_dir("s3://bucket")
    assert storage.list_files("s3://bucket") == []


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(InputError, match="credentials") as raised:
        storage.resolve("s3://AKIAKEY:hunter2@bucket/x")
    assert "hunter2" not in str(raised.value)
    assert storage.shown("s3://AKIAKEY:hunter2@bucket/x?secret=1") == "s3://bucket/x"


@pytest.mark.parametrize("uri", ["", "http://host/x", "s3:///key"])
def test_uris_that_name_nothing_are_refused(uri):
    with pytest.raises(InputError, match="expected"):
        storage.resolve(uri)


def test_one_filesystem_a_bucket(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.forget_filesystems()
    first, path = storage.resolve("s3://bucket/some key/with space")
    assert path == "bucket/some key/with space"
    assert storage.resolve("s3://bucket/other")[0] is first
    storage.forget_filesystems()


def test_a_folder_that_vanishes_while_it_is_listed_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stays").write_bytes(b"x")
    whole, asked = fs.LocalFileSystem(), []

    class Vanishing:
        def get_file_info(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
            asked.append(selector)
            if len(asked) == 1:
                raise FileNotFoundError(f"Cannot list directory '{tmp_path}/gone'")
            return whole.get_file_info(selector)

    monkeypatch.setattr(storage, "resolve", lambda uri, connection=0: (Vanishing(), str(tmp_path)))
    assert storage.list_files(str(tmp_path)) == [("stays", 1)]
    assert len(asked) == 2
