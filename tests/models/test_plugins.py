import pytest

from opd_ray import plugins
from opd_ray.errors import ConfigError

KNOWN = {"join": "os.path:join", "path": "pathlib:Path"}


def test_short_names_and_dotted_names():
    import os.path
    import pathlib

    assert plugins.load("join", KNOWN, "reward") is os.path.join
    assert plugins.load("pathlib:Path", {}, "reward") is pathlib.Path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jion", "reward 'jion' is unknown. Known: join, path. For your own use package.module:at"),
        ("no_such_package.x:f", "cannot import 'no_such_package.x'"),
        (":f", "reward ':f': cannot import ''"),
        ("pathlib:Paht", "pathlib has no 'Paht'; it has "),
        ("pathlib:", "pathlib has no ''"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(name, message):
    with pytest.raises(ConfigError) as caught:
        plugins.load(name, KNOWN, "reward")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_does_not_import_is_refused_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("x = 1\nclass Mine(Algorithm): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        plugins.load("broken_plugin:Mine", KNOWN, "reward")
    message = str(caught.value)
    assert "importing 'broken_plugin' raised NameError: name 'Algorithm' is not defined" in message
    assert message.endswith("broken_plugin.py, line 2)") and "\n" not in message


def score(images, prompts, *, sharpness=1.0, mode="mean"):
    return images


class Scorer:
    def __init__(self, device, *, weights):
        pass


def test_arguments_that_are_not_taken_are_named():
    plugins.check_arguments(score, {"sharpness": 2}, "rewards.score")
    plugins.check_arguments(Scorer, {"weights": "x"}, "rewards.scorer")
    plugins.check_arguments(lambda **anything: None, {"whatever": 1}, "rewards.mine")
    with pytest.raises(ConfigError, match=r"rewards.score: score takes no argument 'sharpnes'; it t"):
        plugins.check_arguments(score, {"mode": 1, "sharpnes": 2}, "rewards.score")
    with pytest.raises(ConfigError, match=r"Scorer takes no argument 'self'; it takes device, wei"):
        plugins.check_arguments(Scorer, {"self": 1}, "rewards.scorer")
