"""podloader's own wheel, made of what is installed here: no index has it, so a Truss brings it.

It lies in the Truss's ``data/``, which Truss copies into the image before it runs
``build_commands``. Truss's folder for bundled packages would not do: compiled files are left out of
it, and a container of one's own does not import from it.

Layout: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import os
import sysconfig
import zipfile
from pathlib import Path

import yaml

import loader
from loader.errors import ConfigError, DiskError
from loader.weights.publishing import replace_file

INSTALL = (
    "uv pip install --system --break-system-packages"
    ' --python "$(which python3)" /app/data/podloader-*.whl'
)
"""What ``build_commands`` has to say; the same words as Truss's own for its requirements."""

REQUIREMENTS = ("awscrt==0.38.1", "boto3==1.44.5", "tenacity==9.2.1")
"""What podloader needs and vLLM does not bring, as it was tested."""

AUDIO = ("av==18.1.0", "scipy==1.17.1", "soundfile==0.14.0", "soxr==1.1.0")
"""What vLLM reads sound with."""

_NAME = "podloader"
_PODS = "linux-x86_64"  # where GPUs are; elsewhere a compiled part would be of no use
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


def add_wheel(truss: Path) -> Path:
    """Write the wheel into *truss*'s ``data/``, in the place of an older one, and return it.

    Raises:
        ConfigError: *truss* is no Truss, or podloader was not installed, only copied.
        DiskError: the disk refused.
    """
    if not (truss / "config.yaml").is_file():
        raise ConfigError(
            "no Truss lies there",
            where=str(truss),
            expected="a folder with a config.yaml",
            next_step="`podloader truss init` makes one",
        )
    try:
        return write_wheel(truss / "data")
    except OSError as error:
        raise DiskError(
            "podloader's wheel could not be written",
            where=str(truss / "data"),
            got=os.strerror(error.errno) if error.errno else str(error),
            next_step="choose a folder that can be written",
        ) from None


def lines_to_add(truss: Path) -> tuple[str, ...]:
    """Return what a person has to write into *truss*'s config.yaml, nothing where it is there."""
    if "podloader-*.whl" in (truss / "config.yaml").read_text(encoding="utf-8"):
        return ()
    lists = {"requirements": list(REQUIREMENTS), "build_commands": [INSTALL]}
    return ("config.yaml has to say:", yaml.safe_dump(lists, sort_keys=False, width=10_000))


def write_wheel(folder: Path) -> Path:
    """Write the wheel into *folder*, in the place of an older one, and return it.

    Raises:
        ConfigError: podloader was not installed, only copied.
        OSError: the disk refused.
    """
    name, files = _contents()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for inner, content in files.items():
            info = zipfile.ZipInfo(inner, _EPOCH)
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    folder.mkdir(exist_ok=True)
    replace_file(folder / name, packed.getvalue())
    for older in folder.glob(f"{_NAME}-*.whl"):
        if older.name != name:
            older.unlink()
    return folder / name


def _contents() -> tuple[str, dict[str, bytes]]:
    """Return the wheel's name, and its files by their names in it."""
    try:
        installed = importlib.metadata.distribution(_NAME)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "podloader is not installed here, so there is nothing to make its wheel of",
            where=str(Path(loader.__file__).parent),
            next_step="install it with pip, then call this again",
        ) from None
    package = Path(loader.__file__).parent
    left_out = {".pyc"} if sysconfig.get_platform() == _PODS else {".pyc", ".so"}
    paths = [p for p in sorted(package.rglob("*")) if p.is_file() and p.suffix not in left_out]
    files = {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}
    compiled = any(path.suffix == ".so" for path in paths)
    tag = f"py3-none-{_PODS.replace('-', '_') if compiled else 'any'}"
    release = f"{_NAME}-{installed.version}"
    about = f"{release}.dist-info"
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO")  # of an .egg-info
    for name, text in (
        ("METADATA", metadata),
        ("entry_points.txt", installed.read_text("entry_points.txt")),
        ("licenses/LICENSE", installed.read_text("licenses/LICENSE")),
    ):
        if text is not None:
            files[f"{about}/{name}"] = text.encode()
    files[f"{about}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {_NAME} ({installed.version})\n"
        f"Root-Is-Purelib: {str(not compiled).lower()}\nTag: {tag}\n"
    ).encode()
    record = f"{about}/RECORD"
    files[record] = "".join([*map(_recorded, files.items()), f"{record},,\n"]).encode()
    return f"{release}-{tag}.whl", files


def _recorded(file: tuple[str, bytes]) -> str:
    name, content = file
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"
