"""The REST API as it is met: pages, limits of rate, refusals, jobs that are still being copied."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing

import pytest

from loader import boot
from loader.config.credentials import Secret
from loader.config.settings import Settings
from loader.errors import ConfigError, DeniedError, FetchError, ListingError, TransientError
from loader.http.client import HttpClient, HttpOptions
from loader.stores.baseten import Api as ApiClient
from loader.stores.baseten import JobFiles
from loader.stores.registry import Stores
from loader.types import Listing
from tests.origin import FaultyOrigin
from tests.stores.api import KEY, Api


@pytest.fixture
def api(origin: FaultyOrigin) -> Iterator[Api]:
    for i in range(5):
        origin.put(f"checkpoint-10/f{i}", bytes(i))
    found = Api(origin)
    yield found
    found.stop()


def read(api: Api, job: str = "job1", key: str = KEY, retries: int = 3) -> Listing:
    own = {"api_url": api.url + "/", "retries": retries}
    with closing(Stores(Settings.without_config(own, secrets={"baseten_api_key": key}))) as stores:
        (listing,) = stores.read_listings("baseten", (job,))
    return listing


def config(api: Api, **training: object) -> Mapping[str, object]:
    references = [{"training_job_id": "job1", "paths": ["rank-0/checkpoint-10/"]}]
    return {
        "training_checkpoints": {"artifact_references": references} | training,
        "model_metadata": {"podloader": {"artifacts": "baseten", "api_url": api.url}},
    }


def test_every_page_until_the_total(api: Api) -> None:
    listing = read(api)
    assert [a.name for a in listing.artifacts] == [f"rank-0/checkpoint-10/f{i}" for i in range(5)]
    assert [a.size_bytes for a in listing.artifacts] == [0, 1, 2, 3, 4]
    assert listing.total_count == 5
    pages = [path for path in api.requests if path.endswith("checkpoint_files")]
    assert len(pages) == 3
    assert api.requests[0] == "POST /v1/training_jobs/search"


def test_the_plan_of_a_config(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    manifest = boot.plan(Settings.load(config(api)))
    assert len(manifest.files) == 5
    assert manifest.warnings == ()


def test_pages_that_end_before_the_total(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    api.changes = {"next_page_token": None}
    with pytest.raises(ListingError, match="total_count"):
        boot.plan(Settings.load(config(api)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"next_page_token": 1}, "circle"),
        ({"next_page_token": "2"}, "circle"),
        ({"presigned_urls": None}, "page of files"),
        ({"total_count": "many"}, "page of files"),
        ({"presigned_urls": [{"url": "http://169.254.169.254/x"}]}, "wrong entry"),
    ],
)
def test_pages_that_are_wrong(api: Api, changes: dict[str, object], said: str) -> None:
    api.changes = changes
    with pytest.raises(ListingError, match=said):
        read(api)


def test_pages_that_repeat_without_an_end(api: Api) -> None:
    page = api.answer

    def repeat(method: str, path: str, query: dict[str, str], body: object) -> object:
        token = int(query.get("page_token", 0))
        status, found = page(method, path, query | {"page_token": "0"}, body)
        return status, found | (
            {"next_page_token": token + 2} if "next_page_token" in found else {}
        )

    api.answer = repeat  # type: ignore[method-assign,assignment]
    with pytest.raises(ListingError, match="circle") as caught:
        read(api)
    assert caught.value.got == "0 other files, next_page_token 4"


@pytest.mark.parametrize("times", [1, 9])
def test_a_file_that_is_removed_while_pages_are_read(
    api: Api, origin: FaultyOrigin, times: int
) -> None:
    for i in range(5, 12):
        origin.put(f"checkpoint-10/f{i:02}", b"x")
    page = api.answer
    removed: list[str] = []

    def remove(method: str, path: str, query: dict[str, str], body: object) -> object:
        found = page(method, path, query, body)
        if query and "page_token" not in query and len(removed) < times:  # behind the first page
            names = sorted(p.name for p in (origin.folder() / "checkpoint-10").iterdir())
            removed.append(names[0])
            (origin.folder() / "checkpoint-10" / names[0]).unlink()
        return found

    api.answer = remove  # type: ignore[method-assign,assignment]
    if times > 3:
        with pytest.raises(ListingError, match="removed while they are listed"):
            read(api)
        return
    names = [a.name.rpartition("/")[2] for a in read(api).artifacts]
    assert names == sorted(p.name for p in (origin.folder() / "checkpoint-10").iterdir())
    assert len(names) == 11


def test_a_file_that_is_added_while_pages_are_read(api: Api, origin: FaultyOrigin) -> None:
    page = api.answer

    def add(method: str, path: str, query: dict[str, str], body: object) -> object:
        found = page(method, path, query, body)
        origin.put("checkpoint-10/a", b"new")
        return found

    api.answer = add  # type: ignore[method-assign,assignment]
    listing = read(api)
    assert {f"rank-0/checkpoint-10/f{i}" for i in range(5)} <= {a.name for a in listing.artifacts}


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_it_is_asked_again_when_it_says_so(
    api: Api, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("loader.retry.sleep_using_event", lambda event: wait)
    api.refusals = [(code, {"Retry-After": "7"}), (code, {})]
    assert len(read(api).artifacts) == 5
    assert waited[0] == 7
    assert waited[1] < 7


def test_a_limit_that_does_not_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.retry._FIRST_WAIT_S", 0.01)
    api.refusals = [(429, {})] * 10
    with pytest.raises(TransientError, match="429"):
        read(api, retries=2)
    assert len(api.refusals) == 7


def test_a_key_that_is_not_taken(api: Api) -> None:
    with pytest.raises(DeniedError, match="key") as caught:
        read(api, key="S3CR3T-wrong")
    assert "BASETEN_API_KEY" in caught.value.next_step
    assert "S3CR3T" not in f"{caught.value}{caught.value!r}"
    assert len(api.requests) == 1


def test_no_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASETEN_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="key"):
        boot.plan(Settings.load(config(api)))


def test_a_job_that_is_not_there(api: Api) -> None:
    with pytest.raises(ListingError, match="no such training job"):
        read(api, job="none")


def test_checkpoints_that_are_still_being_copied(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    api.syncing = {"checkpoint-10": "SYNCING", "checkpoint-20": "SYNCING", "c": "COMPLETE"}
    assert read(api).syncing == ("checkpoint-10", "checkpoint-20")
    (warning,) = boot.plan(Settings.load(config(api))).warnings
    assert "'checkpoint-10' is still being copied" in warning


def test_an_api_that_does_not_tell_of_checkpoints(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.refusals = []
    answer = api.answer

    def without(method: str, path: str, query: dict[str, str], body: object) -> object:
        return (404, {}) if path.endswith("/checkpoints") else answer(method, path, query, body)

    api.answer = without  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.WARNING):
        assert len(read(api).artifacts) == 5
    assert "not known" in caplog.text


def test_something_else_than_the_api(origin: FaultyOrigin, api: Api) -> None:
    api.answer = lambda *_: (200, ["no object"])  # type: ignore[method-assign]
    with pytest.raises(ListingError, match="no JSON object"):
        read(api)
    nothing = Settings.without_config(
        {"api_url": f"http://127.0.0.1:{origin.server_port}", "retries": 0},
        secrets={"baseten_api_key": KEY},
    )
    with closing(Stores(nothing)) as stores, pytest.raises(FetchError):
        stores.read_listings("baseten", ("job1",))


def test_inspect_names_the_job_itself(api: Api) -> None:
    own = Settings.without_config({"api_url": api.url}, secrets={"baseten_api_key": KEY})
    with closing(Stores(own)) as stores:
        assert len(stores.read_listings("baseten:job1")[0].artifacts) == 5
        with pytest.raises(ConfigError, match="which training job"):
            stores.read_listings("baseten")


def test_loops_checkpoints(api: Api, origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", KEY)
    for i in range(3):
        origin.put(f"adapter/f{i}", b"1", job="loops1")
    section = {"loops_checkpoint_ids": ["loops1"]}
    settings = Settings.load({**config(api), "training_checkpoints": section})
    manifest = boot.plan(settings)
    assert [a.path for a in manifest.files] == [f"loops1/rank-0/adapter/f{i}" for i in range(3)]
    assert manifest.warnings == ()
    assert set(api.requests) == {"GET /v1/loops/checkpoints/loops1/files"}


def test_files_are_counted_page_by_page(api: Api) -> None:
    told: list[int] = []
    client = HttpClient(HttpOptions(link_local=True))
    JobFiles(ApiClient(client, api.url, Secret(KEY), 0), "job1", told.append).read()
    client.close()
    assert told == [2, 2, 1]
