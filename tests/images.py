"""What Truss's own image of a Truss would hold, without Docker: its files, and its Python.

Truss makes the build context; its Dockerfile's copies below /app and its installing commands are
done here, in an environment that begins empty. This one's packages lie behind it: its CPU engine
stands for the GPU's, its server's packages for those that Truss's base image has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from truss.base.truss_config import TrussConfig
from truss.contexts.image_builder.serving_image_builder import ServingImageBuilderContext

from loader.scaffold.wheel import add_wheel

TEMPLATES = Path(__file__).parents[1] / "truss_templates"
ENGINES = {"vllm", "torch"}
_COPY = re.compile(r"COPY --chown=\S+ \./(\S+) (\$\{APP_HOME\}\S*)")
_INSTALL = re.compile(r"RUN +(.*uv pip install --system .*)")
_NO_DEPENDENCIES = "[pip]\nno-deps = true\n"  # which are this environment's


@dataclass(frozen=True, slots=True)
class Image:
    """``app`` is its /app, ``python`` what it calls python3, ``context`` what it was made of."""

    app: Path
    python: Path
    context: Path

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process of the image is to run."""
        return {"PATH": f"{self.python.parent}:{os.environ['PATH']}"}


def lay_out(template: str, folder: Path) -> Path:
    """Return a copy of *template* in *folder*, with the wheel that its comment asks for."""
    shutil.copytree(TEMPLATES / template, folder)
    add_wheel(folder)
    return folder


def build_context(truss: Path, folder: Path) -> Path:
    """Return Truss's build context of *truss* in *folder*."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what Truss calls in pathspec
        ServingImageBuilderContext.run(truss).prepare_image_build_dir(folder)
    return folder


def build_image(truss: Path, folder: Path) -> Image:
    """Return the image of *truss*, made in *folder*."""
    context = build_context(truss, folder / "context")
    app, home = folder / "app", folder / "python"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    behind = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_behind.pth").write_text("\n".join(behind))  # its own .pth files are not heeded
    image = Image(app, home / "bin" / "python3", context)
    listed = _keep_own_requirements(context)
    for line in (context / "Dockerfile").read_text().splitlines():
        if copy := _COPY.match(line):
            _copy(context / copy[1], Path(copy[2].replace("${APP_HOME}", str(app))))
        elif install := _INSTALL.match(line):
            _install(install[1].replace("/app/", f"{app}/"), image, listed)
    return image


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)


def _keep_own_requirements(context: Path) -> list[Requirement]:
    """Leave in requirements.txt what the config asks for but engines, and return it."""
    asked = TrussConfig.from_yaml(context / "config.yaml").requirements
    listed = [r for r in map(Requirement, asked) if r.name not in ENGINES]
    (context / "requirements.txt").write_text("\n".join(map(str, listed)))
    return listed


def _install(command: str, image: Image, listed: list[Requirement]) -> None:
    settings = image.context / "uv.toml"
    settings.write_text(_NO_DEPENDENCIES)
    own = Path(sys.executable).parent  # where uv is
    done = subprocess.run(
        ["sh", "-c", command.replace("--no-cache-dir", "")],
        cwd=image.context,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{image.python.parent}:{own}:{os.environ['PATH']}",
            "UV_CONFIG_FILE": str(settings),
        },
        check=False,
    )
    if "requirements.txt" in command and done.returncode:  # no index: these are the very same
        assert all(version(one.name) in one.specifier for one in listed), done.stderr
    else:
        assert done.returncode == 0, done.stderr
