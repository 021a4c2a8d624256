"""Conformance checks for what users write themselves: call them from your own tests."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from opd_ray.config import LoraConfig
from opd_ray.models import Family
from opd_ray.types import Conditioning

__all__ = ["check_family"]

ADAPTER = "check_family"


def check_family(
    family: Family,
    *,
    prompts: Sequence[str] = ("a red circle", "two blue squares"),
    lora: LoraConfig | None = None,
) -> None:
    """Check that a family keeps the contract of ``opd_ray.models.Family``.

    Args:
        family: loaded with ``text=True, image=True``; it is left as it was, but for ``forwards``.
        prompts: at least two that it encodes differently.
        lora: an adapter for your denoiser; by default one of the family's own targets.

    Raises:
        AssertionError: says what does not hold.
    """
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((len(prompts), *family.latent_shape), generator=noise).to(family.device)
    cond, empty = family.encode(prompts), family.encode([""])
    _check_sigmas(family)
    _check_encode(family, prompts, cond, empty)
    _check_velocity(family, x, cond, empty)
    _check_pictures(family, x)
    _check_random_conditioning(family, x, cond)
    before = family.active
    try:
        _check_adapters(family, x, cond, lora or LoraConfig())
    finally:
        family.use(before)
        for name in set(family.adapters) & {ADAPTER, f"{ADAPTER}.loaded"}:
            family.remove_adapter(name)


def _require(holds: bool | Tensor, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _check_sigmas(family: Family) -> None:
    sigmas = family.sigmas(4)
    _require(sigmas.shape == (5,) and sigmas.dtype == torch.float32, "sigmas(4) is [5] float32")
    _require(bool(0.5 < sigmas[0] <= 1) and bool(0 <= sigmas[-1] < 0.5), "sigmas run from 1, or below, to 0, or above")
    _require((sigmas.diff() < 0).all(), "sigmas fall")
    x = torch.randn((1, *family.latent_shape), generator=torch.Generator().manual_seed(0))
    _require(bool(sigmas[0] < 1) or torch.equal(family.initial(x, sigmas), x), "a path from 1 begins with the noise")
    _require(bool(sigmas[-1] > 0) or torch.equal(family.final(x, sigmas), x), "a path to 0 ends with the picture")


def _check_encode(family: Family, prompts: Sequence[str], cond: Conditioning, empty: Conditioning) -> None:
    again = family.encode(prompts)
    _require(cond.keys() == again.keys() == empty.keys(), "encode always gives the same names")
    for name, tensor in cond.items():
        _require(torch.equal(tensor, again[name]), f"encode is deterministic ({name})")
        _require(len(tensor) == len(prompts), f"encode gives a row a prompt ({name})")
        _require(not tensor.requires_grad, f"encode builds no graph ({name})")
    _require(
        any(not torch.equal(tensor[0], tensor[1]) for tensor in cond.values()),
        "encode tells prompts apart",
    )


def _check_velocity(family: Family, x: Tensor, cond: Conditioning, empty: Conditioning) -> None:
    rows, counts = len(x), [family.forwards]
    plain = family.velocity(x, 0.5, cond, {}, 1)
    counts.append(family.forwards)
    _require(plain.shape == x.shape, f"velocity has the latents' shape, got {list(plain.shape)}")
    _require(plain.dtype == torch.float32, f"velocity is float32, got {plain.dtype}")
    _require(plain.isfinite().all(), "velocity is finite")
    _require(not plain.requires_grad, "a loaded family is frozen")
    ignored = family.velocity(x, torch.full((rows,), 0.5), cond, empty, 1)
    _require(torch.equal(plain, ignored), "guidance 1 is the conditional velocity alone")
    counts.append(family.forwards)
    guided = family.velocity(x, 0.5, cond, empty, 2)
    counts.append(family.forwards)
    _require(not torch.equal(guided, plain), "guidance 2 differs from guidance 1")
    steps = [after - before for before, after in itertools.pairwise(counts)]
    _require(steps == [rows, rows, 2 * rows], f"forwards count rows, guided rows twice: {steps}")
    rising = torch.linspace(0.2, 0.8, rows)
    each = family.velocity(x, rising, cond, {}, 1)
    alone = family.velocity(x, float(rising[0]), cond, {}, 1)
    _require(torch.allclose(each[0], alone[0], atol=1e-5), "t may be one number a row")


def _check_pictures(family: Family, latents: Tensor) -> None:
    images = family.decode(latents)
    _require(
        images.ndim == 4 and images.shape[:2] == (len(latents), 3),
        f"decode gives [B, 3, height, width], got {list(images.shape)}",
    )
    _require(images.dtype == torch.float32, f"images are float32, got {images.dtype}")
    _require(bool(images.min() >= 0) and bool(images.max() <= 1), "images are in [0, 1]")
    back = family.encode_images(images)
    _require(back.shape == latents.shape, f"encode_images gives the latents' shape, got {list(back.shape)}")
    _require(back.dtype == torch.float32, f"latents of images are float32, got {back.dtype}")
    _require(back.isfinite().all() and not back.requires_grad, "latents of images are finite, without a graph")
    _require(torch.equal(back, family.encode_images(images)), "encode_images is deterministic")
    other = family.encode_images(1 - images)
    _require(not torch.equal(back, other), "encode_images tells pictures apart")


def _check_random_conditioning(family: Family, x: Tensor, cond: Conditioning) -> None:
    one, same = (family.random_conditioning(torch.Generator().manual_seed(0)) for _ in range(2))
    _require(one.keys() == cond.keys(), "random_conditioning has the names that encode has")
    for name, tensor in one.items():
        _require(len(tensor) == 1, f"random_conditioning has one row ({name})")
        _require(torch.equal(tensor, same[name]), f"its generator decides it ({name})")
        _require(tensor.shape[-1] == cond[name].shape[-1], f"it has encode's width ({name})")
    family.velocity(x[:1], 0.5, {name: one[name].to(x.device) for name in one}, {}, 1)


def _check_adapters(family: Family, x: Tensor, cond: Conditioning, lora: LoraConfig) -> None:
    def answer() -> Tensor:
        return family.velocity(x, 0.5, cond, {}, 1)

    with family.adapter(None):
        base = answer()
    family.add_lora(ADAPTER, lora, seed=0)
    family.use(ADAPTER)
    _require(torch.equal(answer(), base), "a fresh adapter changes nothing, its B is zero")
    family.train_adapter(ADAPTER)
    ours = family.adapter_parameters(ADAPTER)
    _require(list(ours) == sorted(ours), "adapter_parameters are sorted")
    answer().square().mean().backward()
    for name, parameter in family.network.named_parameters():
        mine = any(parameter is other for other in ours.values())
        _require(parameter.requires_grad == mine, f"only the adapter is trainable ({name})")
        _require((parameter.grad is None) or mine, f"only the adapter has gradients ({name})")
    up = [p for name, p in ours.items() if "lora_B" in name]
    _require(all(p.grad is not None for p in up), "every lora_B has a gradient")
    with torch.no_grad():
        for index, parameter in enumerate(ours.values()):
            parameter.grad = None
            noise = torch.Generator().manual_seed(index)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    _check_restoring(family, ours, base, answer().detach())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        written = answer()
        family.save_lora(ADAPTER, Path(folder))
        family.load_lora(f"{ADAPTER}.loaded", folder)
        family.use(f"{ADAPTER}.loaded")
        _require(torch.equal(answer(), written), "an adapter survives save_lora and load_lora")


def _check_restoring(family: Family, ours: dict[str, torch.nn.Parameter], base: Tensor, trained: Tensor) -> None:
    _require(not torch.equal(trained, base), "a trained adapter changes the velocity")
    try:
        with family.adapter(None):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    _require(family.active == ADAPTER, "adapter() brings the adapter in use back")
    _require(all(p.requires_grad for p in ours.values()), "adapter() brings requires_grad back")
