"""What an evaluation says of the rewards that score it, and goes on with only where it is the same."""

import pytest

from opd_ray.evaluation.versions import of_rewards

NAME = "judging_things.judge:score"
FILES = {
    "judge.py": "from .rules import limit\nfrom judging_things import tables\n\ndef score(images, prompts): ...\n",
    "rules.py": "import judging_things.numbers_of\nlimit = 1\n",
    "numbers_of.py": "import torch\n",
    "tables.py": "",
    "unused.py": "",
    "__init__.py": "",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "judging_things"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def code(name=NAME):
    return of_rewards({name: {}}, {})[name]["code_sha256"]


def test_a_rewards_code_is_its_file_and_those_of_its_package_that_it_imports(package):
    before = code()
    (package / "unused.py").write_text("x = 1\n")
    assert code() == before
    for name in ("judge.py", "rules.py", "numbers_of.py", "tables.py"):
        (package / name).write_text(FILES[name] + "x = 1\n")
        assert code() != before, name
        (package / name).write_text(FILES[name])
        assert code() == before


def test_rewards_of_their_own_environment_are_known_by_it_and_its_keys_are_not_told():
    def told(environment):
        return of_rewards({"there.only:judge": {}}, {"there.only:judge": environment})["there.only:judge"]

    one = told({"pip": ["hpsv2==1.2"], "env_vars": {"KEY": "secret"}})
    assert "code_sha256" not in one and "secret" not in str(one) and len(one["runtime_env_sha256"]) == 64
    assert one == told({"env_vars": {"KEY": "secret"}, "pip": ["hpsv2==1.2"]})
    assert one != told({"env_vars": {"KEY": "secret"}, "pip": ["hpsv2==1.3"]})
    assert of_rewards({"look": {}}, {"look": {}})["look"].keys() == {"code", "arguments", "files", "code_sha256"}
