"""The shell around a job: what people see when a key or value is wrong, the result line and the exit codes."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr_dist.cli import ScrubbedFormatter, parse, run_job
from cxr_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from cxr_dist.errors import ConfigError, DataError, RunError


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr with which a command line is refused; exit code 2 asserted."""
    with pytest.raises(SystemExit) as caught:
        run_job(lambda config, args: {}, description="test", argv=list(argv))
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == ""
    [line] = shown.err.splitlines()
    return line


def test_defaults_without_flags() -> None:
    assert parse("test", argv=[])[0] == Config()


def test_flags_and_file_and_their_order(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {epochs: 3, skip_findings: [Hernia, Mass]}\ndata: {label_set: nih8}\n")
    found, args = parse("test", argv=["--config", str(path), "--train.epochs", "4", "--model.lse_r", "2"])
    assert found == Config(
        train=TrainConfig(epochs=4, skip_findings=("Hernia", "Mass")),
        data=DataConfig(label_set="nih8"),
        model=ModelConfig(lse_r=2.0),
    )
    assert args.json is None


def test_a_jobs_own_flags_come_beside_the_config() -> None:
    found, args = parse(
        "test",
        lambda parser: parser.add_argument("--checkpoint", type=str),
        ["--checkpoint", "x.pt", "--run.name", "a"],
    )
    assert (args.checkpoint, found.run.name) == ("x.pt", "a")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epocs", "3"], "error: unknown key train.epocs: did you mean train.epochs?"),
        (["--train.epoch", "3"], "error: unknown key train.epoch: did you mean train.epochs?"),
        (["--trian.epochs=3"], "error: unknown key trian.epochs: did you mean train.epochs?"),
        (["--zzzz", "3"], "error: unknown key zzzz: see --help for every key"),
        (["--data.label_set", "nih9"], "error: data.label_set: found nih9, expected one of nih14, nih8"),
        (["--train.epochs", "many"], "error: train.epochs: found many, expected a whole number"),
        (["--train.augment", "maybe"], "error: train.augment: found maybe, expected true or false"),
        (["--optimizer.lr", "fast"], "error: optimizer.lr: found fast, expected a number"),
        (
            ["--train.skip_findings", "Hernia"],
            "error: train.skip_findings: found Hernia, expected a list such as [a, b]",
        ),
        (["--train.epochs", "0"], "error: train.epochs: found 0, expected 1 or more"),
    ],
)
def test_a_wrong_flag_is_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert refused(capsys, *argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epocs: 3}", "error: unknown key train.epocs: did you mean train.epochs?"),
        ("trian: {epochs: 3}", "error: unknown key trian.epochs: did you mean train.epochs?"),
        ("data: {label_set: nih9}", "error: data.label_set: found nih9, expected one of nih14, nih8"),
        ("train: {epochs: many}", "error: train.epochs: found many, expected a whole number"),
        ("train: 5", "error: train: found 5, expected keys and values, such as in --print_config"),
        ("model: {bn_group: 1}", "error: model.bn_group: found 1, expected 2 or more images"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refused(capsys, "--config", str(path)) == message


def test_a_missing_or_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "none.yaml") in refused(capsys, "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("train: {epochs: 3")
    assert "broken.yaml: line 1: found what is no YAML" in refused(capsys, "--config", str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 3, epochs: 4}", "train.epochs: found it again in FILE: line 1, expected it once"),
        ("train: {epochs: 3}\ntrain: {seed: 4}", "train: found it again in FILE: line 2, expected it once"),
        ("train: {epochs: 3}\ntrain.epochs: 4", "train.epochs: found it again in FILE: line 2, expected it once"),
        ("train: {epochs: }", "train.epochs: found nothing in FILE: line 1, expected a value"),
        ("train: {skip_findings: null}", "train.skip_findings: found nothing in FILE: line 1, expected a value"),
        ("train: {epochs: 010}", "train.epochs: found 010, which YAML takes for 8; write it in decimal"),
        ("train: {epochs: 1:30}", "train.epochs: found 1:30, which YAML takes for 90; write it in decimal"),
        ("a: &a [*a]", "FILE: line 1: found an anchor or alias, expected values"),
        ("train: {seed: !!int '3'}", "FILE: line 1: found the tag tag:yaml.org,2002:int, expected plain values"),
        ("a: [[[[[[[[1]]]]]]]]", "FILE: line 1: found more than 8 levels, expected sections of keys"),
        (f"run: {{name: {'x' * 5000}}}", "FILE: line 1: found a value of 5000 characters, expected fewer"),
        (f"train: {{epochs: {'9' * 5000}}}", "FILE: line 1: found a value of 5000 characters, expected fewer"),
        (" " * (1 << 20) + "#", "FILE: found 1048577 bytes, expected the few of a run's YAML"),
        ("config: other.yaml", "FILE: line 1: found a file that names another, expected values"),
        ("__path__: x", "FILE: line 1: found a key that is no name, expected one such as"),
        ("1: 2", "FILE: line 1: found a key that is no name, expected one such as"),
        ("", "FILE: found no keys and values, expected sections such as of --print_config"),
        ("[]", "FILE: found no keys and values, expected sections such as of --print_config"),
        ("data:", "data: found nothing, expected keys and values, such as in --print_config"),
        ("run: {name: 123}", "run.name: found 123, expected text (in YAML, a number as text stands in quotes)"),
        ("optimizer: {lr: .inf}", "optimizer.lr: found inf, expected a finite number"),
        ("train: {epochs: 3}\0", "FILE: found what is no YAML (special characters are not allowed)"),
        (b"train: {epochs: 3}\xff", "FILE: found bytes that are not UTF-8 at 18, expected text"),
    ],
)
def test_what_yaml_would_take_in_silence_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    expected = f"error: {message.replace('FILE', str(path))}"
    assert refused(capsys, "--config", str(path))[: len(expected)] == expected
    assert refused(capsys, f"--config={path}")[: len(expected)] == expected


def test_nothing_on_the_command_line_is_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    words = "error: train.epochs: found nothing, expected a value; leave it out for its default"
    assert refused(capsys, "--train", '{"epochs": null}') == words


def test_printed_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--train.epochs", "4", "--train.skip_findings", "[Hernia]", "--run.name", "a", "--optimizer.lr", "1e-4"]
    with pytest.raises(SystemExit) as caught:
        parse("test", argv=[*argv, "--print_config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert set(Config.__dataclass_fields__) <= set(yaml.safe_load(printed))
    (tmp_path / "run.yaml").write_text(printed)
    assert parse("test", argv=["--config", str(tmp_path / "run.yaml")])[0] == parse("test", argv=argv)[0]


def test_help_tells_the_meaning_of_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("test", argv=["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for section, part in Config.__dataclass_fields__.items():
        for name in part.type.__dataclass_fields__:  # type: ignore[union-attr]
            assert f"--{section}.{name} " in shown
    for text in (
        "Images in one optimizer step, over all ranks.",
        "Side of the square grey image that the network sees, pixels.",
        "First part that is trained; everything before it is the frozen prefix.",
    ):
        assert text in shown


def leave(
    capsys: pytest.CaptureFixture[str], result: dict[str, Any] | Exception, *argv: str
) -> tuple[object, list[str], str]:
    """Exit code, lines on stdout and text on stderr of a job with this outcome."""

    def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
        print("for people")
        if isinstance(result, Exception):
            raise result
        return {**result, "epochs": config.train.epochs}

    with pytest.raises(SystemExit) as caught:
        run_job(main, description="test", argv=["--train.epochs", "2", *argv])
    shown = capsys.readouterr()
    return caught.value.code, shown.out.splitlines(), shown.err


def test_the_result_is_the_last_line_and_exit_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = leave(capsys, {"auroc": None}, "--json", str(tmp_path / "out.json"))
    assert (code, lines[0]) == (0, "for people")
    assert [json.loads(line) for line in lines[1:]] == [{"auroc": None, "epochs": 2}]
    assert (tmp_path / "out.json").read_text() == lines[-1] + "\n"


@pytest.mark.parametrize("error", [ConfigError("train.epochs: found 0"), DataError("shard lost")])
def test_bad_input_is_exit_2_in_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    code, lines, said = leave(capsys, error)
    assert (code, lines, said) == (2, ["for people"], f"error: {error}\n")


@pytest.mark.parametrize("error", [RunError("loss became nan"), ZeroDivisionError("division by zero")])
def test_a_failure_is_exit_1_and_is_named(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    code, lines, _ = leave(capsys, error)
    assert (code, lines) == (1, ["for people"])
    assert caplog.messages == [f"failed: {error}"]
    # a fault of the run is a sentence; a fault of the program comes with where it is
    assert ("Traceback" in caplog.text) is not isinstance(error, RunError)


def test_a_result_with_nan_is_not_passed_off_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_job(lambda config, args: {"auroc": float("nan")}, description="test", argv=[])
    assert capsys.readouterr().out == ""


def test_no_secret_reaches_the_log_in_message_or_traceback() -> None:
    formatter = ScrubbedFormatter("%(message)s")
    try:
        raise RuntimeError("cannot reach postgresql://bob:hunter2@db/x")
    except RuntimeError as error:
        record = logging.makeLogRecord({"msg": "failed: %s", "args": (error,), "exc_info": sys.exc_info()})
    shown = formatter.format(record)
    assert "Traceback" in shown
    assert "RuntimeError: cannot reach postgresql://" in shown
    assert "hunter2" not in shown


def test_an_error_of_a_ray_task_is_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = DataError("a whole traceback\nin many lines")
    wrapped.cause = DataError("shard lost")  # type: ignore[attr-defined]
    assert leave(capsys, wrapped)[2] == "error: shard lost\n"


def test_a_result_file_in_no_folder_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, said = leave(capsys, {}, "--json", str(tmp_path / "none" / "out.json"))
    assert (code, lines) == (2, [])
    assert said == f"error: --json: found no folder {tmp_path}/none; make it or give another\n"


@pytest.mark.parametrize(("verdict", "code"), [("ready", 0), ("not ready", 1)])
def test_a_result_may_be_a_failure_and_is_printed_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verdict: str, code: int
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_job(
            lambda config, args: {"verdict": verdict},
            description="test",
            argv=["--json", f"file://{tmp_path}/not/yet/result.json"],
            failed=lambda result: result["verdict"] != "ready",
        )
    assert caught.value.code == code
    assert json.loads(capsys.readouterr().out) == {"verdict": verdict}
    assert json.loads((tmp_path / "not" / "yet" / "result.json").read_text()) == {"verdict": verdict}


def test_a_result_that_cannot_be_kept_where_it_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_job(lambda config, args: {}, description="test", argv=["--json", "ftp://x/y"])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "{}\n"
    assert shown.err == "error: --json: ftp://x/y: found scheme 'ftp', expected a path, file://, s3:// or gs://\n"
