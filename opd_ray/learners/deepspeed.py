"""DeepSpeed's ZeRO: moments in parts (stage 1), gradients too (2), weights too (3)."""

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_ray.config import OptimizerConfig
from opd_ray.errors import ConfigError
from opd_ray.learners.engine import INSTALL, MOMENTS, Engine, join, split_key

__all__ = ["REDUCED", "DeepSpeedEngine"]

REDUCED = 500_000_000
"""Numbers of gradients that are reduced at a time, at most: a float32 buffer of as many lies on the device."""


class DeepSpeedEngine(Engine):
    """Through ``deepspeed.initialize``, in float32 with autocast around forwards as on the other backends.

    From stage 2 on every backward reduces its gradients at once: keeping whole ones until the last is stage 1.

    Raises:
        ConfigError: the package is not there.
        RuntimeError: see ``Engine``.
    """

    name = "deepspeed"
    gathers = True

    def __init__(
        self, rank: int, ranks: int, *, device: str = "cpu", stage: int = 2, cpu_offload: bool = False
    ) -> None:
        super().__init__(rank, ranks, device=device)
        self.stage, self.cpu_offload, self.lockstep = stage, cpu_offload, stage >= 2
        os.environ.setdefault("DS_ACCELERATOR", device)  # read on import; it takes a CPU for a card without nvcc
        os.environ.setdefault("LOCAL_RANK", "0" if device == "cuda" else str(rank))
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        try:
            self._deepspeed: Any = importlib.import_module("deepspeed")
        except ModuleNotFoundError:
            raise ConfigError(INSTALL) from None
        if device == "cpu":  # else it would compile a kernel of its own for all-reduce, for half a minute
            self._deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._fragments: Any = importlib.import_module("deepspeed.utils.tensor_fragment")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing sets it as well
        join(rank, ranks, device)

    def prepare(
        self, network: nn.Module, trained: Callable[[], dict[str, nn.Parameter]], chosen: OptimizerConfig
    ) -> nn.Module:
        """Wrapped in DeepSpeed's engine, whose optimizer is torch's AdamW over flat parts."""
        self.trained = trained()
        config = self._config(chosen, sum(parameter.numel() for parameter in self.trained.values()))
        if self.stage == 3:
            self._spread(network, config)
        self._engine, self._zero, _, _ = self._deepspeed.initialize(
            model=network, optimizer=self._adamw(chosen), config=config, dist_init_required=False
        )
        got = (
            self._engine.zero_optimization_stage(),
            bool(self._engine.zero_cpu_offload()),
            self._engine.global_rank,
            self._engine.dp_world_size,
        )
        asked = (self.stage, self.cpu_offload, self.rank, self.ranks)
        if got != asked:
            raise RuntimeError(f"asked DeepSpeed for (ZeRO stage, CPU offload, rank, ranks) {asked}, got {got}")
        self.optimizer = self._zero.optimizer
        self._flats: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for flat in self._flats:  # else there is nothing to load moments into before a first step
            self.optimizer.state[flat] = {"step": torch.zeros(())} | {
                slot: torch.zeros_like(flat, requires_grad=False) for slot in MOMENTS
            }
        self._engine.set_gradient_accumulation_boundary(False)
        engine: nn.Module = self._engine
        return engine

    def _spread(self, network: nn.Module, config: dict[str, Any]) -> None:
        """Take one weight after the other to the device, and keep a part: ``initialize`` would take all of them first.

        Buffers are not spread, and it leaves them where they are then.
        """
        self._deepspeed.init_distributed(dist_init_required=False)
        self._deepspeed.zero.Init(module=network, config_dict_or_path=config)
        for buffer in network.buffers():
            buffer.data = buffer.to(self.device)

    def _config(self, chosen: OptimizerConfig, numbers: int) -> dict[str, Any]:
        """Of a network in which so many numbers are trained."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": min(numbers, REDUCED)}
        if self.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.stage == 3:
            # Nothing stays whole between forwards: live weights are read and written there.
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand
            "gradient_clipping": chosen.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # that one has to be compiled
        }

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """The update's last backward ends DeepSpeed's step of accumulation."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """DeepSpeed multiplies by the scale itself, and divides by it in ``step``."""
        self._zero.cur_scale = scale
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self, scale: float) -> float:
        """DeepSpeed clips and steps; it skips a step whose gradient is not finite."""
        self._zero.cur_scale = scale
        self._engine.step()
        return math.inf if self._zero.overflow else float(self._zero._global_grad_norm)

    def zero(self) -> None:
        """Also what was added up beside ``grad``; what is reduced DeepSpeed clears itself."""
        self._zero.zero_grad()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Stage 3 leaves no shape in a parameter."""
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)  # type: ignore[attr-defined]

    def part(self, parameter: nn.Parameter) -> Tensor:
        """In stage 3 an equal, perhaps padded run [ceil(numel / ranks)] of the flat weights."""
        if self.stage < 3:
            return super().part(parameter)
        if parameter.ds_status.name != "NOT_AVAILABLE":  # type: ignore[attr-defined]
            self._zero.parameter_offload.partition_all_parameters()  # a forward without a backward has left it whole
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return part.detach()

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """One gather in stage 3; weights are whole before."""
        if self.stage < 3:
            return part
        gathered = part.new_empty(self.ranks * part.numel())
        dist.all_gather_into_tensor(gathered, part.contiguous())
        shape = self.shape(parameter)
        return gathered[: math.prod(shape)].view(shape)

    def write(self, parameter: nn.Parameter, part: Tensor, whole: Tensor) -> None:
        """See ``part``; the padding stays as it is."""
        if self.stage < 3:
            super().write(parameter, part, whole)
            return
        own = whole.flatten()[self.rank * part.numel() :][: part.numel()]
        part[: own.numel()].copy_(own)

    def written(self) -> None:
        """The optimizer steps copies of its own."""
        self._zero.refresh_fp32_params()

    def gradients(self) -> dict[str, Tensor]:
        """See ``Engine.gradients``."""
        return {name: self._fragments.safe_get_full_grad(p) for name, p in self.trained.items()}

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Engine.moments``."""
        self._link()
        steps = float(self.optimizer.state[self._flats[0]]["step"])
        for name, parameter in self.trained.items() if steps else ():
            yield f"{name}:step", torch.tensor(steps)
            for slot in MOMENTS:
                yield f"{name}:{slot}", self._fragments.safe_get_full_optimizer_state(parameter, slot)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """See ``Engine.load_moments``. DeepSpeed counts steps once for all parameters."""
        self._link()
        steps = 0.0
        for key, value in moments.items():
            name, slot = split_key(key)
            if slot == "step":
                steps = float(value)
            elif self.stage == 3:
                parameter = self.trained[name]
                own = self._fragments.safe_get_local_optimizer_state(parameter, slot).clone()
                self.write(parameter, own, value)
                self._fragments.safe_set_local_optimizer_state(parameter, own, slot)
            else:
                self._fragments.safe_set_full_optimizer_state(self.trained[name], value, slot)
        for flat in self._flats:
            state = self.optimizer.state[flat]
            state["step"].fill_(steps)
            for slot in MOMENTS if not moments else ():
                state[slot].zero_()

    def _link(self) -> None:
        """Below stage 3 DeepSpeed finds a parameter's moments only once it is told where they are."""
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
