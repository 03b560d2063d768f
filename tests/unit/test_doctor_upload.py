"""What would be uploaded is what Ray's own packager packs, and what is too much is named before anything travels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from cxr_dist.doctor import upload
from cxr_dist.doctor.problems import Problem
from cxr_dist.errors import ConfigError
from tests.conftest import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working directory with everything that Ray's rules know."""
    root = tmp_path / "code"
    files = {
        "jobs/train.py": 10,
        "jobs/Röntgen.py": 20,
        "big.bin": 5000,
        "data/images/a.png": 3000,
        "data/images/b.png": 1000,
        "data/.rayignore": "b.png\n",
        "kept/secret.txt": 7,
        ".gitignore": "*.bin\n!kept.bin\nkept/sec*\n",
        "kept.bin": 1,
        "sub/.gitignore": "/only-here\n",
        "sub/only-here": 400,
        "sub/more/only-here": 300,
        ".git/objects/pack": 9000,
        ".venv/bin/python": 9000,
        "sub/__pycache__/x.pyc": 900,
        "outputs/runs/x": 800,
        "linked/nothing": 1,
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content) if isinstance(content, str) else path.write_bytes(b"x" * content)
    (root / "empty" / "folder").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "dataset").write_bytes(b"y" * 70_000)
    (root / "linked" / "data").symlink_to(elsewhere)
    return root


@pytest.mark.parametrize("ignore_gitignore", ["0", "1"])
@pytest.mark.parametrize("excludes", [[], ["outputs", "data/images"], ["*.png", "!a.png"]])
def test_the_zip_is_as_large_as_the_one_that_ray_makes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excludes: list[str], ignore_gitignore: str
) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", ignore_gitignore)
    everything = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(tree), tmp_path / "made.zip", include_gitignore=ignore_gitignore == "0", excludes=everything)
    assert upload.look(str(tree), excludes).zip_bytes == (tmp_path / "made.zip").stat().st_size


def test_entries_are_named_by_size_with_links_followed_and_rays_defaults_left_out(tree: Path) -> None:
    found = upload.look(str(tree), ["outputs"])
    assert [(entry.path, entry.bytes, entry.files) for entry in found.entries] == [
        ("linked", 70_001, 2),
        ("data", 3006, 2),
        ("sub", 311, 2),
        ("jobs", 30, 2),
        (".gitignore", 26, 1),
        ("kept.bin", 1, 1),
        ("empty", 0, 1),
    ]
    assert found.files == 11


def test_git_travels_if_rays_default_is_overridden(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    found = upload.look(str(tree), ["linked"])
    assert {".git": 9000, ".venv": 9000}.items() <= {entry.path: entry.bytes for entry in found.entries}.items()


def test_the_limit_is_that_of_the_job_server() -> None:
    assert upload.LIMIT_BYTES == 100 << 20  # tests/integration/test_doctor.py uploads as much, and one byte more


def sparse(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, num_bytes)


def test_too_much_is_one_problem_that_names_the_largest(tmp_path: Path) -> None:
    sparse(tmp_path / "data" / "a.tar", 60 << 20)
    sparse(tmp_path / "data" / "b.tar", 30 << 20)
    sparse(tmp_path / "weights.pt", 20 << 20)
    (tmp_path / "train.py").write_text("x")
    found = upload.look(str(tmp_path))
    assert upload.judge(found) == (
        [
            Problem(
                check="working_dir",
                found=f"{tmp_path} would travel as a zip of 110.0 MiB (4 files: data 90.0 MiB in 2 files, weights.pt 20.0 MiB, "
                "train.py 0.0 MiB)",
                expected="at most 100.0 MiB, which is what Ray's job server takes",
                do="name what is no code under excludes in infra/runtime_env.yaml, or in a .rayignore",
            )
        ],
        [],
    )
    assert upload.judge(found, limit_bytes=found.zip_bytes)[0] == []
    assert len(upload.judge(found, limit_bytes=found.zip_bytes - 1)[0]) == 1


def test_much_that_is_no_code_is_noted(tmp_path: Path) -> None:
    sparse(tmp_path / "weights.pt", 20 << 20)
    problems, notes = upload.judge(upload.look(str(tmp_path)))
    assert problems == []
    assert notes == [f"{tmp_path} would travel as a zip of 20.0 MiB, mostly no code: weights.pt 20.0 MiB"]


def test_this_repository_travels_as_code_alone() -> None:
    excludes = upload.read_runtime_env(str(ROOT / "infra" / "runtime_env.yaml"))["excludes"]
    found = upload.look(str(ROOT), excludes)
    assert {entry.path for entry in found.entries} >= {"cxr_dist", "jobs", "infra"}
    assert {entry.path for entry in found.entries}.isdisjoint({".git", ".venv", "docs", "tests", "outputs"})
    assert upload.judge(found) == ([], [])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "--runtime-env: FILE cannot be read (No such file or directory); correct the path"),
        ("- a", "--runtime-env: found list in FILE, expected keys such as excludes"),
        ("excludes: data", "--runtime-env: excludes of FILE is no list of texts; write a pattern to a line"),
        ("excludes: [1]", "--runtime-env: excludes of FILE is no list of texts; write a pattern to a line"),
    ],
)
def test_a_runtime_env_that_ray_would_not_take(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "env.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        upload.read_runtime_env(str(path))
    assert str(refused.value) == sentence.replace("FILE", str(path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--working-dir: found no folder .*nowhere"):
        upload.look(str(tmp_path / "nowhere"))


def test_the_job_says_so_and_its_exit_code_too(tmp_path: Path) -> None:
    sparse(tmp_path / "outputs" / "x", 120 << 20)
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--working-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["format"], result["verdict"]) == ("cxr-dist/doctor/1", "not ready")
    assert result["upload"]["largest"] == [{"path": "outputs", "bytes": 120 << 20, "files": 1}]
    assert [problem["check"] for problem in result["problems"]] == ["working_dir"]
    assert "NOT READY: 1 problem" in done.stdout
