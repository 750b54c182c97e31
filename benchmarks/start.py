"""How long a command takes from its start to its first request: podloader beside its peers.

    python -m benchmarks.start [--runs 15]

A server on the loopback interface notes when the first byte of a request comes, over TLS after the
handshake, measured from just before the process is made, and ends the process then. ``python -c
pass`` runs to its end: the least that a command in Python can take. What is not installed is left
out. The server's certificate is trusted as the system's are: from a directory by hashes that has
one more, or, "of a file", from the file that ``SSL_CERT_FILE`` names, which is read as a whole.
Of ``s3://``, the first request is the listing, which has to be there before a file can be asked
for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme
import yaml

from loader.demo.origin import Origin

_LIMIT_S = 60.0
_FETCH = "from huggingface_hub import hf_hub_download; hf_hub_download('a/b', 'config.json')"
_BOTO3 = "import boto3; boto3.client('s3').download_file('bucket', 'key', '/dev/null')"


@dataclass(frozen=True)
class Command:
    """A command that asks *server* for a file, or ends by itself where there is none."""

    name: str
    words: Sequence[str]
    variables: Mapping[str, str | None] = field(default_factory=dict)  # None: is not to be set
    server: Server | None = None


class Server:
    """Waits for the first byte of a request."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(_LIMIT_S)
        host, port = self._listening.getsockname()
        self.url = f"{'https' if tls else 'http'}://{host}:{port}"

    def wait(self) -> float:
        """Return when it came, by ``time.perf_counter``."""
        with self._listening.accept()[0] as plain:
            plain.settimeout(_LIMIT_S)
            if self._tls is None:
                plain.recv(1)
                return time.perf_counter()
            with self._tls.wrap_socket(plain, server_side=True) as secure:
                secure.recv(1)
                return time.perf_counter()

    def drop_waiting(self) -> None:
        """Close further connections of a process that is gone."""
        self._listening.settimeout(0)
        try:
            while True:
                self._listening.accept()[0].close()
        except BlockingIOError:
            self._listening.settimeout(_LIMIT_S)


def commands(folder: Path) -> list[Command]:
    """Return what is measured and installed; *folder* is for configs, listings and certificates."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    bundle = folder / "certificates.pem"
    system = Path(ssl.get_default_verify_paths().cafile or os.devnull).read_bytes()
    bundle.write_bytes(system + authority.cert_pem.bytes())
    of_file = {"SSL_CERT_FILE": str(bundle)}
    of_folder = {
        "SSL_CERT_FILE": None,
        "SSL_CERT_DIR": str(hashed(authority, folder / "certificates")),
    }
    plain, secure = Server(), Server(tls)
    aws = {
        "AWS_ENDPOINT_URL": plain.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    hub = {"HF_ENDPOINT": plain.url, "HF_HOME": str(folder / "hub")}
    podloader = [sys.executable, "-m", "loader"]

    def fetch(config: Path) -> list[str]:
        return [*podloader, "fetch", str(config)]

    http, https = (write_listing(folder, server.url) for server in (plain, secure))
    secured, bucket = fetch(write_config(folder, "https", https)), "s3://bucket/models"
    found = [
        Command("python -c pass", [sys.executable, "-c", "pass"]),
        Command("podloader --help", [*podloader, "--help"]),
        Command("podloader fetch", fetch(write_config(folder, "http", http)), {}, plain),
        Command("podloader fetch, https", secured, of_folder, secure),
        Command("podloader, https of a file", secured, of_file, secure),
        Command("podloader fetch, s3", fetch(write_config(folder, "s3", bucket)), aws, plain),
        Command("curl", ["curl", "-s", f"{plain.url}/a"], {}, plain),
        Command("curl, https", ["curl", "-s", "--cacert", str(bundle), secure.url], {}, secure),
        Command("s5cmd cp", ["s5cmd", "cp", "s3://bucket/key", os.devnull], aws, plain),
        Command("huggingface-hub", [sys.executable, "-c", _FETCH], hub, plain),
        Command("boto3", [sys.executable, "-c", _BOTO3], aws, plain),
    ]
    return [one for one in found if shutil.which(one.words[0])]


def hashed(authority: trustme.CA, folder: Path) -> Path:
    """Return *folder*, the system's certificates by their subjects' hashes, and the authority's."""
    shutil.copytree(ssl.get_default_verify_paths().capath or os.devnull, folder)
    command = ["openssl", "x509", "-noout", "-hash"]
    told = subprocess.run(
        command, input=authority.cert_pem.bytes(), check=True, capture_output=True
    )
    (folder / f"{told.stdout.decode().strip()}.0").write_bytes(authority.cert_pem.bytes())
    return folder


def write_listing(folder: Path, url: str) -> str:
    """Return the listing of one file that a server at *url* is to be asked for."""
    made = folder / "origin/training_projects/demo/jobs/job/rank-0/checkpoint-1/config.json"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text("{}")
    origin = Origin(folder / "origin")
    listing = origin.write_listing("job", folder / f"{url.partition(':')[0]}.json")
    own = f"http://127.0.0.1:{origin.server_port}/"
    listing.write_text(listing.read_text().replace(own, f"{url}/"))
    origin.server_close()
    return str(listing)


def write_config(folder: Path, name: str, artifacts: str) -> Path:
    """Return a Truss config that asks for one file of *artifacts*."""
    references = [{"training_job_id": "job", "paths": ["rank-0/checkpoint-1/"]}]
    config = {
        "training_checkpoints": {
            "download_folder": str(folder / f"files-{name}"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": {"artifacts": [artifacts]}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(command: Command) -> float:
    """Return the seconds from the process's start to its first request, or to its end."""
    began = time.perf_counter()
    variables = {**os.environ, **command.variables, "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen(
        command.words,
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if command.server is not None:
            return command.server.wait() - began
        process.wait(_LIMIT_S)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        if command.server is not None:
            command.server.drop_waiting()


def main() -> None:
    """Measure in turns, so that a busy moment of the machine meets all alike."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        compared = commands(Path(made))
        seconds: dict[str, list[float]] = {command.name: [] for command in compared}
        for run in range(given.runs + 1):
            for command in compared:
                found = measure(command)
                if run:  # the first compiles what is not yet, and fills the page cache
                    seconds[command.name].append(found)
    print(f"{'ms to the first request':<24} {'least':>7} {'median':>7}")
    for name, found_s in seconds.items():
        least, median = min(found_s) * 1e3, statistics.median(found_s) * 1e3
        print(f"{name:<24} {least:>7.0f} {median:>7.0f}")


if __name__ == "__main__":
    main()
