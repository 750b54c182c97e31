"""What the user asked for: one Truss ``config.yaml``, ``PODLOADER_*`` over it, arguments over both.

The only place that reads the environment. Secrets are looked up by name and kept as ``Secret``.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from loader.config.credentials import (
    S3Credentials,
    Secret,
    Secrets,
    find_s3_credentials,
    find_secret,
)
from loader.config.paths import place_path
from loader.config.truss_config import (
    DOWNLOAD_FOLDER,
    mapping_at,
    read_config,
    training_checkpoints,
)
from loader.config.values import Bytes, Words, read_value, show_value
from loader.errors import ConfigError, redact
from loader.json_text import parse_json
from loader.types import CONFIG_VARIABLE, JOB_ID, STREAM_VARIABLE, TrainingCheckpoints

CHECKPOINT_SCHEME = "checkpoint:"
_PREFIX = "PODLOADER_"
_SECTION = "model_metadata.podloader"
_JSON = {"engine_args": '{"max_model_len": 4096}', "storage_options": '{"gs": {"token": "anon"}}'}
_CHECKPOINT = re.compile(rf"{CHECKPOINT_SCHEME}{JOB_ID.pattern}/rank-[^/]+(/.*)?")
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_OTLP_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TOKEN_VARIABLE = "PODLOADER_PEERS_TOKEN"
_OUTSIDE = {"training", "hf_token", "api_key", "peers_token", "s3", "origins"}
COMMAND_LINE = "the command line"


@dataclass(frozen=True, slots=True)
class CheckpointName:
    """A folder of a training job: ``name`` is ``rank-<N>/<folder>``, without a slash at its end."""

    job: str
    name: str


def _setting(
    default: Any,
    *,
    description: str,
    written: str = "",
    repr: bool = True,  # noqa: A002 - as field's
) -> Any:
    """Return a field of ``Settings`` with its line of the table in docs/settings.md.

    *written*: how a person would write the default, where that is not its JSON.
    """
    metadata = {"description": description, "written": written}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata, repr=repr)
    return field(default=default, metadata=metadata, repr=repr)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """podloader's own settings, the training checkpoints they are about, and the secrets.

    ``origins``: where the value of each setting came from that is not the default's.
    """

    training: TrainingCheckpoints
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    hf_token: Secret | None = None
    api_key: Secret | None = None
    peers_token: Secret | None = None
    s3: S3Credentials = S3Credentials()

    artifacts: Words = _setting(
        (),
        repr=False,
        description="Where the artifacts are: listing JSON files (paths or URLs), "
        "`s3://bucket/prefix`, `baseten` (its REST API), a URL that fsspec knows, or `local`: what "
        "lies in the download folder, which is taken where nothing is named, too.",
    )
    base_model: str | None = _setting(
        None,
        description="The model that adapters were trained over: a local folder, a Hugging Face id, "
        "`checkpoint:<job>/rank-<N>/<folder>/`, or a folder's URL such as `s3://bucket/model`. "
        "Default: what the adapter's config names.",
    )
    base_revision: str | None = _setting(
        None, description="Branch, tag or commit of a Hugging Face base model."
    )
    adapter_policy: Literal["auto", "attach", "merge"] = _setting(
        "auto",
        description="`attach`: the engine serves adapters by name. `merge`: one adapter is folded "
        "into the base's weights. `auto`: whichever makes the faster server "
        "([Adapters](adapters.md)).",
    )
    adapter_jobs: Words = _setting(
        (),
        description="Jobs whose adapters a request to the server may name as `<job>/<checkpoint>`; "
        "they are fetched on first use.",
    )
    exact: Literal["float32", "peft"] = _setting(
        "float32",
        description="How merged weights are rounded: once, from float32, or wherever PEFT rounds, "
        "which gives the bits of its `merge_and_unload`.",
    )
    dequantise: bool = _setting(
        False,
        description="Merge into a quantised base (FP8, compressed-tensors with scales, "
        "bitsandbytes) by writing all weights in full precision; without it, that is an error.",
    )
    canary: bool = _setting(
        True,
        description="Before the model counts as ready, every attached adapter has to answer a "
        "prompt unlike its base; one that does not stops the start.",
    )
    engine: Literal["vllm", "transformers"] = _setting(
        "vllm", description="What answers: vLLM, or transformers + PEFT for smoke tests."
    )
    engine_start: Literal["auto", "stream", "files"] = _setting(
        "auto",
        description="When vLLM takes the weights: `stream` as they arrive, merged or as they are, "
        "or `files` when all are here and proved. `auto`: `stream` where that can be.",
    )
    engine_args: dict[str, Any] = _setting(
        {},
        repr=False,
        description="Arguments of the engine, named as vLLM's `AsyncEngineArgs` names them.",
    )
    served_model_name: str | None = _setting(
        None,
        description="The name requests give the model. Default: its folder's, a merged adapter's "
        "own.",
    )
    kernel_cache: str | None = _setting(
        None,
        description="Where vLLM's compiled kernels are kept for other pods: a folder, or "
        "`s3://<bucket>/<prefix>`. They are brought before the engine starts. They are code: "
        "whoever can write there runs code in the pods that read it "
        "([Deploying](deploying.md#compiled-kernels-from-pod-to-pod)).",
    )
    kernel_cache_publish: bool = _setting(
        True,
        description="Publish them there, once the model is ready, where they are not there yet; "
        "`false` reads alone.",
    )
    concurrency: Annotated[int, Meta(ge=1, le=256)] = _setting(
        16,
        description="The most connections that download at the same time; fewer where more bring "
        "nothing.",
    )
    range_size: Annotated[Bytes, Meta(ge=2**16)] = _setting(
        16 * 2**20,
        written="16MiB",
        description="The least that is asked for of a large file, such as `16MiB`; proved and "
        "resumed alone.",
    )
    cache_folder: Path | None = _setting(
        None,
        description="Where merged and consolidated models are kept. Default: `.podloader` in the "
        "download folder.",
    )
    weights_only_fetch: bool = _setting(
        False,
        description="Fetch only what serving uses: no optimizer, scheduler and RNG state, and of "
        "weights sharded over ranks only the bytes of the model itself.",
    )
    consolidate_dtype: Literal["float32", "float16", "bfloat16"] | None = _setting(
        None,
        description="What weights sharded over ranks are written as when they are consolidated. "
        "Default: as they were trained.",
    )
    verify: Literal["size", "sample", "full"] = _setting(
        "sample",
        description="What a file that an earlier start fetched has to prove: its size and time "
        "stamp, the digests of a few ranges as well, or the digest of every byte. `full` "
        "also compares what the origin says of large new files ([How it fails](failures.md)).",
    )
    accept_unwritten: bool = _setting(
        False,
        description="Take a file that another tool laid into the download folder although parts of "
        "it were never written (a sparse file), where no origin can be asked whether they are "
        "zeros.",
    )
    allow_pickle: bool = _setting(
        False, description="Read `.bin` and `.pt` weights, restricted to tensors."
    )
    trust_remote_code: bool = _setting(
        False, description="Let transformers and vLLM run code that lies in the checkpoint."
    )
    ca_bundle: Path | None = _setting(
        None, description="PEM file of certificates to trust besides the system's."
    )
    connect_timeout_s: Annotated[float, Meta(gt=0)] = _setting(
        10.0, description="Limit for opening a connection, with its TLS handshake."
    )
    stall_timeout_s: Annotated[float, Meta(gt=0)] = _setting(
        30.0,
        description="Limit for an answer's head, and the longest that a body may be slow or "
        "silent: 2 s at first, doubled each time that it is asked for again.",
    )
    openssl_reads: bool = _setting(
        True,
        description="Let OpenSSL read a TLS connection by itself, through memory of CPython's that "
        "is proved first. `false`: Python's `ssl` alone, in more processor time.",
    )
    least_bytes_per_s: Annotated[Bytes, Meta(ge=0)] = _setting(
        4 * 2**10,
        written="4KiB",
        description="What a connection has to bring not to count as slow.",
    )
    s3_endpoint_url: Annotated[str, Meta(pattern="^https?://")] | None = _setting(
        None,
        description="The service behind `s3://`. Default: `AWS_ENDPOINT_URL_S3`, "
        "`AWS_ENDPOINT_URL`, AWS's own.",
    )
    storage_options: dict[str, dict[str, Any]] = _setting(
        {},
        repr=False,
        description="Options of fsspec's drivers by scheme, such as `{gs: {token: anon}}`.",
    )
    api_url: Annotated[str, Meta(pattern="^https?://")] = _setting(
        "https://api.baseten.co",
        description="Where the REST API is that `baseten` asks.",
    )
    allow_local_urls: bool = _setting(
        False,
        description="Let a listing lead to `file://` URLs and link-local addresses, where clouds "
        "keep credentials.",
    )
    trusted_folders: Words = _setting(
        (),
        description="Folders that what was fetched may lead to, such as the local base that an "
        "adapter's config names, and symlinks of files that lie in the download folder; besides "
        "them only the download and the cache folder.",
    )
    allow_insecure_redirects: bool = _setting(
        False, description="Follow redirects from https to http."
    )
    peers: Words = _setting(
        (),
        description="The other pods with this model: `dns://<headless service>`, `ray`, or a list "
        "of `host[:port]`. Each serves the others what it has, and the origin sends one copy. "
        "Needs the secret `podloader_peers_token`, the same in every pod.",
    )
    peers_port: Annotated[int, Meta(ge=1, le=65535)] = _setting(
        8790, description="Where this pod serves the others, and they serve it."
    )
    peers_certificate: Path | None = _setting(
        None,
        description="PEM file of the certificate that every pod shows to the others, and the only "
        "one that it takes from them. Default: no TLS; the token never travels, the bytes do.",
    )
    peers_key: Path | None = _setting(
        None, description="PEM file of its key, where that is in a file of its own."
    )
    peers_upload_rate: Annotated[Bytes, Meta(ge=0)] = _setting(
        0, description="The most bytes a second that the others are sent; 0: as many as go."
    )
    peers_linger_s: Annotated[float, Meta(ge=0)] = _setting(
        300.0,
        description="How long `serve` goes on serving the others when it is ready, and `fetch` and "
        "`prepare` when they are done, these where it is set.",
    )
    retries: Annotated[int, Meta(ge=0, le=100)] = _setting(
        6, description="Further tries of one range after a passing failure."
    )
    drain_timeout_s: Annotated[float, Meta(ge=0)] = _setting(
        20.0,
        description="What `serve` gives requests under way after SIGTERM or SIGINT; 5 s later the "
        "pod has ended, whatever hangs.",
    )
    on_failure: Literal["exit", "hold"] = _setting(
        "exit",
        description="When `serve` cannot start: `exit` with the documented code, or `hold` and "
        "answer `/health` with the reason until a signal comes.",
    )

    @property
    def user_cache(self) -> Path:
        """Where what has no folder of its own is kept: ``cache_folder``, else the user's cache."""
        if self.cache_folder is not None:
            return self.cache_folder
        if home := os.environ.get("XDG_CACHE_HOME"):
            return Path(home, "podloader")
        with contextlib.suppress(RuntimeError):  # no HOME, and no entry in passwd
            return Path("~/.cache/podloader").expanduser()
        with contextlib.suppress(OSError):  # no folder for temporary files either
            return Path(tempfile.gettempdir(), "podloader")
        return self.training.download_folder / "podloader"

    def __repr__(self) -> str:
        """Return the settings without secrets, which a URL among them may hold."""
        shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
        return redact(f"Settings({', '.join(shown)})")

    @property
    def base_checkpoint(self) -> CheckpointName | None:
        """The base model, where it is another training checkpoint."""
        if self.base_model is None or not self.base_model.startswith(CHECKPOINT_SCHEME):
            return None
        job, _, name = self.base_model.removeprefix(CHECKPOINT_SCHEME).partition("/")
        return CheckpointName(job, name.rstrip("/"))

    @classmethod
    def load(
        cls,
        config: Path | str | Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] | None = None,
        secrets: Secrets | None = None,
        folder: Path | None = None,
    ) -> Settings:
        """Return the settings of a Truss config, given as a file or as its contents.

        ``overrides`` win over ``PODLOADER_*``, which win over the config. ``secrets`` are Truss's.
        Relative paths in the config are relative to *folder*, by default the file's own.

        Raises:
            ConfigError: naming every key that is wrong.
        """
        where, document = read_config(config)
        section = mapping_at(document, "model_metadata.podloader", where)
        if hidden := sorted(_OUTSIDE & set(section)):
            raise ConfigError(
                f"not a setting of {_SECTION}: {', '.join(hidden)}",
                where=where,
                next_step="put secrets into Truss's secrets, training_checkpoints at the top level",
            )
        given, origins = _given(where, overrides)
        training = training_checkpoints(document, where)
        folders = [folder] if folder is not None else []
        if not folders and not isinstance(config, Mapping):
            folders = [Path(config).parent, Path(os.path.realpath(config)).parent]
        if folders:
            down = place_path(str(training.download_folder), folders, "download_folder")
            training = replace(training, download_folder=Path(down))
        own = set(section) - set(given) if folders else set()
        origins = dict.fromkeys(section, where) | origins
        settings = cls._build(where, {**section, **given}, training, secrets, origins)
        return replace(settings, **{n: _placed(n, getattr(settings, n), folders) for n in own})

    @classmethod
    def without_config(
        cls, overrides: Mapping[str, Any] | None = None, *, secrets: Secrets | None = None
    ) -> Settings:
        """Return the settings for a command that asks for no training checkpoints.

        Raises:
            ConfigError: naming every ``PODLOADER_*`` variable or override that is wrong.
        """
        where = "the environment"
        values, origins = _given(where, overrides)
        nothing = TrainingCheckpoints(Path(DOWNLOAD_FOLDER), ())
        return cls._build(where, values, nothing, secrets, origins)

    @classmethod
    def _build(
        cls,
        where: str,
        values: Mapping[str, Any],
        training: TrainingCheckpoints,
        secrets: Secrets | None,
        origins: Mapping[str, str],
    ) -> Settings:
        kinds = get_type_hints(cls, include_extras=True)
        found: dict[str, Any] = {}
        problems: list[str] = []
        for name, value in values.items():
            if name not in setting_names():
                problems.append(suggest(name, setting_names()))
                continue
            try:
                found[name] = read_value(value, kinds[name])
                if name == "base_model":
                    _check_base(found[name])
            except ValueError as error:
                problems.append(f"{name}, from {origins[name]}: {error}")
        if problems:
            raise ConfigError(
                "settings that are wrong",
                where=where if where in origins.values() else "",
                problems=problems,
                next_step="correct them; `podloader settings` lists every one",
            )
        return cls(
            training=training,
            origins=origins,
            hf_token=find_secret("hf_access_token", ("HF_TOKEN",), secrets),
            api_key=find_secret("baseten_api_key", ("BASETEN_API_KEY",), secrets),
            peers_token=find_secret("podloader_peers_token", (_TOKEN_VARIABLE,), secrets),
            s3=find_s3_credentials(secrets),
            **found,
        )

    def variables(self) -> dict[str, str]:
        """Return the ``PODLOADER_*`` variables that lead to these settings, whatever the config.

        There may be signed URLs among them, but no secrets.
        """
        given = {name: getattr(self, name) for name in setting_names()}
        return {
            _PREFIX + name.upper(): str(value)
            if isinstance(value, str | Path)
            else show_value(value)
            for name, value in given.items()
            if value is not None
        }


def _placed(name: str, value: Any, folders: Sequence[Path]) -> Any:
    """Return the *value* of a setting, where it is a path, as it is below one of *folders*."""
    if isinstance(value, Path):
        return Path(place_path(str(value), folders, name))
    if name == "kernel_cache" and value is not None:
        return place_path(value, folders, name)
    if name == "artifacts":
        return tuple(place_path(source, folders, name) for source in value)
    if name == "base_model" and value is not None:
        return place_path(value, folders, name, may_be_id=True)
    return value


def setting_names() -> tuple[str, ...]:
    """Return the names that may stand in ``model_metadata.podloader``, in the table's order."""
    return tuple(_settings())


def settings_table() -> str:
    """Return the documented settings as a Markdown table."""
    rows = ["| setting | variable | default | what it does |", "|---|---|---|---|"]
    for name, one in _settings().items():
        default = _default(one)
        shown = one.metadata["written"] or show_value(default)
        told = one.metadata["description"]
        rows.append(f"| `{name}` | `{_PREFIX}{name.upper()}` | `{shown}` | {told} |")
    return "\n".join(rows)


def setting_defaults() -> dict[str, Any]:
    """Return what each setting is where nobody says otherwise."""
    return {name: _default(one) for name, one in _settings().items()}


def setting_description(name: str) -> str:
    """Return what the table says of a setting."""
    return str(_settings()[name].metadata["description"])


def _settings() -> dict[str, Field[Any]]:
    return {one.name: one for one in fields(Settings) if one.name not in _OUTSIDE}


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if callable(one.default_factory) else one.default


def _check_base(value: str | None) -> None:
    if value is not None and value.startswith(CHECKPOINT_SCHEME):
        if not _CHECKPOINT.fullmatch(value):
            raise ValueError("expected checkpoint:<job>/rank-<N>/<folder>/")
    elif value == "":
        raise ValueError("expected a folder, a Hugging Face id or checkpoint:...")


def traces_exporter() -> str | None:
    """Return the OpenTelemetry exporter that the usual ``OTEL_*`` variables ask for, if any."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    chosen = os.environ.get("OTEL_TRACES_EXPORTER", "").partition(",")[0].strip()
    endpoint = any(os.environ.get(name) for name in _OTLP_ENDPOINTS)
    if chosen == "none" or not (chosen or endpoint):
        return None
    if chosen in ("", "otlp"):
        protocol = next(filter(None, map(os.environ.get, _OTLP_PROTOCOLS)), "http/protobuf")
        return "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    return chosen


def _given(
    where: str, overrides: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what variables and *overrides* say, and which of them said it."""
    environment, over = _environment(where), dict(overrides or {})
    origins = {name: _PREFIX + name.upper() for name in environment}
    return environment | over, origins | dict.fromkeys(over, COMMAND_LINE)


def _environment(where: str) -> dict[str, Any]:
    known = {_PREFIX + name.upper() for name in setting_names()}
    given = [name for name in os.environ if name.upper().startswith(_PREFIX)]
    own = (CONFIG_VARIABLE, STREAM_VARIABLE, _TOKEN_VARIABLE)
    given = [name for name in given if name not in own and not _is_service_link(name)]
    if unknown := sorted(name for name in given if name.upper() not in known):
        raise ConfigError(
            f"{_PREFIX}* variables that are no settings",
            where="the environment",
            problems=[suggest(name, sorted(known)) for name in unknown],
            next_step="correct or unset them",
        )
    named = {name.upper().removeprefix(_PREFIX).lower(): os.environ[name] for name in given}
    return {name: parse_value(name, text, _PREFIX + name.upper()) for name, text in named.items()}


def _is_service_link(variable: str) -> bool:
    """Return whether Kubernetes made *variable* of a Service, such as one called ``podloader``.

    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    service, link, _ = variable.rpartition("_SERVICE_HOST")
    if not link:
        service = re.sub(r"_(SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$", "", variable)
    return service != variable and f"{service}_SERVICE_HOST" in os.environ


def parse_value(name: str, text: str, where: str = "") -> object:
    """Return what *text* means for the setting *name*: JSON for mappings, else text.

    Raises:
        ConfigError: it is not JSON; *where* it stands is for the message.
    """
    if name not in _JSON:
        return text
    try:
        return parse_json(text)
    except ValueError:
        raise ConfigError(
            f"{name} is not JSON", where=where, expected=f"like {_JSON[name]}"
        ) from None


def suggest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Return that *name* is no setting, and the nearest that is."""
    import difflib  # only mistakes need it

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{name!r} is not a setting" + (f"; did you mean {near[0]!r}?" if near else "")
