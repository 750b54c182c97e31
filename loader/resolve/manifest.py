"""TrainingCheckpoints + listings -> Manifest. Every problem of one kind is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from loader.errors import ListingError, ResolveError
from loader.resolve.patterns import compile_pathwise, compile_pattern
from loader.types import JOB_ID, Artifact, Listing, Manifest, TrainingCheckpoints

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<i>\d{5,9})-of-(?P<n>\d{5,9})(?P<ext>\.safetensors|\.bin)$")
_CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f]")
_PATH_BYTES = 3000  # leaves room below PATH_MAX for the download folder
_MOST_SHARDS = 100_000  # that are looked for, whatever count the names say
_MOST_FOLDERS = 100  # each of which is opened in the one above it
_NAME_BYTES = 240  # leaves room below NAME_MAX for the temporary file's suffix


NO_FILES = "get the listing again once the job has written a checkpoint"


def resolve(
    config: TrainingCheckpoints, listings: Sequence[Listing], *, case_sensitive: bool = True
) -> Manifest:
    """Return the files that *config* asks for, each once, sorted by path.

    ``case_sensitive`` tells of the file system that will hold them.

    Raises:
        ListingError: a job has no listing, or one shorter than its ``total_count``.
        ResolveError: patterns that match nothing, unsafe or colliding names, missing shards.
    """
    by_job: dict[str, list[Artifact]] = {}
    for listing in listings:
        check_count(listing)
        by_job.setdefault(listing.job, []).extend(listing.artifacts)
    wanted = {reference.training_job_id for reference in config.artifact_references}
    if absent := sorted(wanted - set(by_job)):
        raise ListingError(
            "no listing for a job that is asked for",
            expected=", ".join(absent),
            got=", ".join(sorted(by_job)) or "no listing at all",
            next_step="give the listing of that job, or correct its name: --job-id, or "
            "training_job_id in the config",
        )
    chosen: dict[str, Artifact] = {}
    unmatched: list[str] = []
    warnings: list[str] = []
    for reference in config.artifact_references:
        artifacts = by_job[reference.training_job_id]
        for pattern in reference.paths:
            hits = _matching(pattern, artifacts)
            if not hits:
                unmatched.append(_explain_unmatched(reference.training_job_id, pattern, artifacts))
            if warning := _pathwise_warning(pattern, hits):
                warnings.append(warning)
            for hit in hits:
                _add(chosen, hit)
    if unmatched:
        correct = "correct the patterns: artifact_references[].paths, or the command line's"
        raise ResolveError(
            "patterns that match no file of the listing",
            problems=unmatched,
            next_step=correct if any(map(by_job.get, wanted)) else NO_FILES,
        )
    files = tuple(sorted(chosen.values(), key=lambda a: a.path))
    check_names(files, case_sensitive=case_sensitive)
    check_shards(files, {a.path for artifacts in by_job.values() for a in artifacts})
    warnings += [w for listing in listings for w in _syncing_warnings(listing, files)]
    return Manifest(files, tuple(warnings))


def _syncing_warnings(listing: Listing, files: Sequence[Artifact]) -> list[str]:
    return [
        f"{listing.job}: {name!r} is still being copied; files of it may be missing"
        for name in listing.syncing
        if any(a.job == listing.job and f"/{name}/" in a.name for a in files)
    ]


def _matching(pattern: str, artifacts: Iterable[Artifact]) -> list[Artifact]:
    match = compile_pattern(pattern)
    return [a for a in artifacts if match(a.name)]


def _add(chosen: dict[str, Artifact], hit: Artifact) -> None:
    known = chosen.get(hit.path)
    # Sizes may differ only by one being unknown; URLs differ by signature between listings.
    sizes = known is not None and {known.size_bytes, hit.size_bytes} - {None}
    if known is not None and (known.source != hit.source or (sizes and len(sizes) > 1)):
        raise ResolveError(
            "two different files would land at one place",
            where=hit.path,
            got=" and ".join(f"{a.source} ({_size(a)})" for a in (known, hit)),
            next_step="give each job's listing once, the newest",
        )
    if known is None or known.size_bytes is None:
        chosen[hit.path] = hit


def _size(artifact: Artifact) -> str:
    return "size unknown" if artifact.size_bytes is None else f"{artifact.size_bytes} bytes"


def _explain_unmatched(job: str, pattern: str, artifacts: Sequence[Artifact]) -> str:
    if pattern.endswith("/"):
        names = {a.name.rpartition("/")[0] + "/" for a in artifacts}
    else:
        names = {a.name for a in artifacts}
    # Edit distance is slow: ask it only about the names that begin most alike.
    names_by_likeness = sorted(names, key=lambda n: (-_alike(n, pattern), n))
    import difflib  # only mistakes need it

    near = difflib.get_close_matches(pattern, names_by_likeness[:500], n=3, cutoff=0.3)
    told = f"nearest in the listing: {', '.join(near) or 'nothing'}"
    return f"{job}: {pattern!r}; {told if artifacts else 'its listing is empty'}"


def _alike(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _pathwise_warning(pattern: str, hits: Sequence[Artifact]) -> str | None:
    if "*" not in pattern and "?" not in pattern:
        return None
    pathwise = compile_pathwise(pattern)
    extra = [a.name for a in hits if not pathwise(a.name)]
    if not extra:
        return None
    return (
        f"{pattern!r}: '*' also crosses '/', so {len(extra)} of {len(hits)} files are taken that "
        f"a path-wise reading would leave out, such as {extra[0]!r}"
    )


def check_count(listing: Listing) -> None:
    """Raise ListingError when *listing* holds fewer entries than it says it has."""
    if listing.total_count is not None and len(listing.artifacts) < listing.total_count:
        raise ListingError(
            "the listing is shorter than its total_count",
            where=f"job {listing.job}",
            expected=f"{listing.total_count} files",
            got=f"{len(listing.artifacts)} files",
            next_step="get the listing again, with every page of it",
        )


def check_names(files: Sequence[Artifact], *, case_sensitive: bool = True) -> None:
    """Raise ResolveError naming every file that would not land inside its own folder."""
    paths = {a.path for a in files}
    folders: dict[str, list[str]] = {}
    problems: list[str] = []
    for a in files:
        folder, _, base = a.path.rpartition("/")
        if folder not in folders:
            folders[folder] = _folder_problems(folder, paths)
        found = folders[folder] or _part_problems(base)
        if _is_longer(a.path, _PATH_BYTES):
            found = [f"a path longer than {_PATH_BYTES} bytes"]
        if found:
            problems += [f"{a.path!r}: {problem}" for problem in found]
    if not case_sensitive:
        import unicodedata  # such file systems take é for one letter however it is written

        folded: dict[str, str] = {}
        alike = ((unicodedata.normalize("NFC", path.casefold()), path) for path in sorted(paths))
        pairs = ((folded.setdefault(key, path), path) for key, path in alike)
        problems += [f"{p!r} and {o!r} differ only in case" for o, p in pairs if o != p]
    if problems:
        raise ResolveError(
            "file names that are refused",
            problems=problems,
            next_step="leave these files out by a narrower pattern",
        )


def _folder_problems(folder: str, paths: set[str]) -> list[str]:
    """Return what is wrong with ``<job>/rank-<N>/<folder>``, given all files' *paths*."""
    parts = folder.split("/")
    if len(parts) > _MOST_FOLDERS:
        return [f"more than {_MOST_FOLDERS} folders, one in the other"]
    problems = [problem for part in parts for problem in _part_problems(part)]
    if not JOB_ID.fullmatch(parts[0]) or not parts[1].removeprefix("rank-").isdecimal():
        problems.append("the job id or the rank is not a plain name")
    if any("/".join(parts[:depth]) in paths for depth in range(3, len(parts) + 1)):
        problems.append("a folder of it is also a file in the listing")
    return problems


def _is_longer(text: str, most_bytes: int) -> bool:
    return len(text) > most_bytes // 4 and len(text.encode(errors="replace")) > most_bytes


def _part_problems(part: str) -> list[str]:
    problems: list[str] = []
    if part in ("", ".", "..") or "\0" in part or "\\" in part:
        problems.append("leaves its folder, or is no relative file name")
    if not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
        problems.append("a name that is not valid Unicode")
    if _CONTROL.search(part):
        problems.append("a control character in a name")
    if _is_longer(part, _NAME_BYTES):
        problems.append(f"a name longer than {_NAME_BYTES} bytes")
    return problems


def check_shards(files: Sequence[Artifact], listed: set[str]) -> None:
    """Raise ResolveError for every shard ``i-of-n`` beside the chosen ones that is not *listed*.

    Ranks of one job count as one checkpoint: its shards may be spread over them.
    """
    sets: dict[tuple[str, str, int, str], set[int]] = {}
    chosen: set[tuple[str, str, int, str]] = set()
    wanted = {a.path for a in files}
    for path in listed:
        job, _, relative = path.split("/", 2)
        match = _SHARD.match(relative) if "-of-" in relative else None
        if match:
            key = (job, match["stem"], int(match["n"]), match["ext"])
            sets.setdefault(key, set()).add(int(match["i"]))
            if path in wanted:
                chosen.add(key)
    holes = (
        f"{key[0]}: {key[1]}-{i:05d}-of-{key[2]:05d}{key[3]}"
        for key in sorted(chosen)
        for i in range(key[2] + 1)
        if i not in sets[key] and i != (key[2] if 0 in sets[key] else 0)
    )
    _refuse_holes(list(islice(holes, _MOST_SHARDS)))


def check_index(job: str, index_name: str, shard_names: Iterable[str], listed: set[str]) -> None:
    """Raise ResolveError for every shard that an index names and no rank of *job* lists.

    ``index_name`` is ``rank-<N>/<folder>/<file>``; shards are looked for in the same folder of
    every rank.
    """
    folder = index_name.split("/", 1)[1].rpartition("/")[0]
    relative = {path.split("/", 2)[2] for path in listed if path.startswith(f"{job}/")}
    lacks = (n for n in sorted(set(shard_names)) if f"{folder}/{n}".lstrip("/") not in relative)
    _refuse_holes([f"{job}: {index_name} names {n}" for n in lacks])


def _refuse_holes(holes: Sequence[str]) -> None:
    if holes:
        raise ResolveError(
            "shards that the listing lacks",
            problems=holes,
            next_step="wait until the training job has uploaded them, or give a newer listing",
        )
