"""A Truss with a ``docker_server`` as its container runs it: the start command, in its own root."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from truss.base.truss_config import TrussConfig

from tests.images import Image
from tests.pod.pods import RunningPod

# In the mount namespace that is the container's: this machine's folders, the Truss's as /app as its
# image has it, and the secrets that the platform mounts.
_ROOT = """
set -eu
root=$1 app=$2 secrets=$3
shift 3
mount -t tmpfs none "$root"
for place in /*; do
    if [ -L "$place" ]; then cp -P "$place" "$root/"
    elif [ -d "$place" ]; then mkdir "$root$place" && mount --rbind "$place" "$root$place"
    fi
done
mkdir -p "$root/app" "$root/secrets"
mount --bind "$app" "$root/app"
mount --bind "$secrets" "$root/secrets"
exec chroot "$root" "$@"
"""


def start_container(
    image: Image,
    folder: Path,
    secrets: Mapping[str, str],
    environment: Mapping[str, str],
    *,
    supervised: bool = False,
) -> RunningPod:
    """Run *image* with values for its *secrets*: its Truss's start command is PID 1.

    *supervised*: PID 1 is supervisord, as in Truss's own image, but with no nginx beside it.
    """
    config = TrussConfig.from_yaml(image.app / "config.yaml")
    server = config.docker_server
    assert server is not None
    root, mounted = folder / "root", folder / "secrets"
    root.mkdir()
    mounted.mkdir()
    for name in config.secrets:
        (mounted / name).write_text(secrets[name])
    if supervised:
        program = Path(sys.executable).with_name("supervisord")
        start = [str(program), "--configuration", str(_without_nginx(image.context))]
    else:
        start = shlex.split(str(server.start_command))  # as Truss's supervisor splits it
    return RunningPod(
        ["sh", "-c", _ROOT, "container", str(root), str(image.app), str(mounted), *start],
        folder,
        server.server_port,
        environment={
            **image.environment(),
            **config.environment_variables,
            **environment,
        },
    )


def _without_nginx(context: Path) -> Path:
    path = context / "supervisord.conf"
    command = 'nginx -g "daemon off;"'
    text = path.read_text()
    assert command in text
    path.write_text(text.replace(command, "sleep infinity"))
    return path
