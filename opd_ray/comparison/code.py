"""Which code made a piece of a comparison."""

import hashlib
from functools import cache
from pathlib import Path

from opd_ray import __version__
from opd_ray.recipes import recipes

__all__ = ["state_of_code"]


@cache
def state_of_code() -> str:
    """`<version>+<sha256>`: of the package, and of all its sources and recipes, the first twelve digits.

    As they lie when it is first asked for, once a process. The same for a checkout and what is installed of it.
    """
    package = Path(__file__).parents[1]
    configs = next(iter(recipes().values())).parent
    files = {f"opd_ray/{file.relative_to(package).as_posix()}": file for file in package.rglob("*.py")}
    files |= {f"configs/{file.relative_to(configs).as_posix()}": file for file in configs.rglob("*.yaml")}
    total = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        total.update(f"{name}\n{len(content)}\n".encode())
        total.update(content)
    return f"{__version__}+{total.hexdigest()[:12]}"
