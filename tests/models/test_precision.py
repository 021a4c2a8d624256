"""bf16 and fp16 on the CPU: close to float32, adapters and latents in float32, steps that overflow are skipped."""

import pytest
import torch

from opd_ray.actors import TeacherActor
from opd_ray.config import EmaConfig, ModelConfig, OptimizerConfig, TeacherConfig
from opd_ray.errors import NotFiniteError
from opd_ray.learners import DdpEngine, Learner
from opd_ray.learners.learner import Training
from opd_ray.models import load_family
from opd_ray.models.precision import dtype_of
from tests.algorithms.parts import LORA, Opd, OpdConfig, fill, flat, gradients, item, random_experience, stage

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load(tiny, precision="fp32", *, whole=False):
    dtype = dtype_of(precision, "cpu")
    return load_family(ModelConfig(path=str(tiny)), text=whole, image=whole, dtype=dtype)


def learner(tiny, precision="fp32", **changes):
    training = Training(
        **({"lora": LORA, "guidance": 1.5, "ema": None, "seed": 3, "rounds": 8} | changes),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    one = Learner(load(tiny, precision), Opd(OpdConfig()), training, DdpEngine(0, 1))
    fill(one.family, "student", 2)
    return one


def round_of(one, seed=0):
    stage(one, [random_experience(one.family, item(), seed=seed)])
    return one.update(0)


def apart(one, other) -> float:
    return float((one - other).norm() / other.norm())


def test_auto_is_float32_on_the_cpu():
    assert dtype_of("auto", "cpu") == torch.float32 == dtype_of("fp32", "cuda")
    assert {name: dtype_of(name, "cpu") for name in HALVES} == HALVES


@pytest.mark.parametrize(("has_it", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_card_is_bf16_where_it_computes_in_it(monkeypatch, has_it, chosen):
    def supported(including_emulation=True):
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert dtype_of("auto", "cuda") == chosen


def test_what_a_text_encoder_keeps_in_float32_stays_so(tiny):
    t5 = load(tiny, "fp16", whole=True)._text.text_encoder_3
    assert {name: p.dtype for name, p in t5.named_parameters() if ".wo." in name}.keys()
    assert all(p.dtype == (torch.float32 if ".wo." in name else torch.float16) for name, p in t5.named_parameters())


@pytest.mark.parametrize("precision", HALVES)
def test_pictures_and_velocities_are_close_to_those_in_float32(tiny, precision):
    full, half = load(tiny, whole=True), load(tiny, precision, whole=True)
    assert {p.dtype for p in half.network.parameters()} == {HALVES[precision]}
    assert {p.dtype for p in half._vae.parameters()} == {torch.float32}
    cond, empty = half.encode(["a red cat"]), half.encode([""])
    assert {t.dtype for t in cond.values()} == {torch.float32}
    for name, tensor in full.encode(["a red cat"]).items():
        assert 0 < apart(cond[name], tensor) < 0.02, name
    x = torch.randn(1, *full.latent_shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (family.velocity(x, 0.7, cond, empty, 4.5) for family in (half, full))
    assert ours.dtype == torch.float32 and 0 < apart(ours, theirs) < 0.03


@pytest.mark.parametrize("precision", HALVES)
def test_adapters_stay_in_float32_and_learn_alike(tiny, precision):
    full, half = learner(tiny), learner(tiny, precision)
    assert {p.dtype for p in half.student.values()} == {torch.float32}
    one, other = round_of(half), round_of(full)
    assert one.loss == pytest.approx(other.loss, rel=0.02) and not one.skipped
    assert 0 < apart(flat(gradients(half)), flat(gradients(full))) < 0.05


def test_a_lora_is_read_at_full_precision_over_a_base_in_half(tiny, tiny_teachers):
    half = load(tiny, "bf16")
    half.load_lora("a", str(tiny_teachers["a"]))
    full = load(tiny)
    full.load_lora("a", str(tiny_teachers["a"]))
    ours, theirs = (family.adapter_parameters("a") for family in (half, full))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_teacher_that_is_the_student_teaches_exactly_nothing_in_half_precision(tiny, tmp_path):
    one = learner(tiny, "bf16")
    one.family.save_lora("student", tmp_path)
    teacher = TeacherActor(lambda _: load(tiny, "bf16"), {"t": TeacherConfig(lora=str(tmp_path), guidance=1.5)})
    path = random_experience(one.family, item())
    stage(one, [type(path)(path.item, path.trajectory, teacher.score(path.trajectory, "t"))])
    report = one.update(0)
    assert report.loss == 0 == report.grad_norm


def test_an_overflow_skips_the_step_and_halves_the_scale(tiny):
    one = learner(tiny, "fp16")
    before = flat(one.student).clone()
    one.scale.load_state_dict(one.scale.state_dict() | {"scale": 2.0**40})
    report = round_of(one)
    assert report.skipped and one.updates == 1 and torch.equal(flat(one.student), before)
    assert one.scale.value == 2.0**39
    one.scale.load_state_dict(one.scale.state_dict() | {"scale": 2.0**4})
    assert not round_of(one).skipped and not torch.equal(flat(one.student), before)


def test_an_average_that_is_due_at_a_skipped_step_is_taken(tiny):
    one = learner(tiny, "fp16", ema=EmaConfig(decay=0.5, every=2))
    round_of(one, 0)
    trained = flat(one.student).clone()
    one.scale.load_state_dict(one.scale.state_dict() | {"scale": 2.0**40})
    assert round_of(one, 1).skipped
    assert torch.equal(flat(one.student), trained)
    average = flat(dict(one.gather(average=True)))
    assert not torch.equal(average, trained) and apart(average, trained) < 1, "no longer the untrained start"


def test_a_loss_that_is_not_finite_is_no_overflow(tiny):
    one = learner(tiny, "fp16")
    broken = random_experience(one.family, item())
    broken.answer.velocity[0] = torch.nan
    stage(one, [broken])
    with pytest.raises(NotFiniteError, match="no weight was changed"):
        one.update(0)


def test_the_scale_goes_into_the_checkpoint(tiny):
    one, other = learner(tiny, "fp16"), learner(tiny, "fp16")
    one.scale.load_state_dict(one.scale.state_dict() | {"scale": 2.0**40})
    round_of(one)
    other.load_state(one.state())
    assert other.scale.state_dict() == one.scale.state_dict()
    assert (round_of(one, 1).loss, flat(one.student).tolist()) == (
        round_of(other, 1).loss,
        flat(other.student).tolist(),
    )


def test_gradient_checkpointing_changes_no_bit(tiny):
    plain, saving = learner(tiny), learner(tiny, gradient_checkpointing=True)
    passes = dict.fromkeys(("plain", "saving"), 0)
    for name, one in (("plain", plain), ("saving", saving)):
        first = one.family.network.transformer_blocks[0]
        first.register_forward_pre_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    assert round_of(plain).loss == round_of(saving).loss
    assert torch.equal(flat(gradients(plain)), flat(gradients(saving)))
    assert passes["saving"] == 2 * passes["plain"] > 0, "the blocks run again in the backward pass"
