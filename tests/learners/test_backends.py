"""Every learner backend on two gloo ranks: as one rank, and each from what any other saved."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from opd_ray.config import ClusterConfig, LearnerPlacement
from opd_ray.errors import ConfigError
from opd_ray.learners import DdpEngine, make_engine
from opd_ray.learners.engine import MEETING, LossScale
from opd_ray.preflight import check_backend
from opd_ray.roles import Bases, make_learner
from tests.algorithms.parts import flat, load, run_config
from tests.learners.ranks import (
    BACKENDS,
    COMPARING,
    CROSSED,
    CROSSED_TOO,
    FULL,
    IN_FULL,
    NEXT,
    OFFLOADED_TOO,
    ROUNDS,
    SAVED,
    SEVERAL,
    SPREADING,
    compare,
    make,
    train,
    train_several,
)
from tests.runtime.runs import LOOPBACK

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def seen(tiny, tmp_path_factory):
    """What two ranks of each backend wrote down, started once: importing torch takes a while."""
    return two_ranks(tiny, tmp_path_factory.mktemp("ranks"), "first")


@pytest.fixture(scope="module")
def seen_more(tiny, tmp_path_factory):
    """The same of what adds less: moments in CPU memory, half precision, and the other pairs of backends."""
    return two_ranks(tiny, tmp_path_factory.mktemp("ranks-more"), "more")


def two_ranks(tiny, folder, part):
    meeting = {MEETING: str(folder / "meeting"), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    meeting |= {"MASTER_ADDR": "127.0.0.1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.learners.ranks", str(folder), str(tiny), part]
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as stream:
            ranks.append(
                subprocess.Popen(command, cwd=ROOT, env=os.environ | meeting | own, stdout=stream, stderr=stream)
            )
    try:
        for rank, log in zip(ranks, logs, strict=True):
            assert rank.wait(240) == 0, log.read_text()[-4000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return folder


@pytest.fixture(scope="module")
def alone(tiny):
    """The same rounds on a single rank, of a LoRA."""
    return by_itself(tiny)


@pytest.fixture(scope="module")
def alone_in_full(tiny):
    """The same of all weights."""
    return by_itself(tiny, lora=None)


def by_itself(tiny, **changes):
    one = make(tiny, DdpEngine(0, 1), **changes)
    rounds = train(one, range(ROUNDS), load(tiny))
    proof = {"probe": one.probe(), "mean": one.probe(average=True), **dict(one.gather(average=True))}
    return rounds, proof


def by_rank(folder: Path, name: str):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def read(folder: Path, name: str):
    """Loss over both ranks, norm and whole gradients of each round."""
    ranks = by_rank(folder, name)
    gradients = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())
    rounds = []
    for number, (one, other) in enumerate(zip(*ranks, strict=True)):
        assert one["norm"] == other["norm"], "ranks decide by the same number"
        own = {key.partition(":")[2]: g for key, g in gradients[0].items() if key.startswith(f"{number}:")}
        rounds.append({"loss": one["loss"] + other["loss"], "norm": one["norm"], "gradients": own})
    return rounds


def same(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert one["norm"] == pytest.approx(other["norm"], rel=tolerance)
        assert one["gradients"].keys() == other["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in other["gradients"].values())
        for name, gradient in one["gradients"].items():
            assert float((gradient - other["gradients"][name]).abs().max()) <= tolerance * largest, name


def test_the_rounds_that_are_compared_clip_and_differ(alone):
    rounds, _ = alone
    assert all(one["norm"] > 1e-4 for one in rounds), "clipped, see ranks.make"
    assert len({round(one["loss"], 5) for one in rounds}) == ROUNDS


@pytest.mark.parametrize("name", [*BACKENDS, *IN_FULL])
def test_two_ranks_of_each_backend_are_a_single_rank(seen, alone, alone_in_full, name):
    are_one(seen, name, alone_in_full if name.startswith(FULL) else alone)


@pytest.mark.verify
@pytest.mark.parametrize("name", OFFLOADED_TOO)
def test_two_ranks_whose_moments_are_in_cpu_memory_are_a_single_rank(seen_more, alone, alone_in_full, name):
    are_one(seen_more, name, alone_in_full if name.startswith(FULL) else alone)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_ranks_that_train_two_adapters_are_a_single_rank(seen, tiny, name):
    """Also where one rank has more items, so that the other repeats a forward for nothing: of the same adapter."""
    expected, moments = train_several(tiny, DdpEngine(0, 1), load(tiny))
    ranks = by_rank(seen, f"several-{name}")
    assert len(expected) == len(ranks[0]) == 4
    for one, other, whole in zip(*ranks, expected, strict=True):
        assert one["loss"] + other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert one["norm"] == other["norm"] == pytest.approx(whole["norm"], rel=1e-5)
    assert any(key.startswith("fake/") for key in moments) and not all(key.startswith("fake/") for key in moments)
    for rank in range(2):
        found = load_file(seen / f"several-{name}-{rank}.safetensors")
        assert found.keys() == moments.keys()
        for slot in (":step", ":exp_avg", ":exp_avg_sq"):
            own = [key for key in moments if key.endswith(slot)]
            largest = max(float(moments[key].abs().max()) for key in own)
            for key in own:
                assert float((found[key] - moments[key]).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize("name", COMPARING)
def test_two_ranks_that_compare_with_who_drew_are_a_single_rank(seen, tiny, name):
    """Also where an update sees a part of the items, off the policy that drew them."""
    alone = compare(make(tiny, DdpEngine(0, 1), name))
    same(read(seen, name), alone)
    first, second = (flat(one["gradients"]) for one in alone)
    assert min(float(first.norm()), float(second.norm())) > 1e-4, "clipped, see ranks.make"
    assert not torch.allclose(first, second, rtol=0.1)


@pytest.mark.parametrize("name", COMPARING)
def test_drawings_of_one_rank_that_the_student_would_not_make_stop_both_before_any_step(seen, name):
    first, second = by_rank(seen, f"drift-{name}")
    assert "on another learner rank" in first["told"]
    assert "rollout and learner compute differently" in second["told"] and "another" not in second["told"]
    assert first["unchanged"] and second["unchanged"]


def are_one(seen, name, one):
    rounds, proof = one
    same(read(seen, name), rounds)
    for rank in range(2):
        for key, tensor in load_file(seen / f"proof-{name}-{rank}.safetensors").items():
            # Adam divides small gradients by their own size, so that weights agree less than gradients do.
            torch.testing.assert_close(tensor, proof[key], rtol=1e-3, atol=1e-5)
    hashes = by_rank(seen, f"hashes-{name}")
    assert hashes[0] == hashes[1] and hashes[0]["student_sha256"] != hashes[0]["ema_sha256"]


@pytest.mark.parametrize(("source", "target"), CROSSED)
def test_what_one_backend_saved_another_resumes(seen, source, target):
    same(read(seen, f"{source}-{target}"), read(seen, source)[SAVED:])


@pytest.mark.verify
@pytest.mark.parametrize(("source", "target"), CROSSED_TOO)
def test_what_any_backend_saved_any_other_resumes(seen_more, source, target):
    same(read(seen_more, f"{source}-{target}"), read(seen_more, source)[SAVED:])


@pytest.mark.parametrize(("source", "target"), NEXT.items())
def test_full_weights_of_one_backend_go_on_on_another_and_diffusers_loads_them(seen, tiny, source, target):
    same(read(seen, f"{FULL}{source}-{target}"), read(seen, FULL + source)[SAVED:])
    written = SD3Transformer2DModel.from_pretrained(seen / f"{FULL}{source}-{target}")
    proof = load_file(seen / f"proof-{FULL}{source}-0.safetensors")
    base = dict(load(tiny).network.named_parameters())
    for name, parameter in written.named_parameters():
        torch.testing.assert_close(parameter.data, proof[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(parameter.data, base[name]), f"{name} was trained"
    assert torch.equal(written.pos_embed.pos_embed, load(tiny).network.pos_embed.pos_embed)


@pytest.mark.verify
@pytest.mark.parametrize("name", BACKENDS)
def test_full_weights_stay_in_float32_where_half_is_computed_in(seen_more, alone_in_full, name):
    found, first = read(seen_more, f"{FULL}{name}-bfloat16")[0], read(seen_more, f"{FULL}ddp-bfloat16")[0]
    assert found["loss"] == pytest.approx(alone_in_full[0][0]["loss"], rel=2e-2)
    assert found["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert found["norm"] == pytest.approx(first["norm"], rel=1e-2)


@pytest.mark.verify
@pytest.mark.parametrize("form", ["bfloat16", "float16"])
def test_half_precision_with_gradient_checkpointing_is_the_same_on_each_backend(seen_more, alone, form):
    """The scale of an fp16 loss is in none of the numbers; the first round is that of float32, but for its rounding."""
    first = read(seen_more, f"ddp-{form}")[0]
    assert first["loss"] == pytest.approx(alone[0][0]["loss"], rel=2e-2)
    for name in BACKENDS:
        (found,) = read(seen_more, f"{name}-{form}")[:1]
        assert found["loss"] == pytest.approx(first["loss"], rel=1e-3)
        assert found["norm"] == pytest.approx(first["norm"], rel=1e-2)


@pytest.mark.parametrize("name", SPREADING)
def test_a_network_is_spread_block_by_block(seen, tiny, name):
    """So that a card which cannot hold it never has to."""
    network = load(tiny).network
    blocks = [sum(p.nbytes for p in block.parameters()) for block in network.transformer_blocks]
    whole = sum(p.nbytes for p in network.parameters())
    for steps in by_rank(seen, f"spread-{name}"):
        if name.endswith("zero3"):
            assert steps == [[0, 0]], "parameter by parameter, before DeepSpeed would move what is whole"
            continue
        moved, left = zip(*steps, strict=True)
        assert moved[:-1] == pytest.approx(blocks, rel=0.2), "an adapter may be over them"
        assert sum(moved) >= whole and max(moved) < whole / 2
        assert list(left) == [sum(moved[number:]) for number in range(1, len(moved) + 1)], "nothing holds a whole one"


@pytest.mark.parametrize("name", IN_FULL)
def test_a_rank_holds_one_gathered_tensor_at_a_time(seen, tiny, name):
    parameters = [p.nbytes for p in load(tiny).network.parameters()]
    total, largest = sum(parameters), max(parameters)
    # A gather has its result, what the ranks sent, and perhaps a padded copy of that.
    allowed = {"state": 4 * largest, "hashes": 4 * largest, "export": 4 * largest}
    first, other = by_rank(seen, f"alive-{name}")
    assert allowed["state"] < total / 3, "else nothing is shown"
    if name == FULL + "ddp":
        assert max(*other.values(), first["state"], first["hashes"]) < largest, "live tensors, and no copy of them"
        return
    for asked, peak in other.items():
        assert peak <= allowed[asked], asked
    kept = {"state": 4 * total, "hashes": 0, "export": total}  # weights, average and two moments in CPU memory
    for asked, peak in first.items():
        assert peak <= kept[asked] + allowed[asked], asked
    if name in SPREADING:
        assert first["state"] >= kept["state"], "what is gathered is counted"


class Loaded(Exception):
    """Where a model would have been loaded."""


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ({"backend": "ddp"}, "cuda"),
        ({"backend": "deepspeed", "zero_stage": 2}, "cuda"),
        ({"backend": "deepspeed", "zero_stage": 3}, "cpu"),
        ({"backend": "fsdp2"}, "cpu"),
    ],
)
def test_a_base_that_is_spread_is_read_beside_the_card(tiny, backend, device):
    class Noted(Bases):
        def load(self, model, device, dtype, **parts):
            raise Loaded(device)

    config = run_config(
        tiny,
        teachers={"a": {"lora": "unread"}},
        prompts={"train": {"a": "unread"}},
        cluster={"runtime": "local", "learner": {**backend, "resources": {"gpu": 1}}},
    )
    with pytest.raises(Loaded, match=device):
        make_learner(config, 0, Noted())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fsdp2 of 3", "asked for rank {rank} of 3, this process is rank {rank} of 2"),
        ("deepspeed of 3", "asked for rank {rank} of 3, this process is rank {rank} of 2"),
        ("fsdp2 as another rank", "asked for rank {other} of 2, this process is rank {rank} of 2"),
        ("fsdp2 that shards nothing", "asked torch for fsdp2, and {weights} weights are not sharded: ['pos_embed.pro"),
        (
            "deepspeed of another stage",
            "asked DeepSpeed for (ZeRO stage, CPU offload, rank, ranks) (2, False, {rank}, 2), got (1, False, {rank},",
        ),
    ],
)
def test_an_engine_that_got_another_backend_or_world_stops_at_its_start(seen, tiny, what, message):
    weights = len(list(load(tiny).network.parameters()))
    for rank, refused in enumerate(by_rank(seen, "refused")):
        assert message.format(rank=rank, other=1 - rank, weights=weights) in refused[what]


def test_each_backend_says_what_it_got():
    with pytest.raises(RuntimeError, match=r"asked accelerate for ddp rank 1 of 2, got .* rank 0 of 1"):
        make_engine(LearnerPlacement(ranks=2), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 2}, "zero_stage 2 is DeepSpeed's, and backend is ddp"),
        ({"backend": "fsdp2", "zero_stage": 3}, "zero_stage 3 is DeepSpeed's, and backend is fsdp2"),
        ({"cpu_offload": True}, "cpu_offload true is DeepSpeed's, and backend is ddp"),
        ({"backend": "deepspeed", "zero_stage": 0}, "1, 2 or 3"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnerPlacement(**options)


def test_a_backend_that_is_not_installed_names_the_line_that_installs_it(monkeypatch):
    cluster = ClusterConfig(learner=LearnerPlacement(backend="deepspeed"))
    check_backend(cluster)
    monkeypatch.setattr("opd_ray.preflight.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'opd-ray\[deepspeed\]'"):
        check_backend(cluster)


def test_the_scale_of_an_fp16_loss_is_torchs():
    ours, theirs = LossScale(enabled=True), torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs.scale(torch.zeros(1))  # it makes its scale only then
    for overflow in (False, True, False, False, True):
        parameter.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow=overflow)
        expected = theirs.state_dict()
        assert ours.state_dict() == {name: expected[name] for name in ("scale", "_growth_tracker")}


def test_the_tested_release_of_deepspeed_is_the_one_that_runs():
    pinned = (ROOT / "constraints.txt").read_text().split("deepspeed==")[1].split()[0]
    assert version("deepspeed") == pinned


ALONE = """
import os, sys
import torch
from opd_ray.learners.engine import join
from opd_ray.planning.doctor import gloo
from tests.runtime.runs import listeners

torch.distributed.destroy_process_group = lambda: None
join(0, 1, "cpu") if sys.argv[1] == "learner" else gloo()
print(listeners(os.getpid()))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("who", ["learner", "doctor"])
def test_a_rank_of_its_own_listens_on_no_address_that_others_reach(who) -> None:
    found = subprocess.run(
        [sys.executable, "-c", ALONE, who], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    listening = ast.literal_eval(found.stdout)
    assert listening and set(listening) == {LOOPBACK}
