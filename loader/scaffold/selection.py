"""What a command line asks for: a Truss config, or a source of artifacts alone; flags over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.errors import ConfigError
from loader.types import ArtifactReference, TrainingCheckpoints

if TYPE_CHECKING:
    from loader.config.settings import Settings
    from loader.stores.base import Progress

LATEST = "latest"  # among checkpoints, the one of the highest step
_CONFIG = "config.yaml"
_ALL = "rank-*/"  # every file of every node


@dataclass(frozen=True, slots=True)
class Selection:
    """The words: *target* is CONFIG or SRC; ``config`` and ``artifacts`` say which it is.

    ``jobs``, ``checkpoints`` and ``patterns`` choose among what the artifacts hold; one that is
    empty leaves the choice to the config, or takes everything.
    """

    target: str | None = None
    config: Path | None = None
    artifacts: tuple[str, ...] = ()
    download_folder: Path | None = None
    jobs: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    @property
    def config_file(self) -> Path | None:
        """The Truss config that is meant, None where there is none."""
        if self.config is not None or self.target is None:
            return _file_in(self.config) if self.config is not None else None
        path = Path(self.target)
        is_config = path.suffix in (".yaml", ".yml") or (path / _CONFIG).is_file()
        return _file_in(path) if is_config else None

    def settings(
        self,
        overrides: Mapping[str, Any],
        progress: Progress | None = None,
        *,
        default: Sequence[str] = (),
    ) -> Settings:
        """Return the settings; *default* are the checkpoints to take where nothing chooses.

        Raises:
            ConfigError: neither a config nor a source, or a choice that nothing fits.
            LoaderError: as ``Settings.load``; of a source, as its listing is read.
        """
        from loader.config.settings import Settings  # the parser knows this class, and is quick

        config, artifacts = self.config_file, self.artifacts
        if config is None and not artifacts and self.target is None:
            raise ConfigError(
                "neither a config nor a source of artifacts",
                expected="CONFIG, a Truss config.yaml or its folder, or SRC: a listing's path or "
                "URL, s3://…, baseten, or an fsspec URL",
                next_step="give one of them",
            )
        patterns = self.patterns
        if self.target is not None and (self.config is not None or config is None):
            if artifacts:
                patterns = (self.target, *patterns)
            else:
                artifacts = (self.target,)
        if patterns and self.checkpoints:
            raise ConfigError(
                "--checkpoint and patterns both say which files to take",
                got=f"--checkpoint {self.checkpoints[0]}, and the pattern {patterns[0]}",
                next_step="give one of them; a pattern names a checkpoint's folder, too",
            )
        own = dict(overrides) | ({"artifacts": artifacts} if artifacts else {})
        settings = Settings.load(config, overrides=own) if config else Settings.without_config(own)
        training = settings.training
        if config is None or self.jobs or self.checkpoints or patterns:
            chosen = replace(
                self, patterns=patterns, checkpoints=self.checkpoints or tuple(default)
            )
            references = chosen._references(settings, progress)
            training = TrainingCheckpoints(training.download_folder, references)
        if self.download_folder is not None:
            training = replace(training, download_folder=self.download_folder.absolute())
        return replace(settings, training=training)

    def _references(
        self, settings: Settings, progress: Progress | None
    ) -> tuple[ArtifactReference, ...]:
        if self.checkpoints and not self.patterns:
            from loader.scaffold.choice import choose  # reads the small files that tell
            from loader.scaffold.survey import survey

            chosen = choose(
                survey(settings.artifacts, self.jobs, settings, progress), self.checkpoints
            )
            return tuple(ArtifactReference(found.job, found.patterns) for found in chosen)
        jobs = self.jobs or _jobs_of(settings, progress)
        return tuple(ArtifactReference(job, self.patterns or (_ALL,)) for job in jobs)


def _file_in(path: Path) -> Path:
    return path / _CONFIG if path.is_dir() else path


def _jobs_of(settings: Settings, progress: Progress | None) -> tuple[str, ...]:
    """Return the jobs that the settings' artifacts hold."""
    from loader.stores.registry import Stores

    store = Stores(settings, progress=progress)
    try:
        jobs = [job for source in settings.artifacts for job in store.find_jobs(source)]
    finally:
        store.close()
    return tuple(dict.fromkeys(jobs))
