"""``opd-ray config CONFIG``: what a recipe resolves to; ``--schema``: what may stand in one."""

from typing import Annotated

import typer
import yaml

from opd_ray.commands.options import Override
from opd_ray.console import console
from opd_ray.recipes import load, schema

__all__ = ["config"]


def config(
    config: Annotated[str | None, typer.Argument(help="A recipe's name or the path of a YAML file.")] = None,
    override: Override = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    json_schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Print the whole configuration, defaults and overrides included."""
    if json_schema:
        if config is not None:
            raise typer.BadParameter("is of every recipe; leave CONFIG away", param_hint="--schema")
        console.print_json(data=schema())
        return
    if config is None:
        raise typer.BadParameter("give a recipe's name or a YAML file, or --schema", param_hint="CONFIG")
    data = load(config, override or []).model_dump(mode="json")
    if json:
        console.print_json(data=data)
    else:
        console.print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), soft_wrap=True, end="")
