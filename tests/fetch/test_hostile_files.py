"""What others laid into the download folder: FIFOs, devices, links, folders that change places."""

from __future__ import annotations

import gc
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from loader.errors import DiskError, LoaderError, ResolveError
from loader.fetch import files, snapshot
from loader.fetch.files import KINDS, WHOLE, Places, Record, lock_part, read_record, write_journal
from loader.fetch.files import write_record as write
from loader.fetch.folders import Folders
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest, Snapshot
from tests.origin import FaultyOrigin, act

RANGE = 64 << 10
SMALL, LARGE = random.Random(1).randbytes(999), random.Random(2).randbytes(3 * RANGE + 1)
OPTIONS = FetchOptions(concurrency=1, retries=1, range_bytes=RANGE)
FINAL = "job1/rank-0/sub"
STATE = f".podloader/files/{FINAL}"
PLACES = [f"{FINAL}/x.bin", *(f"{STATE}/x.bin.{kind}" for kind in KINDS)]
VICTIM = b"somebody else's"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Site:
    """A download folder that ``x.bin`` is fetched into, beside a folder that is none of its."""

    def __init__(self, origin: FaultyOrigin, store: PresignedStore, folder: Path) -> None:
        self.origin, self._store = origin, store
        self.root, self.outside = folder / "down", folder / "outside"
        self.outside.mkdir()
        self.victim = self.outside / "victim"
        self.victim.write_bytes(VICTIM)

    def fetch(self, content: bytes = LARGE) -> Snapshot:
        path = self.origin.put("sub/x.bin", content)
        url = self.origin.sign(path.relative_to(self.origin.root).as_posix())
        manifest = Manifest((Artifact("job1", 0, "sub/x.bin", url),))
        return fetch(manifest, self.root, self._store, OPTIONS)

    def make_room(self) -> None:
        for folder in (FINAL, STATE):
            (self.root / folder).mkdir(parents=True)

    def is_safe(self) -> bool:
        return self.victim.read_bytes() == VICTIM and names(self.outside) == ["victim"]


@pytest.fixture
def site(origin: FaultyOrigin, store: PresignedStore, tmp_path: Path) -> Site:
    return Site(origin, store, tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Places:
    return Places(Folders(str(tmp_path / "down")), f"{FINAL}/x.bin")


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def device(path: Path, _: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # the null device


def socket(path: Path, _: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o666)


def symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


Plant = Callable[[Path, Path], None]
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, and gives files away")


@pytest.mark.parametrize("plant", [fifo, pytest.param(device, marks=ROOT), socket, symlink])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_before_the_download(
    site: Site, name: str, plant: Plant
) -> None:
    site.make_room()
    plant(site.root / name, site.victim)
    with pytest.raises(ResolveError, match="in the way") as caught:
        site.fetch()
    assert name in str(caught.value)
    assert site.is_safe()


@pytest.mark.parametrize("plant", [fifo, pytest.param(device, marks=ROOT), symlink, hard_link])
@pytest.mark.parametrize("name", [*PLACES, f"{STATE}/x.bin.journal.new"])
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_planted_later_is_neither_followed_nor_written_to(
    site: Site, name: str, plant: Plant, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who is faster than the check: nothing waits, and all ends right or refused."""
    site.make_room()
    plant(site.root / name, site.victim)
    monkeypatch.setattr(snapshot, "check_way", lambda root, artifacts: None)
    try:
        site.fetch(content)
    except DiskError:
        assert name.endswith(".part")
    else:
        whole = site.root / FINAL / "x.bin"
        assert whole.read_bytes() == content
        assert stat.S_ISREG(whole.lstat().st_mode)
    assert site.is_safe()


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("swapped", ["job1", "job1/rank-0", FINAL])
def test_a_folder_that_becomes_a_symlink_leads_nowhere(
    site: Site, swapped: str, content: bytes
) -> None:
    site.fetch()  # so that the folders are there
    before = len(names(site.outside))

    def swap() -> None:
        folder = site.root / swapped
        if not folder.is_symlink():
            folder.rename(site.root / "aside")
            folder.symlink_to(site.outside)

    site.origin.fail("x.bin", act(swap))
    site.origin.put("sub/x.bin", content[:-1] + b"!")
    with pytest.raises(LoaderError):
        site.fetch(content[:-1] + b"!")
    assert len(names(site.outside)) == before
    assert site.is_safe()


def test_state_that_becomes_a_symlink_leads_nowhere(site: Site) -> None:
    site.make_room()

    def swap() -> None:
        folder = site.root / STATE
        if not folder.is_symlink():
            folder.rename(site.root / "aside")
            folder.symlink_to(site.outside)

    site.origin.fail("x.bin", act(lambda: None), act(swap))
    site.fetch()
    assert (site.root / FINAL / "x.bin").read_bytes() == LARGE
    assert site.is_safe()


def test_a_part_file_that_was_exchanged_gets_no_name(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loader.fetch import part

    def exchange(fd: int, named: str) -> None:
        path = site.root / f"{STATE}/x.bin.part"
        path.unlink()
        path.write_bytes(b"x" * len(LARGE))

    monkeypatch.setattr(part, "check_structure", exchange)
    with pytest.raises(DiskError, match="another file has the part file's name"):
        site.fetch()
    assert not (site.root / FINAL / "x.bin").exists()


def test_folders_that_are_removed_meanwhile_are_made_again(place: Places) -> None:
    import shutil

    shutil.rmtree(place.folders.root, ignore_errors=True)
    for _ in range(2):
        held = lock_part(place)
        assert held is not None
        os.close(held[0])
        os.close(write_journal(place, {}, ()))
        shutil.rmtree(place.folders.root)


def record() -> Record:
    return Record(0, "", "http://h/x", None, 0, "", ())


@ROOT
def test_what_others_wrote_is_not_believed(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, record())
    assert read_record(place) == record()
    os.chmod(place.record, 0o666)  # noqa: PTH101
    assert read_record(place) is None
    os.chmod(place.record, 0o644)  # noqa: PTH101
    os.chown(place.record, 12345, 12345)
    assert read_record(place) is None
    monkeypatch.setattr(Folders, "_new_files", (12345, 0))  # such as a share that squashes root
    assert read_record(Places(Folders(place.folders.root), place.path)) == record()


@ROOT
def test_a_part_that_others_may_write_to_is_begun_anew(site: Site) -> None:
    site.make_room()
    path = site.root / f"{STATE}/x.bin.part"
    path.write_bytes(b"x" * len(LARGE))
    os.chown(path, 12345, 12345)
    with path.open("r+b") as kept:
        site.fetch()
        kept.write(b"changed behind our back")
    assert (site.root / FINAL / "x.bin").read_bytes() == LARGE


def test_a_record_without_end_is_none(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, record())
    os.truncate(place.record, files._STATE_BYTES + 1)
    assert read_record(place) is None


def test_many_folders_take_few_descriptors(tmp_path: Path) -> None:
    gc.collect()
    before = len(names(Path("/proc/self/fd")))
    folders = Folders(str(tmp_path / "down"))
    for number in range(600):
        write(Places(folders, f"job/rank-0/{number}/x"), record())
    assert len(names(Path("/proc/self/fd"))) - before < 200
    assert folders.moved() == []
    assert Places(folders, "job/rank-0/3/x").stat(WHOLE) is None
    del folders
    assert len(names(Path("/proc/self/fd"))) <= before
