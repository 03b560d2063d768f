"""What preflight says about a real S3 server that cannot be used: one sentence that names the place and the cure."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_dist import preflight, storage
from cxr_dist.config import Config, DataConfig, TrainConfig
from cxr_dist.errors import InputError


@pytest.fixture
def server(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The server's environment, to be spoilt; connections are made anew before and after."""
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage.forget_filesystems()
    yield monkeypatch
    monkeypatch.undo()
    storage.forget_filesystems()


def said(check, config: Config) -> str:
    with pytest.raises(InputError) as caught:
        check(config)
    text = str(caught.value)
    assert "\n" not in text
    return text


DATA = Config(data=DataConfig(uri="s3://cxr/preflight"))
RUNS = Config(train=TrainConfig(storage_path="s3://cxr/preflight-runs"))


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(server: pytest.MonkeyPatch, variable: str) -> None:
    server.setenv(variable, "planted-secret")
    for check, config in ((preflight.check_dataset, DATA), (preflight.check_storage, RUNS)):
        storage.forget_filesystems()
        text = said(check, config)
        assert "access was refused; check the credentials in the environment" in text
        assert "planted-secret" not in text


def test_server_down(server: pytest.MonkeyPatch) -> None:
    server.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = said(preflight.check_dataset, DATA)
    assert text.startswith("s3://cxr/preflight")
    assert "the object store does not answer; start it, or check AWS_ENDPOINT_URL" in text


def test_missing_bucket(server: pytest.MonkeyPatch) -> None:
    text = said(preflight.check_dataset, Config(data=DataConfig(uri="s3://no-such-bucket/nih")))
    assert "s3://no-such-bucket" in text
    assert "the bucket does not exist; make it" in text


def test_empty_prefix(server: pytest.MonkeyPatch) -> None:
    assert "found nothing under s3://cxr/preflight; run jobs/ingest.py" in said(preflight.check_dataset, DATA)


def test_weights_of_another_architecture(server: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    import torchvision

    from cxr_dist.model import weights

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet.pt")
    storage.upload_atomic(tmp_path / "resnet.pt", "s3://cxr/preflight-weights/resnet.pt")
    uri = "s3://cxr/preflight-weights/resnet.pt"
    text = said(lambda _: weights.initial(uri, num_findings=8, seed=0), DATA)
    assert f"model.weights {uri}: found no features.conv0.weight" in text
