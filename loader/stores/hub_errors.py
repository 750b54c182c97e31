"""What huggingface-hub raises -> podloader's errors."""

from __future__ import annotations

from loader.errors import ConfigError, FetchError, TransientError


def not_here(where: str) -> FetchError:
    """Return what to raise where the Hub is not to be reached and the cache lacks the model."""
    return FetchError(
        "the base model is not in the cache and the Hub is not to be reached",
        where=where,
        next_step="unset HF_HUB_OFFLINE, bring the model into HF_HOME, or set base_model to a "
        "local folder",
    )


def translate_error(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """Return what to raise for an *error* of huggingface-hub; itself where it is none of them."""
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            "the base model is gated",
            where=where,
            next_step="accept its licence on the Hub and give hf_access_token or HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ConfigError(
            "no such base model on the Hub, or it is private",
            where=where,
            next_step="correct base_model, give a local folder, or set hf_access_token",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            "no such revision of the base model", where=where, next_step="correct base_revision"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return not_here(where)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HfHubHTTPError) and status is not None and status < 500:
        return FetchError("the Hub refuses", where=where, got=f"HTTP {status}")
    network = type(error).__module__.startswith(("httpx", "httpcore"))
    if network or isinstance(error, OSError | errors.HfHubHTTPError):
        return TransientError("the Hub did not answer", where=where, got=type(error).__name__)
    return error
