"""What the user asked for: one Truss ``config.yaml``, ``PODLOADER_*`` over it, arguments over both.

The only place that reads the environment. Secrets are looked up by name and kept as ``SecretStr``.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, InstanceOf, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from loader.credentials import S3Credentials, Secrets, find_s3_credentials, find_secret
from loader.errors import ConfigError
from loader.truss_config import (
    DOWNLOAD_FOLDER,
    mapping_at,
    read_config,
    training_checkpoints,
)
from loader.types import CONFIG_VARIABLE, JOB_ID, TrainingCheckpoints

CHECKPOINT_SCHEME = "checkpoint:"
_PREFIX = "PODLOADER_"
_SECTION = "model_metadata.podloader"
_JSON = {"engine_args": '{"max_model_len": 4096}', "storage_options": '{"gs": {"token": "anon"}}'}
_CHECKPOINT = re.compile(rf"{CHECKPOINT_SCHEME}{JOB_ID.pattern}/rank-[^/]+(/.*)?")
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_OTLP_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OUTSIDE = {"training", "hf_token", "api_key", "s3"}


@dataclass(frozen=True, slots=True)
class CheckpointName:
    """A folder of a training job: ``name`` is ``rank-<N>/<folder>``, without a slash at its end."""

    job: str
    name: str


class Settings(BaseSettings):
    """podloader's own settings, the training checkpoints they are about, and the secrets."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    training: InstanceOf[TrainingCheckpoints]
    hf_token: SecretStr | None = None
    api_key: SecretStr | None = None
    s3: InstanceOf[S3Credentials] = S3Credentials()

    artifacts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        repr=False,
        description="Where the artifacts are: listing JSON files (paths or URLs), "
        "`s3://bucket/prefix`, `baseten` (its REST API), or a URL that fsspec knows.",
    )
    base_model: str | None = Field(
        None,
        description="The model that adapters were trained over: a local folder, a Hugging Face id, "
        "`checkpoint:<job>/rank-<N>/<folder>/`, or a folder's URL such as `s3://bucket/model`. "
        "Default: what the adapter's config names.",
    )
    base_revision: str | None = Field(
        None, description="Branch, tag or commit of a Hugging Face base model."
    )
    adapter_policy: Literal["auto", "attach", "merge"] = Field(
        "auto",
        description="`attach`: the engine serves adapters by name. `merge`: one adapter is folded "
        "into the base's weights. `auto`: whichever makes the faster server (see Adapters).",
    )
    adapter_jobs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Jobs whose adapters a request to the server may name as `<job>/<checkpoint>`; "
        "they are fetched on first use.",
    )
    exact: Literal["float32", "peft"] = Field(
        "float32",
        description="How merged weights are rounded: once, from float32, or wherever PEFT rounds, "
        "which gives the bits of its `merge_and_unload`.",
    )
    dequantise: bool = Field(
        False,
        description="Merge into a quantised base (FP8, compressed-tensors with scales, "
        "bitsandbytes) by writing all weights in full precision; without it, that is an error.",
    )
    canary: bool = Field(
        True,
        description="Before the model counts as ready, every attached adapter has to answer a "
        "prompt unlike its base; one that does not stops the start.",
    )
    engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="What answers: vLLM, or transformers + PEFT for smoke tests."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="Arguments of the engine, named as vLLM's `AsyncEngineArgs` names them.",
    )
    served_model_name: str | None = Field(
        None, description="The name requests give the model. Default: the job id or base model."
    )
    concurrency: int = Field(
        16,
        ge=1,
        le=256,
        description="The most connections that download at the same time; fewer where more bring "
        "nothing.",
    )
    range_size: ByteSize = Field(
        ByteSize(16 * 2**20),
        ge=2**16,
        description="The least that is asked for of a large file, such as `16MiB`; proved and "
        "resumed alone.",
    )
    cache_folder: Path | None = Field(
        None,
        description="Where merged and consolidated models are kept. Default: `.podloader` in the "
        "download folder.",
    )
    weights_only_fetch: bool = Field(
        False,
        description="Fetch only what serving uses: no optimizer, scheduler and RNG state, and of "
        "weights sharded over ranks only the bytes of the model itself.",
    )
    consolidate_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="What weights sharded over ranks are written as when they are consolidated. "
        "Default: as they were trained.",
    )
    verify: Literal["size", "sample", "full"] = Field(
        "sample",
        description="What a file that an earlier start fetched has to prove: its size and time "
        "stamp, the digests of a few ranges as well, or the digest of every byte.",
    )
    allow_pickle: bool = Field(
        False, description="Read `.bin` and `.pt` weights, restricted to tensors."
    )
    trust_remote_code: bool = Field(
        False, description="Let transformers and vLLM run code that lies in the checkpoint."
    )
    ca_bundle: Path | None = Field(
        None, description="PEM file of certificates to trust besides the system's."
    )
    connect_timeout_s: float = Field(10.0, gt=0, description="Limit for opening a connection.")
    stall_timeout_s: float = Field(
        30.0, gt=0, description="A connection that brings no byte for so long is given up."
    )
    s3_endpoint_url: str | None = Field(
        None,
        pattern="^https?://",
        description="The service behind `s3://`. Default: `AWS_ENDPOINT_URL_S3`, "
        "`AWS_ENDPOINT_URL`, AWS's own.",
    )
    storage_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        repr=False,
        description="Options of fsspec's drivers by scheme, such as `{gs: {token: anon}}`.",
    )
    api_url: str = Field(
        "https://api.baseten.co",
        pattern="^https?://",
        description="Where the REST API is that `baseten` asks.",
    )
    allow_local_urls: bool = Field(
        False,
        description="Let a listing lead to `file://` URLs and link-local addresses, where clouds "
        "keep credentials.",
    )
    retries: int = Field(
        6, ge=0, le=100, description="Further tries of one range after a passing failure."
    )
    drain_timeout_s: float = Field(
        20.0,
        ge=0,
        description="What `serve` gives requests under way after SIGTERM or SIGINT; 5 s later the "
        "pod has ended, whatever hangs.",
    )
    on_failure: Literal["exit", "hold"] = Field(
        "exit",
        description="When `serve` cannot start: `exit` with the documented code, or `hold` and "
        "answer `/health` with the reason until a signal comes.",
    )

    @property
    def base_checkpoint(self) -> CheckpointName | None:
        """The base model, where it is another training checkpoint."""
        if self.base_model is None or not self.base_model.startswith(CHECKPOINT_SCHEME):
            return None
        job, _, name = self.base_model.removeprefix(CHECKPOINT_SCHEME).partition("/")
        return CheckpointName(job, name.rstrip("/"))

    @field_validator("base_model")
    @classmethod
    def _check_base(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(CHECKPOINT_SCHEME):
            if not _CHECKPOINT.fullmatch(value):
                raise ValueError("expected checkpoint:<job>/rank-<N>/<folder>/")
        elif not (value or value is None):
            raise ValueError("expected a folder, a Hugging Face id or checkpoint:...")
        return value

    @field_validator("artifacts", "adapter_jobs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """A variable holds a JSON list or words between blanks; a config may hold one string."""
        if isinstance(value, str):
            if not value.lstrip().startswith("["):
                return value.split()
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                raise ValueError("expected a JSON list or words between blanks") from None
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what ``load`` passes: it has put the sources in order."""
        return (init_settings,)

    @classmethod
    def load(
        cls,
        config: Path | str | Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] | None = None,
        secrets: Secrets | None = None,
    ) -> Settings:
        """Return the settings of a Truss config, given as a file or as its contents.

        ``overrides`` win over ``PODLOADER_*``, which win over the config. ``secrets`` are Truss's.

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
        values = {**section, **_environment(where), **(overrides or {})}
        return cls._build(where, values, training_checkpoints(document, where), secrets)

    @classmethod
    def without_config(
        cls, overrides: Mapping[str, Any] | None = None, *, secrets: Secrets | None = None
    ) -> Settings:
        """Return the settings for a command that asks for no training checkpoints.

        Raises:
            ConfigError: naming every ``PODLOADER_*`` variable or override that is wrong.
        """
        where = "the environment"
        values = {**_environment(where), **(overrides or {})}
        nothing = TrainingCheckpoints(Path(DOWNLOAD_FOLDER), ())
        return cls._build(where, values, nothing, secrets)

    @classmethod
    def _build(
        cls,
        where: str,
        values: Mapping[str, Any],
        training: TrainingCheckpoints,
        secrets: Secrets | None,
    ) -> Settings:
        try:
            return cls(
                **{
                    **values,
                    "training": training,
                    "hf_token": find_secret("hf_access_token", ("HF_TOKEN",), secrets),
                    "api_key": find_secret("baseten_api_key", ("BASETEN_API_KEY",), secrets),
                    "s3": find_s3_credentials(secrets),
                }
            )
        except ValidationError as error:
            problems = _problems(error)
        raise ConfigError(
            f"settings that are wrong in {_SECTION} or {_PREFIX}* variables",
            where=where,
            problems=problems,
            next_step="correct them; the README's table lists every setting",
        )


def setting_names() -> tuple[str, ...]:
    """Return the names that may stand in ``model_metadata.podloader``, in the table's order."""
    return tuple(name for name in Settings.model_fields if name not in _OUTSIDE)


def settings_table() -> str:
    """Return the documented settings as a Markdown table."""
    rows = ["| setting | variable | default | what it does |", "|---|---|---|---|"]
    for name in setting_names():
        field = Settings.model_fields[name]
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, ByteSize):
            shown = default.human_readable(separator="").replace(".0", "")
        else:
            shown = json.dumps(default)
        rows.append(f"| `{name}` | `{_PREFIX}{name.upper()}` | `{shown}` | {field.description} |")
    return "\n".join(rows)


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


def _environment(where: str) -> dict[str, Any]:
    known = {_PREFIX + name.upper() for name in setting_names()}
    given = [name for name in os.environ if name.upper().startswith(_PREFIX)]
    given = [name for name in given if name != CONFIG_VARIABLE]
    if unknown := sorted(name for name in given if name.upper() not in known):
        raise ConfigError(
            f"{_PREFIX}* variables that are no settings",
            where="the environment",
            problems=[suggest(name, sorted(known)) for name in unknown],
            next_step="correct or unset them",
        )
    try:
        values = EnvSettingsSource(Settings)()
    except SettingsError as error:
        raise ConfigError(
            str(error),
            where="the environment",
            expected=f"JSON for {' and '.join(_JSON)}",
            next_step=f"""write it like {_PREFIX}ENGINE_ARGS='{{"max_model_len": 4096}}'""",
        ) from None
    return {name: value for name, value in values.items() if name not in _OUTSIDE}


def _problems(error: ValidationError) -> list[str]:
    """Return one line per wrong key; values stay out, they may be secrets."""
    lines = []
    for detail in error.errors(include_input=False, include_url=False):
        name = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            lines.append(suggest(name, setting_names()))
        else:
            lines.append(f"{name}: {detail['msg']}")
    return lines


def parse_value(name: str, text: str) -> object:
    """Return what *text* means for the setting *name*: JSON for mappings, else text."""
    if name not in _JSON:
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{name} is not JSON", expected=f"like {_JSON[name]}") from None


def suggest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Return that *name* is no setting, and the nearest that is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{name!r} is not a setting" + (f"; did you mean {near[0]!r}?" if near else "")
