"""Many transfers under random faults: right files or a right error, never a wrong file.

    python -m benchmarks.soak [--transfers 500] [--seed N] [--latency-ms N]

A transfer is one job of a few files, fetched from an origin that does at random what origins and
networks do. A run that ends in an error is run again, as a pod is started again; the last run
meets no fault. After every run, every file that bears its final name has to be a version that the
origin had, byte for byte; after the last one, the newest. Some transfers begin in processes that
are killed, each when a random share of what was left has been sent; some find bits flipped on the
disk by the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from loader.demo.origin import Handler
from loader.errors import ChangedError, FetchError, LoaderError, TransientError
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.client import HttpClient, HttpOptions
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import (
    Fault,
    FaultyHandler,
    FaultyOrigin,
    act,
    answer,
    cut,
    reset,
    slow,
    stall,
    status,
    write_listing,
)

RANGE = 128 << 10
RUNS = 6  # of one transfer, the last without faults
AT_ONCE = 4
OPTIONS = FetchOptions(concurrency=4, retries=3, range_bytes=RANGE, verify="full")
SIZES = (0, 1, 1000, RANGE, 5 * RANGE + 17, 20 * RANGE)
WHY: dict[type[LoaderError], str] = {
    ChangedError: "the object changed",
    TransientError: "asked again in vain",
}


@dataclass(frozen=True, slots=True)
class Killing:
    """A process that dies when so many bytes of its job have been sent in all."""

    at_bytes: int
    process: subprocess.Popen[bytes]


class SoakOrigin(FaultyOrigin):
    """Meets requests of the jobs in ``unruly`` with a fault now and then, and counts them."""

    def __init__(self, root: Path, seed: int, latency_s: float) -> None:
        self.chance = random.Random(seed)
        self.latency_s = latency_s
        self.counts: Counter[str] = Counter()
        self.versions: dict[str, list[str]] = {}
        self.unruly: dict[str, float] = {}
        self.sent: Counter[str] = Counter()
        self.killing: dict[str, Killing] = {}
        super().__init__(root)
        self.RequestHandlerClass = SoakHandler

    def take_fault(self, path: str) -> Fault | None:
        """Throw the dice for a request."""
        job = path.split("/jobs/")[1].split("/")[0]
        with self.lock:
            if job in self.killing:
                return slow(0.002)
            if self.chance.random() >= self.unruly.get(job, 0.0):
                return None
            name = self.chance.choice([*FAULTS, *FAULTS, "changed object"])
            self.counts[name] += 1
            size = self.chance.randrange(1, 2 * RANGE)
        if name == "changed object":
            return act(lambda: self.renew(path.partition("/jobs/")[2]))
        return FAULTS[name](size)

    def renew(self, path: str) -> None:
        """Put another version of the same size in the place of a file."""
        place = self.root / "training_projects/demo/jobs" / path
        with self.lock:
            if not self.unruly[path.partition("/")[0]]:
                return  # a request that a run before the last one left behind comes too late
            content = self.chance.randbytes(place.stat().st_size)
            self.versions[path].append(hashlib.sha256(content).hexdigest())
            temporary = self.root / "new"  # where no listing names it
            temporary.write_bytes(content)
            temporary.replace(place)

    def calm(self, job: str) -> None:
        """Let the requests of *job* meet no fault from now on."""
        with self.lock:
            self.unruly[job] = 0.0


class SoakHandler(FaultyHandler):
    """Counts the bytes of each job as they are sent, and kills whom that is the end of."""

    server: SoakOrigin
    behind: list[Callable[[int], object]]

    def send_object(self, fd: int) -> None:
        """Answer as from afar, and say what nobody asked for where a fault wants that."""
        self.behind = []
        if self.server.latency_s:
            time.sleep(self.server.latency_s)
        super().send_object(fd)
        for say in self.behind:
            say(fd)

    def copy(self, fd: int, start: int, end: int) -> None:
        """Send the bytes, and count them."""
        super().copy(fd, start, end)
        job = self.path.split("/jobs/")[1].split("/")[0]
        with self.server.lock:
            self.server.sent[job] += end - start
            killing = self.server.killing.get(job)
            if killing is not None and self.server.sent[job] >= killing.at_bytes:
                killing.process.kill()


def expired(_: int) -> Fault:
    """Refuse as S3 does once a URL's signer is signed out."""

    def fault(handler: FaultyHandler) -> bool:
        handler.refuse(403, "ExpiredToken", "The provided token has expired.")
        return True

    return fault


def wrong_range(size: int) -> Fault:
    """Send other bytes than were asked for, and say so."""
    content_range = f"bytes {size}-{size + 9}/{10**6}"
    return answer(206, b"x" * 10, Content_Range=content_range, ETag='"other"')


def again(_: int) -> Fault:
    """Send the answer twice."""

    def fault(handler: FaultyHandler) -> bool:
        assert isinstance(handler, SoakHandler)
        handler.behind.append(lambda fd: Handler.send_object(handler, fd))
        return False

    return fault


def followed_by(more: bytes) -> Fault:
    """Send something else behind the answer."""

    def fault(handler: FaultyHandler) -> bool:
        assert isinstance(handler, SoakHandler)
        handler.behind.append(lambda _: handler.wfile.write(more))
        return False

    return fault


def preceded_by(interim: bytes) -> Fault:
    """Send interim answers before the answer."""

    def fault(handler: FaultyHandler) -> bool:
        handler.wfile.write(interim)
        return False

    return fault


def in_place_of_it(text: bytes, pause_s: float = 0.0) -> Fault:
    """Send this, byte by byte with a pause behind each where there is one, and hang up."""

    def fault(handler: FaultyHandler) -> bool:
        step = 1 if pause_s else len(text)
        for place in range(0, len(text), step):
            handler.wfile.write(text[place : place + step])
            time.sleep(pause_s)
        handler.close_connection = True
        return True

    return fault


def in_chunks(size: int) -> Fault:
    """Send the whole object, with no length and no version."""

    def fault(handler: FaultyHandler) -> bool:
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        content = (handler.server.root / path).read_bytes()
        handler.wfile.write(CHUNKED)
        for place in range(0, len(content), size):
            piece = content[place : place + size]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")
        return True

    return fault


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SOUND = OK + b"Content-Length: 5\r\n\r\nwrong"
FAULTS: dict[str, Callable[[int], Fault]] = {
    "reset": lambda _: reset,
    "stall": lambda _: stall(1.0),
    "trickle": lambda _: slow(0.05),
    "503": lambda _: status(503),
    "403 expired": expired,
    "short body": cut,
    "wrong range": wrong_range,
    "answer sent twice": again,
    "another answer behind": lambda _: followed_by(SOUND),
    "bytes behind": lambda size: followed_by(b"x" * (size % 999 + 1)),
    "interim answers": lambda size: preceded_by(b"HTTP/1.1 103 Hints\r\n\r\n" * (size % 9 + 1)),
    "endless interim": lambda _: preceded_by(b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
    "slow head": lambda _: in_place_of_it(OK + b"A: " + b"b" * 99, 0.03),
    "gzip": lambda _: answer(200, b"wrong", Content_Encoding="gzip", ETag='"other"'),
    "gzip, chunked": lambda _: in_place_of_it(
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nwrong\r\n0\r\n\r\n"
    ),
    "two lengths": lambda _: in_place_of_it(OK + b"Content-Length: 9\r\n" + SOUND[len(OK) :]),
    "no length, in chunks": in_chunks,
    "no HTTP": lambda size: in_place_of_it(random.Random(size).randbytes(size % 5000 + 1)),
}


class Quiet(Progress):
    """A progress that counts retries and says nothing."""

    retries = 0

    def retry(self, path: str, reason: str) -> None:
        """Count."""
        Quiet.retries += 1


class Transfer:
    """One job and the folder it is fetched into."""

    def __init__(self, origin: SoakOrigin, folder: Path, number: int, seed: int) -> None:
        self.origin, self.job, self.root = origin, f"job{number}", folder / f"job{number}"
        self.chance = random.Random(f"{seed}/{number}")
        self.errors: Counter[str] = Counter()
        self.flips = self.kills = self.runs = 0
        self.deaths = self.chance.choice((1, 2, 3)) if self.chance.random() < 0.12 else 0
        self.bytes = 0
        for name in ("a.bin", "b.bin", "c.txt")[: self.chance.randrange(1, 4)]:
            size = SIZES[-1] if self.deaths else self.chance.choice(SIZES)
            self.bytes += size
            content = self.chance.randbytes(size)
            origin.put(name, content, self.job)
            digest = hashlib.sha256(content).hexdigest()
            origin.versions[f"{self.job}/rank-0/{name}"] = [digest]

    def run(self) -> Transfer:
        """Run it to its good end; AssertionError where a wrong file was ever to be seen."""
        rate = self.chance.choice([0.05, 0.2, 0.5])
        for _ in range(self.deaths):
            self.kill_one()
        for number in range(RUNS):
            if number < RUNS - 1:
                self.origin.unruly[self.job] = rate
            else:
                self.origin.calm(self.job)
            self.runs += 1
            if self.attempt():
                if self.flips or self.chance.random() > 0.3:
                    break
                self.flip_a_bit()
            self.check(newest=False)
        self.origin.calm(self.job)
        assert self.attempt(), "an error without a fault"
        self.check(newest=True)
        shutil.rmtree(self.root)
        return self

    def attempt(self) -> bool:
        """Fetch once; return whether it ended well."""
        entries = self.origin.listing(self.job)["checkpoint_artifacts"]
        assert isinstance(entries, list)
        files = (Artifact(self.job, 0, e["relative_file_name"], e["url"]) for e in entries)
        client = HttpClient(HttpOptions(stall_timeout_s=0.4))
        quiet: Progress = Quiet()
        try:
            fetch(Manifest(tuple(files)), self.root, PresignedStore(client), OPTIONS, quiet)
        except FetchError as error:
            why = WHY.get(type(error), error.what.partition(" at ")[0])
            self.errors[why] += 1
            told = str(error)
        else:
            return True
        finally:
            client.close()
        assert "Signature" not in told
        return False

    def check(self, *, newest: bool) -> None:
        """Every file that is to be seen is whole: the *newest* version, or one that there was."""
        for path, versions in self.origin.versions.items():
            if not path.startswith(f"{self.job}/"):
                continue
            final = self.root / path
            if not newest and (not final.exists() or path in self._flipped):
                continue
            digest = hashlib.sha256(final.read_bytes()).hexdigest()
            allowed = versions[-1:] if newest else versions
            told = "an old file" if digest in versions else "a wrong file"
            assert digest in allowed, f"{told}: {path}"

    _flipped: frozenset[str] = frozenset()

    def flip_a_bit(self) -> None:
        """Let one bit of a whole file rot, and leave its time stamp."""
        whole = [p for p in self.root.glob("*/rank-0/*") if p.stat().st_size]
        if not whole:
            return
        path = self.chance.choice(whole)
        times, place = path.stat(), self.chance.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self.chance.randrange(8)]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.flips += 1
        self._flipped = frozenset({path.relative_to(self.root).as_posix()})

    def kill_one(self) -> None:
        """Fetch in a process of its own, which does not live to see the end."""
        listing = write_listing(self.origin, self.root.with_suffix(".json"), self.job)
        training = {
            "download_folder": str(self.root),
            "artifact_references": [{"training_job_id": self.job, "paths": ["*"]}],
        }
        own = {"artifacts": str(listing), "range_size": str(RANGE), "concurrency": 2}
        config = self.root.with_suffix(".yaml")
        config.write_text(
            yaml.safe_dump({"training_checkpoints": training, "model_metadata": {"podloader": own}})
        )
        sent = self.origin.sent[
            self.job
        ]  # what is left to send is more: what was on its way is lost
        at_bytes = sent + round(self.chance.random() * max(self.bytes - sent, 0))
        command = [sys.executable, "-m", "loader", "fetch", str(config)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.origin.killing[self.job] = Killing(at_bytes, process)
        self.kills += process.wait() == -signal.SIGKILL
        del self.origin.killing[self.job]
        self.check(newest=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transfers", type=int, default=500)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument(
        "--latency-ms", type=float, default=0.0, help="what the origin waits before each answer"
    )
    options = parser.parse_args()
    logging.getLogger("podloader").setLevel(logging.ERROR)
    print(report(options.transfers, options.seed, options.latency_ms / 1000))


def report(transfers: int, seed: int, latency_s: float = 0.0) -> str:
    """Return the table of *transfers*; raises AssertionError, with the seed, at a wrong file."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="podloader-soak-") as name:
        folder = Path(name)
        origin = SoakOrigin(folder / "origin", seed, latency_s)
        origin.start()
        try:
            made = [Transfer(origin, folder, number, seed) for number in range(transfers)]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                done = list(pool.map(Transfer.run, made))
        except AssertionError as error:
            raise AssertionError(f"{error} (seed {seed})") from error
        finally:
            origin.stop()
    errors = sum((transfer.errors for transfer in done), Counter[str]())
    faults = origin.counts + Counter(
        {"bit flip on disk": sum(t.flips for t in done), "SIGKILL": sum(t.kills for t in done)}
    )
    lines = [
        f"{len(done)} transfers, {sum(t.runs for t in done)} runs, seed {seed}, "
        f"{time.monotonic() - began:.0f} s: {len(done)} ended right, 0 wrong files",
        "",
        f"{'fault injected':<24}{'count':>7}",
        *(f"{fault:<24}{count:>7}" for fault, count in faults.most_common()),
        "",
        f"asked for again within a run: {Quiet.retries}",
        f"{'runs that ended in an error':<50}{'count':>7}",
        *(f"{why:<50}{count:>7}" for why, count in errors.most_common()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
