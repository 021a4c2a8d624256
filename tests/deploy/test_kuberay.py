"""The manifests are what KubeRay takes, and every name in them is one that the code, the image or Kubernetes knows."""

import copy
import shlex
import shutil
import subprocess
import sys
from pathlib import PurePosixPath

import jsonschema
import pytest
import typer.main
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

import opd_ray
from opd_ray.cli import app
from opd_ray.commands.options import overrides
from opd_ray.commands.train import _patience_s
from opd_ray.planning.manifests import _group, check_manifests
from opd_ray.recipes import load
from tests.deploy.kustomize import KUBERAY, ROOT, at, build, one

SCHEMA = yaml.safe_load((ROOT / "tests" / "deploy" / "crd.yaml").read_text(encoding="utf-8"))
VARIANTS = {"rayjob": "RayJob", "raycluster": "RayCluster"}
UNITS = {"Gi": 2**30, "Ti": 2**40}
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()

CLUSTER = one(build(KUBERAY / "raycluster"), "RayCluster")
JOB = one(build(KUBERAY / "rayjob"), "RayJob")["spec"]
HEAD, GROUPS = CLUSTER["spec"]["headGroupSpec"], CLUSTER["spec"]["workerGroupSpecs"]
NODES = {"head": HEAD} | {group["groupName"]: group for group in GROUPS}
PODS = {name: node["template"]["spec"] for name, node in NODES.items()}
SHARED = PurePosixPath("/shared")


def refuse(document):
    """Whatever the schema has against a manifest."""
    schema = SCHEMA | {"$ref": f"#/$defs/{document['kind']}"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def of_bytes(quantity):
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def entrypoint():
    """Verb and options of the job's command, as the command line itself reads them."""
    program, verb, *arguments = shlex.split(JOB["entrypoint"])
    assert program == "opd-ray"
    command = typer.main.get_command(app).commands[verb]
    return verb, command.make_context(verb, arguments).params


@pytest.fixture
def config():
    _, given = entrypoint()
    return load(given["config"], overrides(given["override"], None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_valid_and_has_one_way_to_run(variant):
    documents = build(KUBERAY / variant)
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", VARIANTS[variant]]
    assert [refuse(document) for document in documents] == [[], []]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec.backofLimit", 3, "Additional properties are not allowed ('backofLimit' was unexpected)"),
        ("spec.backoffLimit", "3", "'3' is not of type 'integer'"),
        ("spec.submissionMode", "K8sJob", "'K8sJob' is not one of"),
        ("spec.rayClusterSpec.autoscalerOptions.version", 2, "2 is not one of ['v1', 'v2']"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volume", [], "('volume' was unexpected)"),
        ("metadata.name", "Opd_Ray", "'Opd_Ray' does not match"),
    ],
)
def test_the_schema_refuses(path, value, expected):
    document = copy.deepcopy(one(build(KUBERAY / "rayjob"), "RayJob"))
    *parents, last = path.split(".")
    at(document, parents)[last] = value
    (message,) = refuse(document)
    assert expected in message


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_itself_builds_the_same(variant):
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERAY / variant], capture_output=True, text=True, timeout=60, check=True
    )
    assert list(yaml.safe_load_all(done.stdout)) == build(KUBERAY / variant)


def test_what_the_operator_asks_of_a_token_and_of_autoscaler_v2():
    spec = CLUSTER["spec"]
    assert spec["authOptions"]["mode"] == "token" and f"ray=={spec['rayVersion']}" in CONSTRAINTS
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    for pod in PODS.values():
        assert "restartPolicy" not in pod  # with v2 it has to be Never, which the operator sets itself
        names = [variable["name"] for variable in pod["containers"][0]["env"]]
        assert not {name for name in names if name.startswith("RAY_")}, "those are KubeRay's"
    for node in NODES.values():
        assert not ("resources" in node and {"num-cpus", "num-gpus", "resources"} & set(node["rayStartParams"]))


def test_a_retry_is_the_same_command_on_a_new_cluster():
    """It goes on from the newest checkpoint, and `claim` fences the attempt before (tests/storage, tests/runtime)."""
    verb, given = entrypoint()
    assert verb == "train" and given["resume"] is True and given["force"] is False
    assert JOB["backoffLimit"] > 0 and JOB["submitterConfig"]["backoffLimit"] == 0
    assert "clusterSelector" not in JOB, "without a cluster of its own there is no retry"
    assert JOB["shutdownAfterJobFinishes"] is True and JOB["ttlSecondsAfterFinished"] > 0
    assert JOB["rayClusterSpec"] == CLUSTER["spec"]


def test_the_job_may_finish_its_round_when_it_is_stopped(monkeypatch):
    variables = yaml.safe_load(JOB["runtimeEnvYAML"])["env_vars"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert _patience_s() > 300 and list(variables) == ["RAY_JOB_STOP_WAIT_TIME_S"]


def test_what_must_outlive_a_node_is_on_the_shared_volume():
    _, given = entrypoint()
    claim = one(build(KUBERAY / "raycluster"), "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in PODS.values():
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
        assert not volumes, "each volume is mounted"
        assert mounts[str(SHARED)]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        variables = {variable["name"]: variable for variable in container["env"]}
        for path in (given["out"], container["workingDir"], variables["HF_HOME"]["value"]):
            assert PurePosixPath(path).is_relative_to(SHARED)
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True


def test_hub_models_and_the_token_are_found_where_the_variables_point():
    told = "from huggingface_hub import constants, get_token; print(constants.HF_HUB_CACHE, get_token())"
    variables = {variable["name"]: variable.get("value", "secret") for variable in PODS["head"]["containers"][0]["env"]}
    done = subprocess.run([sys.executable, "-c", told], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/shared/huggingface/hub", "secret"]


@pytest.mark.parametrize("name", NODES)
def test_the_object_store_lies_in_memory_that_the_node_has(name):
    pod, parameters = PODS[name], NODES[name]["rayStartParams"]
    (memory,) = (v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v)
    (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "shared-mem")
    assert mount["mountPath"] == "/dev/shm" and memory["medium"] == "Memory"
    store, limit = int(parameters["object-store-memory"]), pod["containers"][0]["resources"]["limits"]["memory"]
    assert store >= load("sd35_mopd", ["cluster=8gpu"]).cluster.object_store_mb * 2**20
    assert store < of_bytes(memory["sizeLimit"]) < of_bytes(limit) / 2


@pytest.mark.parametrize("name", NODES)
def test_ports_are_rays_and_each_node_shows_its_metrics(name):
    ports = {port["name"]: port["containerPort"] for port in PODS[name]["containers"][0]["ports"]}
    assert ports.pop("metrics") == int(NODES[name]["rayStartParams"]["metrics-export-port"])
    ours = {"gcs-server": ray_constants.DEFAULT_PORT, "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT}
    assert ports == (ours if name == "head" else {})


@pytest.mark.parametrize("name", NODES)
def test_nobody_is_root(name):
    pod, (container,) = PODS[name], PODS[name]["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and container["image"] == f"opd-ray:{opd_ray.__version__}"
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_each_role_has_its_group_and_each_group_its_role(config):
    assert check_manifests(config, yaml.safe_dump(CLUSTER), "f") == "5 groups of RayCluster opd-ray for 6 roles"
    assert check_manifests(config, yaml.safe_dump({"kind": "RayJob", "spec": JOB}), "f").endswith("for 6 roles")
    cluster = config.cluster
    roles = {"student": cluster.rollout, "reward": cluster.rewards["default"]}
    roles |= {f"teacher-{name}": cluster.of_teacher(name) for name in config.teachers}
    assert list(roles) and set(roles) == {group["groupName"] for group in GROUPS}
    for name, placement in roles.items():
        assert _group(NODES[name]).custom == set(placement.resources) - {"cpu", "gpu"}
    assert cluster.nodes_may_come and {group["groupName"]: group["minReplicas"] for group in GROUPS}["student"] == 1


def test_rays_own_autoscaler_reads_the_same_resources():
    """Ray 2.60's reader of a RayCluster: what it makes of each group is what the doctor compares."""
    cluster = copy.deepcopy(CLUSTER)
    cluster["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    for name, node in NODES.items():
        told = types["headgroup" if name == "head" else name]
        ours = _group(node, head=name == "head")
        assert {k: v for k, v in told["resources"].items() if k != "memory" and v} == ours.offers
        assert told["max_workers"] == (0 if name == "head" else ours.most)
    assert types["headgroup"]["resources"]["CPU"] == 0, "no worker beside the driver"
