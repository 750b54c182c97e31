"""``deploy/Dockerfile`` without Docker: its steps run in a root folder of their own, one by one.

The base image is this machine's system, Python and packages (its CPU engine stands for the GPU's),
all of it mounted read-only; podloader itself comes from the wheel that the Dockerfile copies.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile_parse import DockerfileParser

from tests.pod.pods import AS_PID_1

DOCKERFILE = Path(__file__).parents[2] / "deploy" / "Dockerfile"
_VENV, _BEHIND = "/opt/python", "/opt/packages"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/dev", "/sys")

# $2 "ro" makes the image read-only, as `docker run --read-only`; $3 is what lies at /cache then, $6
# the size of /tmp.
_ENTER = """
set -eu
root=$1 mode=$2 cache=$3 user=$4 places=$5 tmp=$6
shift 6
mount --bind "$root" "$root"
mkdir -p "$root/tmp"
[ "$mode" != ro ] || mount -t tmpfs -o mode=1777,size=$tmp none "$root/tmp"
for place in $places; do mkdir -p "$root$place"; mount --rbind "$place" "$root$place"; done
if [ "$mode" = ro ]; then
    mount --bind "$cache" "$root/cache"
    mount -o remount,bind,ro "$root"
fi
exec chroot --userspec="$user" --groups= "$root" "$@"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """What a Dockerfile made: a root folder, and how a container of it begins."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def command(
        self,
        *arguments: str,
        cache: Path,
        variables: Mapping[str, str] | None = None,
        user: str = "",
        tmp: str = "50%",
    ) -> list[str]:
        """Return what runs a container with *arguments* for CMD, in a mount namespace.

        Its root is read-only; *cache* lies at /cache. *user* is another than the image's, *tmp* the
        size of /tmp.
        """
        given = {**self.variables, **(variables or {})}
        words = [*self.entrypoint, *(arguments or self.arguments)]
        return _enter(self.root, "ro", cache, user or self.user, given, self.folder, words, tmp)


def run(
    image: Image, cache: Path, *words: str, user: str = "", tmp: str = "50%", **changed: str
) -> subprocess.CompletedProcess[str]:
    """Run *words* in a container, in the place of its entrypoint."""
    other = replace(image, entrypoint=words[:1], variables={**image.variables, **changed})
    command = other.command(*words[1:], cache=cache, user=user, tmp=tmp)
    return subprocess.run(
        [*AS_PID_1, *command], capture_output=True, text=True, check=False, timeout=120
    )


def build(wheel: Path, folder: Path) -> Image:
    """Return the image of the Dockerfile, with *wheel* in its build context's ``dist/``."""
    context = folder / "context"
    (context / "dist").mkdir(parents=True)
    shutil.copy(wheel, context / "dist")
    root = folder / "root"
    _lay_base(root)
    image = Image(root, {"PATH": f"{_VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    with (folder / "Dockerfile").open("w+b") as copy:
        copy.write(DOCKERFILE.read_bytes())
        steps = DockerfileParser(fileobj=copy).structure
    for step in steps:
        image = _do(image, step["instruction"], step["value"], context)
    return image


def _do(image: Image, instruction: str, value: str, context: Path) -> Image:
    changed = {name: getattr(image, name) for name in Image.__slots__}
    match instruction:
        case "RUN":
            _run(image, value)
        case "COPY":
            *sources, target = shlex.split(value)
            place = Path(f"{image.root}{target}")
            place.mkdir(parents=True)
            for source in sources:
                (found,) = context.glob(source)
                shutil.copy(found, place)
        case "ENV":
            pairs = (pair.partition("=") for pair in shlex.split(value))
            changed["variables"] = image.variables | {name: text for name, _, text in pairs}
        case "USER":
            changed["user"] = value
        case "WORKDIR":
            Path(f"{image.root}{value}").mkdir(exist_ok=True)
            changed["folder"] = value
        case "ENTRYPOINT":
            changed["entrypoint"] = tuple(json.loads(value))
        case "CMD":
            changed["arguments"] = tuple(json.loads(value))
        case "ARG" | "FROM" | "EXPOSE" | "STOPSIGNAL" | "HEALTHCHECK" | "COMMENT":
            pass
        case _:
            raise AssertionError(f"{instruction} is not done here")
    return Image(**changed)


def _run(image: Image, script: str) -> None:
    variables = {**image.variables, "PIP_NO_INDEX": "1"}
    words = ["sh", "-c", script]
    command = _enter(image.root, "rw", Path("/"), image.user, variables, image.folder, words)
    done = subprocess.run(
        [*AS_PID_1, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"RUN {script}\n{done.stdout}\n{done.stderr}"


def _enter(
    root: Path,
    mode: str,
    cache: Path,
    user: str,
    variables: Mapping[str, str],
    folder: str,
    words: Sequence[str],
    tmp: str = "50%",
) -> list[str]:
    packages = [path for path in sys.path if path.endswith("site-packages")]
    mounted = [*filter(os.path.exists, _SYSTEM), sys.base_prefix, *packages, *_roots()]
    given = [f"{name}={value}" for name, value in variables.items()]
    inside = ["env", "-i", "-C", folder, *given, *words]
    script = ["sh", "-c", _ENTER, "container", str(root), mode, str(cache), user]
    return [*script, " ".join(dict.fromkeys(mounted)), tmp, *inside]


def _roots() -> list[str]:
    """Return the folders that site-packages' own links lead to."""
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


def _lay_base(root: Path) -> None:
    """Lay a Python with this one's packages into *root*, but without podloader."""
    venv.create(f"{root}{_VENV}", with_pip=False, symlinks=True)
    behind = Path(f"{root}{_BEHIND}")
    behind.mkdir()
    for path in (Path(one) for one in sys.path if one.endswith("site-packages")):
        for found in path.iterdir():
            link = behind / found.name
            if "podloader" not in found.name and found.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(found)
    (packages,) = Path(f"{root}{_VENV}").glob("lib/python*/site-packages")
    (packages / "zz_behind.pth").write_text(_BEHIND)
