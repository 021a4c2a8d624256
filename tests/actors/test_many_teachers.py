"""More teachers than fit into a worker: LoRAs stay, checkpoints come and go, and nobody sees it in an answer."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_ray.actors import TeacherActor
from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError, PlacementError
from opd_ray.models import load_family
from opd_ray.models.residents import Residents
from opd_ray.models.teachers import Checkpoint
from opd_ray.runtime.hosts import TeacherHost
from opd_ray.storage.packing import pack_trajectory
from tests.algorithms.parts import item, load, on, random_experience, vary, write_specialists

LORAS = tuple(f"lora{number}" for number in range(9))
FULL = ("x", "y", "z")


@pytest.fixture(scope="module")
def specialists(tiny, tmp_path_factory):
    """Twelve: nine LoRAs and three checkpoints."""
    return write_specialists(tiny, tmp_path_factory.mktemp("specialists"), LORAS, FULL)


def checkpoint(teacher, *, text=False, dtype=torch.float32):
    return Checkpoint(ModelConfig(path=teacher.path), "cpu", dtype, text)


@pytest.fixture(scope="module")
def actor_of(tiny, specialists):
    own = {name: checkpoint(teacher) for name, teacher in specialists.items() if teacher.model}

    def make(names=tuple(specialists), checkpoints_at_a_time=None, *, spare=0):
        chosen = {name: specialists[name] for name in names}
        checkpoints = {name: own[name] for name in names if name in own}
        base = load(tiny)
        limit = None
        if checkpoints_at_a_time is not None:
            size = next(iter(own.values())).nbytes()
            measured = TeacherActor(on(base), {n: t for n, t in chosen.items() if t.lora})
            kept = sum(t.nbytes for t in (*base.network.parameters(), *base.network.buffers()))
            for name in measured.facts:
                base.remove_adapter(name)
            limit = (kept if measured.facts else 0) + checkpoints_at_a_time * size + spare
        return TeacherActor(on(base), chosen, checkpoints=checkpoints, limit=limit)

    return make


@pytest.fixture(scope="module")
def path(tiny):
    return random_experience(load(tiny), item(steps=(1, 3))).trajectory


ORDER = ("x", "lora0", "y", "z", "lora8", "x", "x", "lora3", "z", "y")


def test_a_limit_changes_no_bit_of_any_answer_and_loses_no_count(actor_of, path):
    everything, few = actor_of(), actor_of(checkpoints_at_a_time=1)
    assert set(everything.loaded) == {*LORAS, *FULL} and everything.facts == few.facts
    assert set(few.loaded) == {*LORAS, "x"}, "the first that fits, before anything is asked for"
    for asked in (*ORDER, *LORAS, *FULL):
        assert torch.equal(few.score(path, asked).velocity, everything.score(path, asked).velocity), asked
        assert asked in few.loaded and set(LORAS) < set(few.loaded)
        assert few.forwards == everything.forwards, asked
    assert few.forwards == (len(ORDER) + 12) * 2 * 2 * 2, "answers, rows, guidance, steps"
    assert few.loading > 0


def test_who_was_asked_for_longest_ago_goes(actor_of, path):
    actor = actor_of(FULL, checkpoints_at_a_time=2)
    seen = [set(actor.loaded)]
    for asked in "xzxyz":
        actor.score(path, asked)
        seen.append(set(actor.loaded))
    assert [*map("".join, map(sorted, seen))] == ["xy", "xy", "xz", "xz", "xy", "yz"]


def test_what_was_let_go_is_gone_from_memory(actor_of, path):
    actor = actor_of(FULL, checkpoints_at_a_time=1)
    network = weakref.ref(actor.families["x"].network)
    gc.disable()
    try:
        actor.score(path, "y")
        assert network() is None
    finally:
        gc.enable()


def test_teachers_of_one_checkpoint_hold_it_once(specialists, path):
    teachers = {name: specialists["x"].model_copy(update={"guidance": g}) for name, g in (("p", 1.0), ("q", 2.0))}
    one = checkpoint(specialists["x"])
    actor = TeacherActor(on(None), teachers, checkpoints=dict.fromkeys(teachers, one), limit=one.nbytes())
    assert actor.loaded == ("p", "q") and actor.families["p"] is actor.families["q"]
    assert not torch.equal(actor.score(path, "p").velocity, actor.score(path, "q").velocity)
    assert actor.forwards == 2 * (1 + 2) * 2


def test_one_that_can_never_fit_is_refused_with_the_sum(actor_of):
    with pytest.raises(PlacementError) as caught:
        actor_of(checkpoints_at_a_time=1, spare=-1)
    text = str(caught.value)
    assert text.startswith("teacher 'x' needs ") and "which stay" in text and "together" in text and "\n" not in text
    with pytest.raises(PlacementError, match=r"LoRAs and their base are .* and they always stay; raise it"):
        actor_of(LORAS, checkpoints_at_a_time=0, spare=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", [False, True])
def test_the_bytes_of_a_checkpoint_are_known_from_its_headers(specialists, text, dtype):
    one = checkpoint(specialists["x"], text=text, dtype=dtype)
    family = one.load()
    modules = [family.network]
    if text:
        modules += [family._text.text_encoder, family._text.text_encoder_2, family._text.text_encoder_3]
    held = {tensor.data_ptr(): tensor.nbytes for module in modules for tensor in module.parameters()}
    held |= {tensor.data_ptr(): tensor.nbytes for module in modules for tensor in module.state_dict().values()}
    assert one.nbytes() == sum(held.values())


def test_files_that_changed_since_the_start_are_refused(specialists, tiny, tmp_path):
    teachers = {
        "x": checkpoint(specialists["x"]),
        "new": Checkpoint(ModelConfig(path=str(vary(tiny, tmp_path / "new", 5))), "cpu", torch.float32, False),
    }
    residents = Residents(teachers, kept=0, limit=teachers["x"].nbytes())
    (file,) = (tmp_path / "new" / "transformer").glob("*.safetensors")
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="new' changed since the run began"):
        residents.get(teachers["new"])


def test_a_worker_says_what_it_holds_and_how_long_loading_took(actor_of, path):
    host = TeacherHost(lambda: actor_of(FULL, checkpoints_at_a_time=1))
    assert host.ready().holds == ("x",) and set(host.ready().value) == set(FULL)
    flat, record = pack_trajectory(path)
    (_, there), (_, fresh) = host.score((record,), "x", flat), host.score((record,), "z", flat)
    assert (there.holds, there.loading, fresh.holds) == (("x",), 0.0, ("z",))
    assert 0 < fresh.loading < fresh.seconds and fresh.forwards == there.forwards == 2 * 2 * 2


def test_a_checkpoint_answers_as_its_own_model_does(actor_of, specialists, path):
    whole = load_family(ModelConfig(path=specialists["y"].path), text=False, image=False)
    with torch.no_grad():
        expected = whole.velocity(path.latents[:, 3], float(path.sigmas[3]), path.cond, path.uncond, 2.0)
    assert torch.equal(actor_of(FULL, checkpoints_at_a_time=1).score(path, "y").velocity[:, 1], expected)
