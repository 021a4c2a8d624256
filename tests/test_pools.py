"""Workers of runs and of evaluations are made in one way."""

from opd_ray.config import ClusterConfig, RewardPlacement
from opd_ray.pools import make_pool, new_nonce
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.local import LocalBackend


def test_a_pool_has_what_its_placement_and_its_cluster_say(tmp_path):
    cluster = ClusterConfig(runtime="ray", storage="ship", heartbeat_timeout_s=40.0)
    own = RewardPlacement(workers=2, threads=3, resources={"cpu": 3}, deadline_s=7.0, runtime_env={"pip": ["a"]})
    dispatcher = Dispatcher(LocalBackend(), call_timeout_s=9.0)
    (tmp_path / ".nonce-old").touch()
    new_nonce(tmp_path)
    (nonce,) = tmp_path.glob(".nonce-*")
    made = make_pool(dispatcher, cluster, tmp_path, "reward.a", own, object, home=True)
    spec = made.spec
    assert dispatcher.pools == [made] and made.size == 2
    assert (spec.role, spec.threads, spec.resources, spec.logs) == ("reward.a", 3, {"cpu": 3}, tmp_path / "logs")
    assert spec.nonce == (nonce, nonce.name.removeprefix(".nonce-"))
    assert spec.ship and spec.home and spec.runtime_env == {"pip": ["a"]}
    assert spec.stack_after_s == 30.0, "before it is given up for dead after 40 s"
