"""`ray job submit` for real: a head with a token, the command line of Ray, jobs that end in every way."""

import urllib.error
import urllib.request

import pytest
import yaml

from opd_ray.storage.run_folder import read_json
from tests.runtime.jobs import head, processes, until
from tests.runtime.runs import LOOPBACK, descendants, go, listeners

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster():
    with head() as started:
        yield started


@pytest.fixture
def train(make_config, tmp_path):
    """Entrypoint that trains a recipe; keywords replace sections."""

    def entrypoint(**changes):
        config = make_config("ray", cluster={"share_teachers": True}, **changes)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return ["opd-ray", "train", path, "--out", tmp_path / "runs"]

    return entrypoint


def ended(job: str) -> None:
    """No process of the job is left."""
    until(lambda: not processes(job), 30)


def answer(cluster, token: str | None) -> int:
    """The HTTP status of a list of jobs."""
    request = urllib.request.Request(f"{cluster.url}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_nobody_submits_without_the_token(cluster) -> None:
    assert [answer(cluster, token) for token in (cluster.token, None, "another")] == [200, 401, 403]
    wrong = cluster.ray("job", "submit", "--submission-id", "theirs", "--", "true", RAY_AUTH_TOKEN="another")
    assert wrong.returncode == 1 and "Invalid authentication token" in wrong.stdout
    assert cluster.ray("job", "status", "theirs").returncode == 1, "it was never taken"


def test_a_job_leaves_its_run_and_no_process(cluster, train, reference, tmp_path) -> None:
    """The student is that of a run in one process, bit for bit."""
    said = cluster.submit("good", *train())
    assert "Job 'good' succeeded" in said
    assert "Trained for 3 rounds" in said and "Trained for 3 rounds" in cluster.ray("job", "logs", "good").stdout
    ended("good")
    run = tmp_path / "runs" / "tiny"
    assert {"checkpoints", "config.yaml", "logs", "lora", "metrics.jsonl", "report.html", "run.json"} <= {
        path.name for path in run.iterdir()
    }
    assert read_json(run / "status.json")["status"] == "done"
    assert read_json(run / "result.json")["student_sha256"] == reference(3).result["student_sha256"]


@pytest.mark.verify
def test_a_refused_recipe_fails_its_job_in_one_line(cluster, train) -> None:
    said = cluster.submit("crowd", *train(), "-o", "cluster.rollout.workers=400")
    assert "Job 'crowd' failed" in said and "exit code 2" in said and "error: no room for 402 workers" in said
    ended("crowd")


@pytest.mark.verify
def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster, train, make_config, tmp_path) -> None:
    """Stopped while it starts; within a round, since Ray waits 3 s; after a round, since it waits longer."""
    long = {"rounds": 5, "batch": {"images_per_task": 64, "item_size": 2}}
    entrypoint, run = [*train(**long), "--resume"], tmp_path / "runs" / "tiny"
    metrics = run / "metrics.jsonl"

    def stop(job: str, after: int, **patience: str) -> str:
        cluster.submit(job, *entrypoint, wait=False, **patience)
        until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= after, 120)
        seen = {pid: set(listeners(pid)) for pid in [*descendants(cluster.pid), *processes(job)]}
        assert len(processes(job)) >= 5, "supervisor, driver, three workers"
        assert set().union(*seen.values()) == {LOOPBACK}, seen
        assert f"Job '{job}' was stopped" in cluster.ray("job", "stop", job).stdout
        ended(job)
        assert read_json(run / "status.json")["status"] == read_json(run / "result.json")["status"] == "stopped"
        return cluster.ray("job", "logs", job).stdout.strip().splitlines()[-1]

    cluster.submit("early", *entrypoint, wait=False, RAY_JOB_STOP_WAIT_TIME_S="60")
    until(lambda: "starting 3 workers" in cluster.ray("job", "logs", "early").stdout, 120)
    cluster.ray("job", "stop", "early")
    ended("early")
    assert "stopped: interrupted; go on from the last checkpoint" in cluster.ray("job", "logs", "early").stdout
    stop("hasty", 1)
    assert stop("patient", 2, RAY_JOB_STOP_WAIT_TIME_S="60").startswith("stopped: stopped after round ")
    assert read_json(run / "status.json")["round"] < 5
    assert "Job 'last' succeeded" in cluster.submit("last", *entrypoint)
    ended("last")
    undisturbed = go(make_config(**long), tmp_path / "undisturbed")
    assert read_json(run / "result.json")["student_sha256"] == undisturbed.result["student_sha256"]
