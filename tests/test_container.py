"""The steps of the Dockerfile, outside a container: what is copied installs, and serves."""

import configparser
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import ROOT, start_interruptible
from support.served import port_of

from drl_jax.search.update import update_index


def instructions() -> Iterator[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield tuple(line.split(maxsplit=1))


def copy(sources: list[str], target: Path) -> None:
    """COPY; the context has what `.dockerignore`, a list of exceptions, does not leave out."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in sources:
        assert ignored[0] == "*"
        assert f"!{name}" in ignored
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, target)
    assert fnmatch.filter(ignored, "[*][*]/__pycache__")


@pytest.mark.skipif(os.getuid() != 0, reason="the steps change the owner of a directory")
def test_the_steps_of_the_image(search_model, test_videos, tmp_path):
    image, packages = tmp_path / "image", tmp_path / "packages"
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    # The packages that it needs are here, and those of the registry take minutes.
    offline = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    offline |= {"PIP_TARGET": str(packages), "PIP_ROOT_USER_ACTION": "ignore"}
    here, final = image, {}
    for name, text in instructions():
        final[name] = text
        if name in ("ARG", "ENV"):  # Values have no spaces.
            environment |= dict(part.split("=") for part in text.split())
        elif name == "WORKDIR":
            here = image / text.strip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = text.split()
            copy(sources, here / target)
        elif name == "RUN":
            command = re.sub(r"(?<![\w.])/(src|state)\b", rf"{image}/\1", text)
            finished = subprocess.run(
                ["sh", "-ec", command],
                cwd=here,
                env={**environment, **offline},
                capture_output=True,
                text=True,
            )
            assert finished.returncode == 0, finished.stderr
            assert "does not provide the extra" not in finished.stdout + finished.stderr
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {"cpu", "cuda"} <= {*setup["options.extras_require"]}
    user, state = final["USER"], image / "state"
    assert (user, state.stat().st_uid, here) == ("1000:1000", 1000, state)

    videos = tmp_path / "videos"
    videos.mkdir()
    for path in sorted(test_videos.iterdir())[:2]:
        shutil.copy(path, videos)
    update_index(search_model, videos, state / "index", shows_progress=False)
    started = json.loads(final["ENTRYPOINT"]) + json.loads(final["CMD"]) + ["--port=0"]
    places = {"/state": str(state), "/videos": str(videos)}
    for place, path in places.items():
        started = [
            part.replace(place, path, 1) if part.startswith(("--index", place)) else part
            for part in started
        ]
    environment |= {"HOME": str(state), "PYTHONPATH": str(packages), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_interruptible(["env", "-C", str(state), *started], env=environment, **pipes)
    try:
        # The update is reported beside the address.
        lines = iter(process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("2 videos on http://")), None)
        assert line is not None, process.communicate()
        check = json.loads(final["HEALTHCHECK"].partition("CMD ")[2])
        check[-1] = check[-1].replace("8000", str(port_of(line.split()[3])))
        assert final["EXPOSE"] == "8000"
        healthy = subprocess.run(check, env=environment, cwd=state, capture_output=True, text=True)
        assert healthy.returncode == 0, healthy.stderr
        process.send_signal(getattr(signal, final["STOPSIGNAL"]))
        assert "Traceback" not in process.communicate(timeout=60)[1]
        assert process.returncode == 0
        assert subprocess.run(check, env=environment, cwd=state, capture_output=True).returncode
    finally:
        process.kill()
