"""What surrounds the code: pins, ignored paths, the commands the README promises."""

import logging
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package, get_excludes_from_ignore_files

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
INSTALLED = [
    *PROJECT["dependencies"],
    *(line for extra in ("dev", "deepspeed", "ocr") for line in PROJECT["optional-dependencies"][extra]),
]


@pytest.mark.parametrize("line", INSTALLED)
def test_the_tested_release_lies_within_the_declared_range(line: str) -> None:
    wanted = Requirement(line)
    pin = PINS[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_every_constraint_is_one_exact_release_of_the_standard_builds() -> None:
    for pin in PINS.values():
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert "+" not in str(pin.specifier) and pin.url is None, pin


@pytest.mark.parametrize(
    ("path", "uploaded"),
    [
        (".venv", False),
        ("runs", False),
        ("build", False),
        ("dist", False),
        ("site", False),
        ("opd_ray/__pycache__", False),
        ("configs/demo.yaml", True),
        ("opd_ray/build.py", True),
        ("opd_ray/world/record.json", True),
    ],
)
def test_ray_uploads_the_code_and_nothing_else(path: str, uploaded: bool) -> None:
    quiet = logging.getLogger("test")
    excludes = get_excludes_from_ignore_files(ROOT, include_gitignore=True, logger=quiet)
    assert any(exclude(ROOT / path) for exclude in excludes) is not uploaded


def test_the_working_directory_of_a_job_is_small(tmp_path) -> None:
    """As `ray job submit --working-dir .` packs it; Ray takes a few hundred MB at most."""
    package = tmp_path / "package.zip"
    quiet = logging.getLogger("test")
    create_package(str(ROOT), package, True, excludes=get_runtime_env_default_excludes(), logger=quiet)
    packed = zipfile.ZipFile(package).infolist()
    assert package.stat().st_size < 50e6
    assert {"opd_ray/build.py", "configs/demo.yaml"} <= {file.filename for file in packed}
    assert sum(file.file_size for file in packed) < 50e6, "also unpacked"
    assert not {file.filename.split("/")[0] for file in packed} & {"runs", ".venv", ".git", "tests"}


def test_the_readme_shows_the_commands_that_work_from_a_clone() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_the_makefile_knows_every_command_that_contributing_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in ("check", "test", "verify", "format"):
        assert f"make {target}" in guide
        assert f"\n{target}: " in makefile
