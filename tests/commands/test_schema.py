"""The schema for editors says what the configuration takes and refuses."""

import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from opd_ray.config import Config
from opd_ray.recipes import recipes, schema


@pytest.fixture(scope="module")
def validator():
    return Draft202012Validator(schema())


def test_the_command_prints_a_valid_schema_and_nothing_else(cli):
    done = cli("config", "--schema")
    assert (done.code, done.err) == (0, "")
    printed = json.loads(done.out)
    assert printed == schema()
    Draft202012Validator.check_schema(printed)


@pytest.mark.parametrize("path", recipes().values(), ids=list(recipes()))
def test_every_recipe_validates(validator, path):
    assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == []


def test_a_resolved_configuration_validates(validator, cli):
    assert list(validator.iter_errors(json.loads(cli("config", "demo", "--json").out))) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ((), "rouns", 4),
        ((), "rounds", 0),
        (("student",), "guidence", 1.0),
        (("algorithm",), "objective", "sum"),
        (("teachers", "text"), "strength", 1),
        ((), "cluster", 3),
        ((), "cluster", {"runtime": "slurm"}),
        ((), "model", {}),
    ],
)
def test_what_the_configuration_refuses_the_schema_refuses(validator, section, key, value):
    recipe = yaml.safe_load(recipes()["demo"].read_text())
    part = recipe
    for name in section:
        part = part[name]
    part[key] = value
    assert not validator.is_valid(recipe)


def test_every_key_is_there_with_its_docstring():
    made = schema()
    assert list(made["properties"]) == list(Config.model_fields) and "name" not in made["required"]
    assert made["properties"]["name"]["description"] == "The run folder is runs/<name>."
    assert made["$defs"]["OpdConfig"]["properties"]["kernel"]["description"].startswith("The step that draws")
