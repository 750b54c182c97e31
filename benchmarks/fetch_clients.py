"""One download by one client, in a process of its own: ``fetch_clients.py CLIENT JOB.json``.

The job: ``files`` (url, path, size), ``folder``, ``ca``, ``connections``, ``endpoint``, ``bucket``.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import queue
import resource
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

RANGE = 16 << 20
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h


def place(job: dict[str, Any], file: dict[str, Any]) -> str:
    """Return where a file goes, in a folder that exists."""
    path = Path(job["folder"], file["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


def ranges(files: list[dict[str, Any]], size: int = RANGE) -> queue.SimpleQueue[Any]:
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for file in files:
        for start in range(0, max(file["size"], 1), size):
            tasks.put((file, start, min(start + size, file["size"])))
    return tasks


def on_threads(job: dict[str, Any], work: Callable[[queue.SimpleQueue[Any]], None]) -> None:
    for file in job["files"]:
        path = Path(job["folder"], file["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.truncate(file["size"])
    tasks = ranges(job["files"])
    threads = [threading.Thread(target=work, args=(tasks,)) for _ in range(job["connections"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def connect(job: dict[str, Any]) -> socket.socket:
    parts = urlsplit(job["files"][0]["url"])
    sock = socket.create_connection((parts.hostname, parts.port))
    if parts.scheme == "https":
        return ssl.create_default_context(cafile=job["ca"]).wrap_socket(
            sock, server_hostname=parts.hostname
        )
    return sock


def ask(sock: socket.socket, url: str, start: int, end: int) -> bytes:
    """Send a ranged GET and return what came of the body with the headers."""
    request = (
        f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
    )
    sock.sendall(request.encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096)
    return head.partition(b"\r\n\r\n")[2]


def floor(job: dict[str, Any]) -> None:
    """The least there is: splice(2) from the socket to the file; over TLS, recv_into and pwrite."""

    def work(tasks: queue.SimpleQueue[Any]) -> None:
        sock = connect(job)
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        buffer = memoryview(bytearray(1 << 20))
        while not tasks.empty():
            try:
                file, start, end = tasks.get_nowait()
            except queue.Empty:
                break
            out = os.open(Path(job["folder"], file["path"]), os.O_WRONLY)
            if end > start:
                body = ask(sock, file["url"], start, end)
                place = start + os.pwrite(out, body, start)
                if job["ca"]:
                    while place < end:
                        count = sock.recv_into(buffer[: end - place])
                        place += os.pwrite(out, buffer[:count], place)
                else:
                    while place < end:
                        left = os.splice(sock.fileno(), writer, min(end - place, 1 << 20))
                        while left:
                            moved = os.splice(reader, out, left, offset_dst=place)
                            left, place = left - moved, place + moved
            os.close(out)
        sock.close()

    on_threads(job, work)


def podloader(job: dict[str, Any]) -> None:
    from loader.fetch.snapshot import FetchOptions, fetch
    from loader.http.client import HttpClient, HttpOptions
    from loader.stores.presigned import PresignedStore
    from loader.types import Artifact, Manifest

    artifacts = tuple(  # as of a listing that tells no sizes, where files are small
        Artifact("job", 0, f["path"], f["url"], f["size"] if f["size"] > 1 << 20 else None)
        for f in job["files"]
    )
    store = PresignedStore(HttpClient(HttpOptions(ca_bundle=job["ca"] and Path(job["ca"]))))
    options = FetchOptions(concurrency=job["connections"])
    fetch(Manifest(artifacts), Path(job["folder"]), store, options)


def curl(job: dict[str, Any]) -> None:
    config = "".join(
        f'url = "{f["url"]}"\noutput = "{job["folder"]}/{f["path"]}"\n' for f in job["files"]
    )
    command = ["curl", "-sS", "--parallel", "--parallel-max", str(job["connections"]), "-K", "-"]
    if job["ca"]:
        command += ["--cacert", job["ca"]]
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, "--create-dirs"], input=config.encode(), check=True)


def obstore(job: dict[str, Any]) -> None:
    from obstore.store import HTTPStore

    options = {"allow_http": True, "allow_invalid_certificates": bool(job["ca"])}
    store = HTTPStore.from_url(job["endpoint"], client_options=options)

    def work(tasks: queue.SimpleQueue[Any]) -> None:
        while not tasks.empty():
            try:
                file, start, end = tasks.get_nowait()
            except queue.Empty:
                break
            if end > start:
                key = urlsplit(file["url"]).path.lstrip("/")
                data = store.get_range(key, start=start, end=end)
                out = os.open(Path(job["folder"], file["path"]), os.O_WRONLY)
                os.pwrite(out, data, start)
                os.close(out)

    on_threads(job, work)


def hf_transfer(job: dict[str, Any]) -> None:
    from hf_transfer import download

    for file in job["files"]:
        path = place(job, file)
        download(file["url"], path, max_files=job["connections"], chunk_size=RANGE)


def s5cmd(job: dict[str, Any]) -> None:
    lines = "".join(
        f"cp s3://{job['bucket']}/{f['path']} {job['folder']}/{f['path']}\n" for f in job["files"]
    )
    command = [str(Path(sys.executable).with_name("s5cmd")), "--no-sign-request"]
    command += ["--endpoint-url", job["endpoint"], "--log", "error"]
    own = {"AWS_REGION": "x"} | ({"AWS_CA_BUNDLE": job["ca"]} if job["ca"] else {})
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, "run"], input=lines.encode(), check=True, env={**os.environ, **own})


def boto3(job: dict[str, Any]) -> None:
    from boto3 import client
    from boto3.s3.transfer import TransferConfig
    from botocore import UNSIGNED
    from botocore.config import Config

    s3 = client(
        "s3",
        endpoint_url=job["endpoint"],
        region_name="x",
        verify=job["ca"] or None,
        config=Config(signature_version=UNSIGNED, max_pool_connections=job["connections"]),
    )
    config = TransferConfig(max_concurrency=job["connections"], multipart_chunksize=RANGE)
    for file in job["files"]:
        path = place(job, file)
        s3.download_file(job["bucket"], file["path"], path, Config=config)


def awscrt(job: dict[str, Any]) -> None:
    from awscrt.http import HttpHeaders, HttpRequest
    from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
    from awscrt.s3 import S3Client, S3RequestTlsMode, S3RequestType

    group = EventLoopGroup(2)
    bootstrap = ClientBootstrap(group, DefaultHostResolver(group))
    parts = urlsplit(job["endpoint"])
    s3 = S3Client(
        bootstrap=bootstrap,
        region="x",
        credential_provider=None,
        tls_mode=S3RequestTlsMode.DISABLED,
        part_size=RANGE,
    )
    pending = []
    for file in job["files"]:
        path = place(job, file)
        headers = HttpHeaders([("Host", parts.netloc)])
        request = HttpRequest("GET", f"/{job['bucket']}/{file['path']}", headers)
        asked = s3.make_request(request=request, type=S3RequestType.GET_OBJECT, recv_filepath=path)
        pending.append(asked.finished_future)
    for future in pending:
        future.result()


def truss_transfer(job: dict[str, Any]) -> None:
    """Its manifest is read from a fixed place of a pod; it is put there where no other sees it.

    A manifest that a killed run left would be read by every Truss server on this machine.
    """
    manifest = Path("/static-bptr/static-bptr-manifest.json")
    manifest.parent.mkdir(exist_ok=True)
    _mount_private(manifest.parent)  # of this thread, and those that it starts from here on
    from truss_transfer import lazy_data_resolve

    pointers = [
        {
            "resolution": {"url": f["url"], "expiration_timestamp": 4_000_000_000},
            "uid": f"{f['path']}-{f['digest']}",
            "file_name": f["path"],
            "hashtype": "etag",
            "hash": str(f["digest"]),
            "size": f["size"],
        }
        for f in job["files"]
    ]
    manifest.write_text(json.dumps({"pointers": pointers}))
    lazy_data_resolve(job["folder"])


def _mount_private(folder: Path) -> None:
    """Put an empty file system on *folder*, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, None)
    ):
        raise OSError(ctypes.get_errno(), "no mount of its own", str(folder))


CLIENTS = {
    function.__name__: function
    for function in (
        floor,
        podloader,
        curl,
        obstore,
        hf_transfer,
        s5cmd,
        boto3,
        awscrt,
        truss_transfer,
    )
}


def peak_bytes() -> int:
    """Return this process's peak of resident memory, or a child's where that is more."""
    status = Path("/proc/self/status").read_text()
    own = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


if __name__ == "__main__":
    CLIENTS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    print(peak_bytes())
