"""A group without a role, and a role without a group, are refused by name before anything is applied."""

import copy

import pytest
import yaml

from opd_ray.config import parse
from opd_ray.errors import ConfigError
from opd_ray.planning.manifests import check_manifests

CONFIG = {
    "name": "run",
    "rounds": 4,
    "model": {"path": "somewhere"},
    "batch": {"images_per_task": 8, "item_size": 4},
    "teachers": {"text": {"lora": "a"}, "look": {"lora": "b"}},
    "prompts": {"train": {"text": "t.txt", "look": "l.txt"}},
    "cluster": {
        "rollout": {"workers": 2, "resources": {"cpu": 1, "gpu": 1, "student_node": 0.001}},
        "teachers": {
            "text": {"resources": {"gpu": 1, "text_node": 0.001}, "autoscale": {"max": 3}},
            "look": {"resources": {"gpu": 0.5, "look_node": 0.001}},
        },
        "rewards": {"default": {"resources": {"cpu": 0.5}}},
        "learner": {"ranks": 2, "resources": {"cpu": 1, "gpu": 1, "student_node": 0.001}},
    },
}


def group(name, custom="", most=1, **limits):
    resources = '"{' + f'\\"{custom}\\": 1' + '}"'
    parameters = {"resources": resources} if custom else {}
    limits = {name.replace("gpu", "nvidia.com/gpu"): amount for name, amount in limits.items()}
    containers = [{"name": "ray", "resources": {"limits": limits}}]
    spec = {"rayStartParams": parameters, "template": {"spec": {"containers": containers}}}
    return spec | {"groupName": name, "maxReplicas": most}


GROUPS = (
    group("student", "student_node", cpu="4", gpu="4"),
    group("text", "text_node", most=3, gpu="1"),
    group("look", "look_node", gpu="1"),
    group("cpu", cpu="500m"),
)


def check(groups, config=CONFIG, kind="RayCluster", **changes):
    head = group("head") | {"rayStartParams": {"num-cpus": "0"}}
    spec = {"headGroupSpec": head, "workerGroupSpecs": list(groups)} | changes
    spec = {"rayClusterSpec": spec} if kind == "RayJob" else spec
    manifest = {"kind": kind, "metadata": {"name": "c"}, "spec": spec}
    other = {"kind": "Service", "metadata": {"name": "s"}}
    return check_manifests(parse(copy.deepcopy(config), "f"), yaml.safe_dump_all([other, manifest]), "m.yaml")


def but(place, **changes):
    """The groups, one of them changed."""
    return [one | changes if one["groupName"] == place else one for one in GROUPS]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_what_fits_is_told_in_a_few_words(kind):
    assert check(GROUPS, kind=kind) == f"4 groups of {kind} c for 5 roles"


def test_resources_may_stand_in_the_group_itself():
    """KubeRay takes either form; where a group has the field, it overrides the limits."""
    own = {"rayStartParams": {}, "resources": {"GPU": "1", "text_node": "1", "memory": "1Gi"}}
    assert check(but("text", **own)).startswith("4 groups")
    with pytest.raises(
        ConfigError, match=r"no group takes teacher\.text, which asks one node for \{GPU: 1, text_node: 0"
    ):
        check(but("text", **own | {"resources": {"GPU": "0", "text_node": "1"}}))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            [*GROUPS, group("old", "old_node", cpu="8", gpu="8")],
            "m.yaml: RayCluster c: no role uses group 'old': none asks for old_node; asked for: look_node, "
            "student_node, text_node. Remove the group, or add its resource to a role of the cluster file",
        ),
        (
            but("cpu", template=group("x", cpu="0")["template"]),
            "m.yaml: RayCluster c: no role uses group 'cpu': its nodes offer {}, too little for each of them. "
            "Remove the group, or enlarge its limits",
        ),
        (
            [one for one in GROUPS if one["groupName"] != "look"],
            "m.yaml: RayCluster c: no group takes teacher.look, which asks one node for {GPU: 0.5, look_node: 0.001}: "
            "nobody offers look_node (head {}; student {CPU: 4, GPU: 4, student_node: 1}; text {GPU: 1, text_node: 1}; "
            "cpu {CPU: 1}). Add a group, or change the role's resources in the cluster file",
        ),
        (
            but("text", maxReplicas=0),
            "m.yaml: RayCluster c: no group takes teacher.text, which asks one node for {GPU: 1, text_node: 0.001}: "
            "no node has that much",
        ),
        (
            but("text", maxReplicas=2),
            "m.yaml: RayCluster c: teacher.text may have 3 workers, and beside the other roles there is room for 2 "
            "(maxReplicas: text 2). Raise maxReplicas, or lower workers or autoscale.max",
        ),
        (
            but("student", template=group("x", cpu="4", gpu="3")["template"]),
            "m.yaml: RayCluster c: rollout may have 2 workers, and beside the other roles there is room for 1 "
            "(maxReplicas: student 1)",
        ),
        (
            but("student", template=group("x", cpu="4", gpu="1")["template"], maxReplicas=4),
            "m.yaml: RayCluster c: no group takes learner, which asks one node for {CPU: 2, GPU: 2, ",
        ),
        (
            but("look", template={"spec": {}}),
            "m.yaml: RayCluster c is no valid RayCluster spec (KeyError: 'containers')",
        ),
    ],
)
def test_refused_in_one_line(groups, expected):
    with pytest.raises(ConfigError) as refused:
        check(groups)
    assert str(refused.value).startswith(expected) and "\n" not in str(refused.value)


def test_more_hosts_a_replica_are_more_nodes():
    assert check(but("text", maxReplicas=1, numOfHosts=3)).startswith("4 groups")


def test_shared_teachers_are_one_role():
    config = copy.deepcopy(CONFIG)
    config["cluster"] |= {
        "share_teachers": True,
        "teachers": {"default": {"resources": {"gpu": 1, "text_node": 0.001}}},
    }
    assert (
        check([one for one in GROUPS if one["groupName"] != "look"], config) == "3 groups of RayCluster c for 4 roles"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "kind: RayJob\nspec: {entrypoint: x}\n",
            "m.yaml: no RayCluster, and no RayJob with a rayClusterSpec; give depl",
        ),
        ("", "m.yaml: no RayCluster"),
        ("a: [", "m.yaml: not YAML: "),
    ],
)
def test_a_stream_without_a_cluster_is_refused(text, expected):
    with pytest.raises(ConfigError) as refused:
        check_manifests(parse(copy.deepcopy(CONFIG), "f"), text, "m.yaml")
    assert str(refused.value).startswith(expected)
