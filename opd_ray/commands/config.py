"""``opd-ray config CONFIG``: what a recipe resolves to."""

from typing import Annotated

import typer
import yaml

from opd_ray.commands.options import Override
from opd_ray.console import console
from opd_ray.recipes import load

__all__ = ["config"]


def config(
    config: Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")],
    override: Override = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the whole configuration, defaults and overrides included."""
    data = load(config, override or []).model_dump(mode="json")
    if json:
        console.print_json(data=data)
    else:
        console.print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), soft_wrap=True, end="")
