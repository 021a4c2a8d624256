"""What is released: the source distribution, the wheel made of it, and what somebody who has only that can do."""

import ast
import json
import os
import re
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import opd_ray

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = opd_ray.__version__
# Nothing is downloaded, and nothing of the checkout is seen.
BARE = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}}
OFFLINE = BARE | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}


def run(*command, **options) -> str:
    """What a command prints; it has to succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **{"env": OFFLINE, "timeout": 200} | options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    env = OFFLINE | {"PYTHONPATH": os.pathsep.join(sys.path)}  # hatchling may lie beside the environment
    run(*build, "-t", "sdist", cwd=ROOT, env=env)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as packed:
        packed.extractall(folder, filter="data")
    run(*build, "-t", "wheel", cwd=folder / f"opd_ray-{VERSION}", env=env)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """What belongs to the repository: what git has, or would have after `git add`."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone, so nothing says what belongs to it")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def test_the_source_distribution_is_the_repository(dist, tracked) -> None:
    with tarfile.open(dist[0]) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names - {"PKG-INFO"} == {name for name in tracked if not name.startswith(".ci/")}
    assert {"tests/test_release.py", "docs/index.md", "constraints.txt", "examples/one_file.py"} <= names


def test_the_wheel_holds_the_package_its_recipes_and_the_world_and_nothing_else(dist, tracked) -> None:
    expected = {name for name in tracked if name.startswith("opd_ray/")}
    expected |= {f"opd_ray/{name}" for name in tracked if name.startswith("configs/") or name == "constraints.txt"}
    names = zipfile.ZipFile(dist[1]).namelist()
    ours = {name for name in names if not name.startswith(f"opd_ray-{VERSION}.dist-info/")}
    assert ours == expected
    assert {"opd_ray/py.typed", "opd_ray/configs/cluster/local.yaml", "opd_ray/constraints.txt"} <= ours
    assert sum(name.endswith(".safetensors") for name in ours) == 8 + 2 * 3, (
        "base, encoders, VAE and three specialists; two U-Nets"
    )
    assert dist[1].stat().st_size < 24e6


def test_the_wheel_says_what_it_is(dist) -> None:
    packed = zipfile.ZipFile(dist[1])
    metadata = Parser().parsestr(packed.read(f"opd_ray-{VERSION}.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("opd-ray", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    assert metadata.get_payload().startswith("# opd_ray\n")


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "opd_ray/__init__.py"}
    (line,) = re.findall(r"^__version__ = .*", (ROOT / "opd_ray/__init__.py").read_text(), re.MULTILINE)
    assert line == f'__version__ = "{VERSION}"'
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and all(re.fullmatch(r"\d+\.\d+\.\d+", one) for one in headings[1:])


def bare(folder: Path) -> tuple[Path, Path]:
    """A fresh environment: its Python, and where its packages go."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return folder / "bin" / "python", folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """An environment with our wheel that sees this one's packages, but for an editable install."""
    python, packages = bare(tmp_path_factory.mktemp("wheel") / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", dist[1])
    (packages / "tested_set.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def demo(python: Path, folder: Path, *options: str, timeout: int) -> dict:
    """Its result, from an empty folder."""
    folder.mkdir()
    where = run(python, "-c", "import opd_ray; print(opd_ray.__path__[0])", cwd=folder).strip()
    assert Path(where).is_relative_to(python.parent.parent) and not Path(where).is_relative_to(ROOT)
    command = python.parent / "opd-ray"
    assert run(command, "--version", cwd=folder) == f"opd-ray {VERSION}\n"
    result = json.loads(run(command, "demo", "--json", *options, cwd=folder, timeout=timeout))
    left = {path.name for path in (folder / "runs" / "demo").iterdir()}
    assert {"report.html", "lora", "result.json", "metrics.jsonl", "samples"} <= left
    assert [path.name for path in folder.iterdir()] == ["runs"]
    return result


def test_the_wheel_alone_runs_the_demo(installed, tmp_path) -> None:
    short = ("rounds=2", "cluster.runtime=local", "evaluation.images_per_task=4", "evaluation.batch=4")
    result = demo(installed, tmp_path / "empty", *(word for one in short for word in ("-o", one)), timeout=200)
    assert result["status"] == "done"
    assert set(result["scores"]) >= {"base", "student"}
    assert set(result["gap_closed"]) == {"compose", "text", "look"}


@pytest.mark.verify
def test_the_wheel_alone_runs_the_whole_demo_on_ray(installed, tmp_path) -> None:
    result = demo(installed, tmp_path / "empty", timeout=1800)
    assert result["status"] == "done"
    assert all(gap["value"] > 0.7 for gap in result["gap_closed"].values())


@pytest.mark.verify
def test_a_clean_install_from_the_index_runs_the_demo(dist, tmp_path) -> None:
    """Everything is downloaded: about 6 GB, 6 minutes."""
    python, _ = bare(tmp_path / "venv")
    pins = ROOT / "constraints.txt"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "-c", pins, dist[1], env=BARE, timeout=3000)
    run(*pip, "check", env=BARE)
    run(python.parent / "opd-ray", "doctor", "--ray", cwd=tmp_path)
    result = demo(python, tmp_path / "empty", "-o", "rounds=2", "-o", "evaluation.images_per_task=4", timeout=900)
    assert result["status"] == "done"


def public() -> dict[str, tuple[str, str]]:
    """What the type checker is told: public name -> module, and name there."""
    (block,) = (node for node in ast.parse(Path(opd_ray.__file__).read_text()).body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", opd_ray.__all__)
def test_every_public_name_is_what_the_type_checker_takes_it_for_and_is_documented(name) -> None:
    found = getattr(opd_ray, name)
    if name != "__version__":
        module, inside = public()[name]
        assert found is getattr(sys.modules[module], inside)
    assert f"[`{name}`](" in (ROOT / "docs" / "api.md").read_text()


def test_nothing_else_is_public() -> None:
    shown = re.findall(r"^\| \[`(\w+)`\]", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(shown) == {*public(), "__version__"} == set(opd_ray.__all__)
    assert set(opd_ray.__all__) <= set(dir(opd_ray))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; its names are SD, SD3, SDXL, Algorithm"):
        _ = opd_ray.Trainer


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = (
        "import opd_ray, sys; print(sorted({'torch', 'ray', 'pydantic', 'typer', 'diffusers'} & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", heavy, cwd=ROOT) == "[]\n"
