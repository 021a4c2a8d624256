"""Every configuration that is refused says in one line what, where, what was allowed and what to do."""

import copy
from pathlib import Path

import pytest
import yaml

from opd_ray import recipes
from opd_ray.config import ClusterConfig, Config, OpdConfig, PluginAlgorithmConfig, parse
from opd_ray.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.y*ml") if path.parent.name != "cluster")
CLUSTERS = sorted((CONFIGS / "cluster").glob("*.y*ml"))

GOOD = {
    "name": "run",
    "rounds": 4,
    "model": {"path": "somewhere"},
    "sampling": {"steps": 10},
    "batch": {"images_per_task": 8, "item_size": 4},
    "teachers": {"text": {"lora": "a"}, "look": {"lora": "b", "tasks": ["shine", "colour"]}},
    "prompts": {"train": {"text": "t.txt", "shine": "s.txt", "colour": "c.txt"}},
}


def changed(key, value):
    data = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return data


REFUSED = [
    # Keys.
    ("rouns", 4, "f: unknown key 'rouns' (did you mean 'rounds'?); allowed: name, seed, rounds, model,"),
    ("student.guidence", 2, "f: student: unknown key 'guidence' (did you mean 'guidance'?); allowed: lora, guidance"),
    ("teachers.text.strength", 2, "f: teachers.text: unknown key 'strength'; allowed: lora, model, revision, subfo"),
    ("algorithm.objectiv", "kl", "f: algorithm: unknown key 'objectiv' (did you mean 'objective'?); allowed: name, o"),
    ("cluster.rollout.worker", 2, "f: cluster.rollout: unknown key 'worker' (did you mean 'workers'?); allowed: thr"),
    ("rounds", KeyError, "f: rounds is missing"),
    ("model.path", KeyError, "f: model.path is missing"),
    ("teachers.text.lora", KeyError, "f: teachers.text: give either lora (over the student's base) or model (a full "),
    # Values.
    ("rounds", 0, "f: rounds: Input should be greater than or equal to 1, got 0"),
    ("seed", -1, "f: seed: Input should be greater than or equal to 0, got -1"),
    ("name", "../up", "f: name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$', got '../up'"),
    ("precision", "fp8", "f: precision: expected one of auto, fp32, bf16, fp16, or a section with one for "),
    ("model.max_sequence_length", 513, "f: model.max_sequence_length: Input should be less than or equal to 512, got"),
    ("student.lora.rank", 0, "f: student.lora.rank: Input should be greater than or equal to 1, got 0"),
    ("student.lora.alpha", 0, "f: student.lora.alpha: Input should be greater than 0, got 0"),
    ("student.guidance", -1, "f: student.guidance: Input should be greater than or equal to 0, got -1"),
    ("student.guidance", float("inf"), "f: student.guidance: Input should be a finite number, got inf"),
    ("optimizer.lr", float("nan"), "f: optimizer.lr: Input should be a finite number, got nan"),
    ("optimizer.betas", [0.9, 1.0], "f: optimizer.betas.1: Input should be less than 1, got 1.0"),
    ("optimizer.clip", 0, "f: optimizer.clip: Input should be greater than 0, got 0"),
    ("optimizer.schedule", "linear", "f: optimizer.schedule: Input should be 'constant' or 'cosine', got 'linear'"),
    ("ema.decay", 1.0, "f: ema.decay: Input should be less than 1, got 1.0"),
    ("ema.every", 0, "f: ema.every: Input should be greater than or equal to 1, got 0"),
    ("checkpoint.every", 0, "f: checkpoint.every: Input should be greater than or equal to 1, got 0"),
    ("evaluation.images_per_task", -1, "f: evaluation.images_per_task: Input should be greater than or equal to 0,"),
    ("algorithm.steps_per_item", 0, "f: algorithm.steps_per_item: Input should be greater than or equal to 1, got 0"),
    ("algorithm.timestep_fraction", 1.5, "f: algorithm.timestep_fraction: Input should be less than or equal to 1,"),
    ("algorithm.kernel", "euler", "f: algorithm.kernel: Input should be 'flow', 'dance', 'cps' or 'ddim', got 'euler'"),
    ("algorithm.task_weights", {"text": 0}, "f: algorithm.task_weights.text: Input should be greater than 0, got 0"),
    ("rounds", "six", "f: rounds: Input should be a valid integer, unable to parse string as an integer, got 'six'"),
    # The algorithm.
    (
        "algorithm",
        {"name": "dpo"},
        "f: algorithm: unknown algorithm; known: opd, opd_ppo, ddpo, sdpo_stepwise, pso_pairwise",
    ),
    ("algorithm", "opd", "f: algorithm: unknown algorithm; known: opd, opd_ppo, ddpo, sdpo_stepwise, pso_pairwise"),
    ("algorithm", {"name": "a.b:C", "objective": "kl"}, "f: algorithm: unknown key 'objective'; allowed: name, args"),
    ("algorithm", {"name": "a b:C"}, r"f: algorithm.name: String should match pattern '^[\w.]+:\w+$', got 'a b:C'"),
    ("algorithm.objective", "kl", "variance, which is 0 at noise_level 0; set algorithm.noise_level (paper's ablatio"),
    (
        "algorithm",
        {"objective": "kl", "noise_level": 0.7, "loss_target": "v"},
        "f: algorithm.loss_target v belongs to objective mean; kl compares xt",
    ),
    ("algorithm.task_weights", {"txt": 2}, "f: algorithm.task_weights.txt: no such task; known: text, shine, colour"),
    (
        "algorithm.timestep_fraction",
        0.05,
        "f: algorithm.timestep_fraction 0.05 of 10 steps leaves no step to train on; raise one of them",
    ),
    # What has to fit together.
    (
        "batch.item_size",
        3,
        "f: batch.item_size 3 does not divide batch.images_per_task 8; every work item has the same",
    ),
    ("batch.images_per_prompt", 3, "f: batch.images_per_prompt 3 does not divide batch.item_size 4; a prompt's images"),
    ("teachers", {}, "f: teachers is empty; algorithm opd learns from at least one"),
    ("teachers.rollout", {"lora": "c"}, "f: teacher name 'rollout' is not free; roles are rollout, teacher, reward, l"),
    ("teachers.a/b", {"lora": "c"}, "f: teacher name 'a/b' is not free"),
    ("teachers.third", {"lora": "c", "tasks": ["text"]}, "f: task 'text' has two teachers, text and third; give it o"),
    ("teachers.third", {"lora": "c"}, "f: teacher 'third' serves task 'third', which has no training prompts; prompts"),
    ("prompts.train.other", "o.txt", "f: task 'other' of prompts.train has no teacher; teachers serve colour, shine,"),
    (
        "prompts",
        None,
        "f: give one of prompts.train (rollouts draw on them), recorded (experience to read) and pairs (preferences)",
    ),
    (
        "recorded",
        "folder",
        "f: give one of prompts.train (rollouts draw on them), recorded (experience to read) and pairs (preferences)",
    ),
    # Where it runs.
    ("cluster.runtime", "slurm", "f: cluster.runtime: Input should be 'ray' or 'local', got 'slurm'"),
    ("cluster.max_staleness", -1, "f: cluster.max_staleness: Input should be greater than or equal to 0, got -1"),
    ("cluster.learner.backend", "zero", "f: cluster.learner.backend: Input should be "),
    ("cluster.rollout.workers", 0, "f: cluster.rollout.workers: Input should be greater than or equal to 1, got 0"),
    (
        "cluster.rollout.autoscale",
        {"min": 2, "max": 4},
        "f: cluster.rollout: workers 1 is not within autoscale.min 2 and autoscale.max 4; set workers to",
    ),
    ("cluster.rollout.autoscale", {}, "f: cluster.rollout.autoscale.max is missing"),
    ("cluster.rollout.autoscale", {"max": 0}, "f: cluster.rollout.autoscale.max: Input should be greater than or e"),
    (
        "cluster.rollout.autoscale",
        {"max": 2, "target": 1},
        "f: cluster.rollout.autoscale.target: Input should be less than 1, got 1",
    ),
    ("cluster.rollout.threads", 0, "f: cluster.rollout.threads: Input should be greater than or equal to 1, got 0"),
    ("cluster.rollout.resources", {"cpu": -1}, "f: cluster.rollout.resources: amounts are 0 or more"),
    (
        "precision",
        {"rollout": "int8"},
        "f: precision.rollout: Input should be 'auto', 'fp32', 'bf16' or 'fp16'",
    ),
    ("teachers.text.model", "full", "f: teachers.text: give either lora (over the student's base) or model (a full "),
    (
        "cluster.learner",
        {"ranks": 2, "resources": {"gpu": 0.5}},
        "f: cluster.learner.resources.gpu: ranks cannot sha",
    ),
    (
        "cluster.share_base",
        True,
        "f: cluster.share_base: workers of Ray are processes of their own; use ",
    ),
    (
        "cluster.rewards.look",
        {"workers": 2},
        "f: cluster.rewards.look: no such reward; known: none, and default for all others",
    ),
    ("cluster.teachers.txt", {"workers": 2}, "f: cluster.teachers.txt: no such teacher; known: text, look"),
    (
        "cluster",
        {"share_teachers": True, "teachers": {"text": {"workers": 2}}},
        "f: cluster.teachers.text: teachers are shared, so only `default` applies",
    ),
    (
        "cluster",
        {"runtime": "local", "learner": {"ranks": 2}},
        "f: cluster.learner.ranks: runtime local has one rank; use runtime: ray",
    ),
    ("cluster.learner.ranks", 7, "f: cluster.learner.ranks: a round has fewer work items than ranks; lower batch.ite"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_configuration_is_refused_in_one_line(key, value, message):
    with pytest.raises(ConfigError) as caught:
        parse(changed(key, value), "f")
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster.learner.ranks", 6),  # three tasks of two items
        ("algorithm", {"name": "my.package:Mine", "args": {"anything": [1, 2]}}),
        ("algorithm", {"objective": "kl", "noise_level": 0.7}),
        ("batch.images_per_prompt", 4),
        ("prompts.train", "one_file.csv"),  # its tasks are known once it is read
        ("prompts.eval", {"mixed": "m.txt"}),  # scored alone, without a teacher
        ("ema", None),
        ("evaluation.images_per_task", 0),
    ],
    ids=str,
)
def test_what_can_run_is_taken(key, value):
    assert parse(changed(key, value), "f").name == "run"


def test_an_algorithm_of_ones_own_needs_no_teachers_and_may_have_recordings():
    data = changed("algorithm", {"name": "my.package:Mine"}) | {"teachers": {}, "prompts": None, "recorded": "folder"}
    config = parse(data | {"cluster": {"learner": {"ranks": 2}}}, "f")
    assert config.teacher_of_task == {} and isinstance(config.algorithm, PluginAlgorithmConfig)


def test_defaults_are_the_vetted_run():
    config = parse(GOOD, "f")
    assert config.algorithm == OpdConfig()
    opd = OpdConfig()
    assert (opd.objective, opd.loss_target, opd.noise_level, opd.timestep_fraction) == ("mean", "xt", 0.0, 0.99)
    assert (config.student.lora.rank, config.student.lora.alpha, config.student.guidance) == (32, 64, 4.5)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (3e-4, (0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip, optimizer.schedule) == (1e-4, 1.0, "constant")
    assert (config.ema.decay, config.ema.every) == (0.9, 8)
    assert (Config.model_fields["batch"].default.images_per_task, config.evaluation.steps) == (24, (40,))


def test_routing_is_by_the_name_of_the_task():
    assert parse(GOOD, "f").teacher_of_task == {"text": "text", "shine": "look", "colour": "look"}


def test_a_configuration_does_not_change_and_survives_its_own_dump():
    config = parse(GOOD, "f")
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 5
    dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse(dumped, "f") == config


# Recipes.


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"cluster": "here.yaml"}))
    (tmp_path / "here.yaml").write_text("runtime: local\nrollout: {workers: 2}\n")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    by_name, by_path = recipes.load(path.stem), recipes.load(str(path))
    assert by_name == by_path
    assert yaml.safe_load(path.read_text())["name"] == by_name.name


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_shipped_cluster_is_valid(path):
    assert ClusterConfig.model_validate(yaml.safe_load(path.read_text()))
    assert path.stem not in {one.stem for one in SHIPPED}


def test_there_are_recipes_and_each_is_found_by_name():
    assert SHIPPED and CLUSTERS
    assert set(recipes.recipes()) == {path.stem for path in SHIPPED}


def test_the_cluster_may_be_a_file_beside_the_recipe(recipe):
    config = recipes.load(str(recipe))
    assert (config.cluster.runtime, config.cluster.rollout.workers) == ("local", 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rounds=6", lambda c: c.rounds == 6),
        ("student.lora.rank=8", lambda c: c.student.lora.rank == 8),
        ("optimizer.lr=1e-3", lambda c: c.optimizer.lr == 1e-3),  # text, to YAML 1.1
        ("cluster.rollout.workers=5", lambda c: c.cluster.rollout.workers == 5 and c.cluster.runtime == "local"),
        ("cluster.learner.threads=3", lambda c: c.cluster.learner.threads == 3),
        ("cluster=local", lambda c: c.cluster.share_teachers),
        ("ema=null", lambda c: c.ema is None),
        ("teachers.text.guidance=1", lambda c: c.teachers["text"].guidance == 1),
        ("algorithm.task_weights={text: 2}", lambda c: c.algorithm.task_weights == {"text": 2}),
        ("name=a=b", None),
    ],
)
def test_overrides_change_one_value(recipe, override, expected):
    if expected is None:  # the first = parts key and value, the rest is the value's
        with pytest.raises(ConfigError, match="got 'a=b'"):
            recipes.load(str(recipe), [override])
    else:
        assert expected(recipes.load(str(recipe), [override]))


def test_the_last_override_wins(recipe):
    assert recipes.load(str(recipe), ["rounds=6", "rounds=7", "cluster=local", "cluster.rollout.threads=2"]).rounds == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "-o rounds: expected key=value, for instance -o rounds=6"),
        ("=6", "-o =6: expected key=value"),
        ("rounds.many=6", "-o rounds.many=6: rounds is a value, not a section"),
        ("rounds=[6", "-o rounds=[6: '[6' is not a YAML value"),
        ("rouns=6", "mine.yaml: unknown key 'rouns' (did you mean 'rounds'?); allowed: name, seed,"),
        ("cluster.rolout.workers=6", "mine.yaml: cluster: unknown key 'rolout' (did you mean 'rollout'?)"),
        ("rounds=0", "mine.yaml: rounds: Input should be greater than or equal to 1, got 0"),
        ("algorithm.objective=kl", "mine.yaml: algorithm.objective kl divides by the kernel's variance"),
        ("cluster.rollout.resources={cpu: -2}", "mine.yaml: cluster.rollout.resources: amounts are 0 or more"),
        ("cluster=nowhere", "no cluster file 'nowhere'; known: "),
        ("cluster=nowhere.yaml", "nowhere.yaml: no such file"),
        ("cluster=3", "no cluster file '3'; known: "),
        ("model=3", "mine.yaml: model: expected a mapping of its keys, got 3"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(recipe, override, message):
    with pytest.raises(ConfigError) as caught:
        recipes.load(str(recipe), [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", "bad.yaml: not YAML: while parsing a flow sequence"),
        (b"- 1\n- 2\n", "bad.yaml: expected a mapping of sections, found list"),
        (b"", "bad.yaml: expected a mapping of sections, found NoneType"),
        (b"name: \xff\xfe", "bad.yaml: cannot be read ("),
        (b"name: x\ncluster: [1]\n", "bad.yaml: "),
        (b"1: x\n", "bad.yaml: unknown key 1; allowed: name"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        recipes.load(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    known = ", ".join(path.stem for path in SHIPPED)
    with pytest.raises(ConfigError, match=f"no recipe 'demoo'; known: {known}. Or give the path of a YAML file"):
        recipes.load("demoo")
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        recipes.load(str(tmp_path / "gone.yaml"))


def test_an_installed_package_has_its_own_copy(tmp_path, monkeypatch):
    """Where there is no checkout around the package, recipes lie inside it."""
    package = tmp_path / "site-packages" / "opd_ray"
    (package / "configs" / "cluster").mkdir(parents=True)
    (package / "configs" / "only.yaml").write_text(yaml.safe_dump(GOOD))
    (package / "configs" / "cluster" / "local.yaml").write_text("runtime: local\n")
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert list(recipes.recipes()) == ["only"]
    assert recipes.load("only").cluster.runtime == "local"
    with pytest.raises(ConfigError, match="no recipe 'demo'; known: only"):
        recipes.load("demo")
