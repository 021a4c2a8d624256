"""The image's recipe is linted, and its steps run as plain commands in a scratch folder.

No container engine is needed: each RUN of the first stage is the Dockerfile's own command, with `/opt` and `/src` in
that folder. The ordinary test takes the packages from the tested set, which pip finds installed there, and no index;
`make verify` downloads them. What needs root in the second stage (apt-get, useradd) is linted and not run.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import opd_ray
from tests.deploy.kustomize import KUBERAY, ROOT, build, one

FOLDER = ROOT / "deploy" / "docker"
BIN = Path(sys.executable).parent
CONTEXT = {"opd_ray", "configs", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"}


def stages():
    """Instructions of each stage, continued lines joined."""
    found = []
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    for line in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            found += [[]] if word == "FROM" else []
            found[-1].append((word, rest))
    return found


BUILD, FINAL = stages()


def run(command, folder, cwd, **environment):
    """A RUN instruction, with the image's folders in a scratch one."""
    inside = re.sub(r"(?<![\w.])/(opt|src|usr/local/bin)\b", rf"{folder}/\1", command)
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("HTTP", "http", "PIP_", "SSL"))}
    plain = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-ec", inside],
        cwd=cwd,
        env=kept | plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, f"{inside}\n{done.stdout[-4000:]}"
    return done.stdout


def copy(sources, target):
    """A COPY instruction: what .dockerignore lets through."""
    *names, place = sources.split()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / place)


def make(folder, between=lambda: None, **environment):
    """Run the first stage, and of the second what needs no root; returns the image's /opt/opd-ray."""
    cwd = folder
    for word, rest in BUILD:
        if word == "WORKDIR":
            cwd = folder / rest.lstrip("/")
            cwd.mkdir(parents=True)
        elif word == "COPY":
            copy(rest, cwd)
        elif word == "RUN":
            run(rest, folder, cwd, **environment)
            between()
    (folder / "usr" / "local" / "bin").mkdir(parents=True)
    (link,) = (rest for word, rest in FINAL if word == "RUN" and rest.startswith("ln "))
    run(link, folder, folder)
    return folder / "opt" / "opd-ray"


def show_the_tested_set(folder):
    """Let the image's Python see what this one has, but for opd_ray itself."""
    (site,) = (folder / "opt" / "opd-ray").glob("lib/python*/site-packages")
    seen = folder / "tested"
    if seen.exists():
        return
    seen.mkdir()
    for place in [path for path in map(Path, sys.path) if path.name == "site-packages"]:
        for entry in place.iterdir():
            if not entry.name.startswith(("opd_ray", "__editable__", "_opd_ray")) and not (seen / entry.name).exists():
                (seen / entry.name).symlink_to(entry)
    (site / "tested.pth").write_text(f"{seen}\n")


def works(image, folder, elsewhere):
    """What the image's user gets, from a folder without a checkout and without anybody's environment."""
    program = folder / "usr" / "local" / "bin" / "opd-ray"
    done = subprocess.run(
        [program, "config", "sd35_mopd", "-o", "cluster=kuberay"],
        cwd=elsewhere,
        env={"HOME": str(elsewhere), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["cluster"]["nodes_may_come"] is True
    (package,) = image.glob("lib/python*/site-packages/opd_ray/__init__.py")
    assert (package.parent / "constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert (folder / "usr" / "local" / "bin" / "ray").readlink() == image / "bin" / "ray"
    left = {entry.name for entry in (image / "bin").iterdir()}
    assert not {name for name in left if re.match(r"pip|hatch|gcc|cc$|ruff|pytest", name)}, left


@pytest.fixture
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


def test_the_steps_build_a_working_installation_of_the_tested_set(tmp_path, elsewhere):
    image = make(tmp_path, lambda: show_the_tested_set(tmp_path), PIP_NO_INDEX="1")
    works(image, tmp_path, elsewhere)


@pytest.mark.verify
def test_the_steps_build_a_working_installation_from_the_index(tmp_path, elsewhere):
    image = make(tmp_path)
    works(image, tmp_path, elsewhere)
    done = subprocess.run(
        [image / "bin" / "opd-ray", "doctor", "--json"], cwd=elsewhere, capture_output=True, text=True, timeout=300
    )
    found = {record["check"]: record for record in yaml.safe_load(done.stdout)}
    assert [found[name]["status"] for name in ("packages", "tested set", "torch", "built-in world")] == ["ok"] * 4, (
        found
    )


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path):
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("3.11.14-slim-bookworm", "latest")
    (tmp_path / "Dockerfile").write_text(text.replace(" --no-cache-dir", ""))
    done = subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and {"DL3007", "DL3042"} <= set(re.findall(r"DL\d+", done.stdout))


def test_what_hadolint_does_not_know():
    bases = {rest.split()[0] for word, rest in [*BUILD, *FINAL] if word == "FROM"}
    assert len(bases) == 1 and re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases.pop())
    words = [word for word, _ in FINAL]
    assert words[words.index("USER") :] == ["USER", "WORKDIR", "CMD"], "nothing is written as the user or by root after"
    pod = one(build(KUBERAY / "raycluster"), "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert ("USER", user) in FINAL and any(f"--uid {user.split(':')[0]} " in rest for _, rest in FINAL)
    assert f"-t opd-ray:{opd_ray.__version__} ." in (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    installs = [rest for word, rest in BUILD if word == "RUN" and "install" in rest]
    assert all("-c constraints.txt" in rest or "--no-deps" in rest for rest in installs)


def test_the_build_context_is_what_is_copied():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for word, rest in BUILD if word == "COPY" for name in rest.split()[:-1]}
    assert ignored[1] == "*" and allowed == copied == CONTEXT
    assert any(fnmatch("opd_ray/__pycache__", line) for line in ignored)
