"""What the shipped world was built with. `build` records these next to what came out."""

from dataclasses import dataclass, field, replace

from opd_ray.world.dataset import Recipe
from opd_ray.world.specialists import Specialist
from opd_ray.world.training import Fit

STUDENT_GUIDANCE = 1.25
"""For rollout, training and evaluation of the student alike, and for the base's scores."""

BASE_RECIPE = Recipe(
    tasks={"compose": 0.42, "text": 0.33, "look": 0.15, "mixed": 0.10},
    styles=(0.72, 0.10, 0.18),
)

_PHASE = Fit(steps=0, batch=96, matrix_rate=0.012, other_rate=2e-3, dropout=0.12)

# Words come first; composition, which needs them, comes last.
_BASE_PHASES = (
    replace(_PHASE, steps=2600, matrix_rate=0.02),
    replace(_PHASE, steps=1500, focus="compose", centre=0.6),
)

# In the end two thirds of what the base draws for compose and text captions is soft and faded,
# unreadable to their scorers, and most of what it draws for look captions is hard and cold. A base must
# know every concept and leave room for specialists: what they add is then a habit to change, and not
# knowledge that was never there.
_LAST_RECIPE = replace(
    BASE_RECIPE,
    tasks={"compose": 0.36, "text": 0.29, "look": 0.27, "mixed": 0.08},
    styles=(0.26, 0.05, 0.69),
    look_styles=(0.62, 0.03, 0.35),
    captions=2,
)
_LAST_PHASE = replace(_PHASE, steps=500, matrix_rate=0.006)


def _specialists() -> dict[str, Specialist]:
    return {
        "compose": Specialist(rounds=40, reward="compose_partial"),
        "text": Specialist(rounds=40, reward="text"),
        # Stopped while it still draws what a caption asks for: an empty warm plane has this reward in full.
        "look": Specialist(rounds=7, reward="look"),
    }


_UNET_RECIPE = replace(BASE_RECIPE, styles=(0.8, 0.1, 0.1), captions=2)
_UNET_FIT = Fit(steps=3000, batch=96, matrix_rate=0.015, other_rate=2e-3, dropout=0.12)
_FEW_FIT = Fit(steps=2000, batch=96, matrix_rate=0.01, other_rate=1e-3, dropout=0.0)


@dataclass(frozen=True)
class Settings:
    """One build. `scaled` makes a shorter one of it."""

    seed: int = 0
    autoencoder_steps: int = 1600
    base_pictures: int = 30_000
    base_recipe: Recipe = BASE_RECIPE
    base_phases: tuple[Fit, ...] = _BASE_PHASES
    last_recipe: Recipe = _LAST_RECIPE
    last_pictures: int = 8000
    last_phase: Fit = _LAST_PHASE
    shift: float = 1.0
    lora_rank: int = 32
    unet_recipe: Recipe = _UNET_RECIPE
    unet_pictures: int = 20_000
    unet_fit: Fit = _UNET_FIT
    unet_guidance: float = 2.0
    few_paths: int = 8192
    few_fit: Fit = _FEW_FIT
    specialists: dict[str, Specialist] = field(default_factory=_specialists)
    guidance: float = STUDENT_GUIDANCE
    sweep: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0)
    sweep_prompts: int = 128
    score_prompts: int = 256
    train_rows: int = 3000
    heldout_rows: int = 1024

    def scaled(self, scale: float) -> "Settings":
        """The same build with every training, data set and scoring ``scale`` times as long."""

        def times(count: int, least: int) -> int:
            return max(least, round(count * scale))

        return replace(
            self,
            autoencoder_steps=times(self.autoencoder_steps, 2),
            base_pictures=times(self.base_pictures, 32),
            base_phases=tuple(replace(phase, steps=times(phase.steps, 2)) for phase in self.base_phases),
            last_pictures=times(self.last_pictures, 32),
            last_phase=replace(self.last_phase, steps=times(self.last_phase.steps, 2)),
            specialists={name: replace(one, rounds=times(one.rounds, 1)) for name, one in self.specialists.items()},
            unet_pictures=times(self.unet_pictures, 32),
            unet_fit=replace(self.unet_fit, steps=times(self.unet_fit.steps, 2)),
            few_paths=times(self.few_paths, 4),
            few_fit=replace(self.few_fit, steps=times(self.few_fit.steps, 2)),
            sweep_prompts=min(self.sweep_prompts, times(self.sweep_prompts, 4)),
            score_prompts=min(self.score_prompts, times(self.score_prompts, 4)),
        )
