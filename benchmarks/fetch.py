"""Download speed: podloader, its peers and a floor, from nginx on loopback, in one run.

    python benchmarks/fetch.py [--scale 1] [--runs 3] [--peers PYTHON] [--tls] [--only NAME …]

Needs nginx and curl on PATH. ``--peers`` is the interpreter of an environment with obstore,
hf_transfer, s5cmd, boto3, awscrt and truss-transfer; a client that is not there, or that does not
come to an end within ``--limit``, is left out, and said so. The client's CPU seconds are its own
(and its children's), the server's are not in them. Files come from the page cache and go to a
memory file system where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awscrt.checksums import crc64nvme

HERE = Path(__file__).parent
STATIC = Path("/static-bptr")  # where truss-transfer reads its manifest
CONNECTIONS = 16
SETS = {"4 x 1 GiB": (4, 1 << 30), "64 x 16 MiB": (64, 16 << 20), "2000 x 8 KiB": (2000, 8 << 10)}
NAMES: tuple[str, ...] = ("floor", "podloader", "curl", "obstore", "hf_transfer", "s5cmd", "boto3")
NAMES += ("awscrt", "truss_transfer")
NGINX = """
worker_processes 2; daemon off; pid {root}/nginx.pid; error_log {root}/error.log crit;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path {root}/tmp; proxy_temp_path {root}/tmp; fastcgi_temp_path {root}/tmp;
  uwsgi_temp_path {root}/tmp; scgi_temp_path {root}/tmp;
  server {{ listen 127.0.0.1:{port}; root {root}/www; }}
  server {{ listen 127.0.0.1:{tls_port} ssl; root {root}/www;
    ssl_certificate {root}/server.pem; ssl_certificate_key {root}/server.pem; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One download by one client."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="podloader-bench-") as name:
        root = Path(name)
        with serve(root) as (plain, secure):
            for label, (count, size) in SETS.items():
                if options.set and label not in options.set:
                    continue
                scaled = max(int(size * (options.scale if size > 1 << 20 else 1)), 1)
                files = make_files(root / "www" / "bucket", label, count, scaled)
                for endpoint, ca in ((plain, None), (secure, root / "ca.pem")):
                    if bool(ca) == options.tls:
                        measure(options, label, files, endpoint, ca)
                shutil.rmtree(root / "www" / "bucket")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the large files' sizes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="an interpreter with the peers")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one download")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--set", nargs="*", choices=SETS, help="only these sets")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    return parser.parse_args()


def measure(
    options: argparse.Namespace,
    label: str,
    files: list[dict[str, Any]],
    endpoint: str,
    ca: Path | None,
) -> None:
    total = sum(file["size"] for file in files)
    transport = "TLS" if ca else "plain HTTP"
    print(
        f"\n{label}, {transport}: {total:,} bytes, {CONNECTIONS} connections, "
        f"median of {options.runs}"
    )
    print(f"{'client':<15}{'seconds':>9}{'GB/s':>8}{'CPU-s/GB':>10}{'peak MiB':>10}")
    runs: dict[str, list[Run]] = {}
    failed: dict[str, str] = {}
    for _ in range(options.runs):  # in turns, so that drift meets all alike
        for name in options.only:
            if name not in failed:
                try:
                    runs.setdefault(name, []).append(run(options, name, files, endpoint, ca))
                except subprocess.TimeoutExpired as error:
                    failed[name] = f"no end after {error.timeout:.0f} s"
                except (subprocess.SubprocessError, AssertionError) as error:
                    failed[name] = str(error).splitlines()[-1][:90]
    for name, found in runs.items():
        if found and name not in failed:
            seconds = statistics.median(r.seconds for r in found)
            cpu_s = statistics.median(r.cpu_s for r in found)
            peak = statistics.median(r.peak_bytes for r in found)
            gigabytes = total / 1e9
            print(
                f"{name:<15}{seconds:>9.2f}{gigabytes / seconds:>8.2f}"
                f"{cpu_s / gigabytes:>10.2f}{peak / 2**20:>10.0f}"
            )
    for name, reason in failed.items():
        print(f"{name:<15}left out: {reason}")


def run(
    options: argparse.Namespace,
    name: str,
    files: list[dict[str, Any]],
    endpoint: str,
    ca: Path | None,
) -> Run:
    memory = (
        "/dev/shm" if shutil.disk_usage("/dev/shm").free > sum(f["size"] for f in files) else None
    )
    with tempfile.TemporaryDirectory(prefix="podloader-bench-", dir=memory) as folder:
        job = {
            "files": [f | {"url": f"{endpoint}/bucket/{f['path']}"} for f in files],
            "folder": folder,
            "ca": str(ca) if ca else None,
            "connections": CONNECTIONS,
            "endpoint": endpoint,
            "bucket": "bucket",
        }
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        python = sys.executable if name in ("floor", "podloader") else options.peers
        command = [python, str(HERE / "fetch_clients.py"), name, str(path)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONDONTWRITEBYTECODE": "",  # as an installed package's modules are: compiled once
        }
        seconds, usage, told = run_client(command, environment, options.limit)
        home = Path(folder, "job/rank-0") if name == "podloader" else Path(folder)
        for file in files:
            assert digest(home / file["path"]) == file["digest"], f"{name}: {file['path']} differs"
        return Run(seconds, usage.ru_utime + usage.ru_stime, int(told.split()[-1]))


def run_client(
    command: list[str], environment: dict[str, str], limit_s: float
) -> tuple[float, resource.struct_rusage, str]:
    """Return a client's seconds, what it used, and what it said; nothing of it runs on.

    Raises:
        TimeoutExpired: it had not come to an end after *limit_s*.
        CalledProcessError: it failed.
    """
    absent = not STATIC.exists()
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group, which is what is killed
    )
    over = threading.Event()

    def kill() -> None:
        over.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, kill)
    timer.start()
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        told, said = process.stdout.read().decode(), process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if absent and STATIC.exists():
            STATIC.rmdir()
    if over.is_set():
        raise subprocess.TimeoutExpired(command, limit_s)
    if status:
        raise subprocess.CalledProcessError(status, (said.strip() or command[2]).splitlines()[-1])
    return seconds, usage, told


def digest(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = crc64nvme(block, crc)
    return crc


def make_files(folder: Path, label: str, count: int, size: int) -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    seed = os.urandom(1 << 20)
    files = []
    for i in range(count):
        path = folder / f"{i:05d}.bin"
        with path.open("wb") as out:
            left = size
            while left > 0:
                out.write(
                    (i.to_bytes(8, "big") + left.to_bytes(8, "big") + seed)[: min(left, 1 << 20)]
                )
                left -= 1 << 20
        assert path.stat().st_size == size, label
        files.append({"path": path.name, "size": size, "digest": digest(path)})
    return files


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, str]]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        sys.exit("this benchmark needs nginx on PATH (Debian: nginx-light)")
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(root / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(root / "server.pem")
    for folder in (root, root / "www", root / "tmp"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    port, tls_port = (free_port() for _ in range(2))
    config = NGINX.format(root=root, port=port, tls_port=tls_port)
    if os.geteuid() == 0:
        config = "user root;\n" + config
    (root / "nginx.conf").write_text(config)
    process = subprocess.Popen([nginx, "-c", str(root / "nginx.conf"), "-p", str(root)])
    time.sleep(1)
    try:
        yield f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tls_port}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
