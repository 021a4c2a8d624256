"""What the shipped world was built with. `build` records these next to what came out."""

from dataclasses import dataclass, field, replace

from opd_ray.world.dataset import Recipe
from opd_ray.world.scenes import CaptionNoise
from opd_ray.world.training import Fit


@dataclass(frozen=True)
class Specialist:
    """One teacher: the pictures it is fine-tuned on, and the guidance it is to be queried at."""

    recipe: Recipe
    fit: Fit
    guidance: float
    pictures: int


STUDENT_GUIDANCE = 1.5
"""For rollout, training and evaluation of the student alike, and for the base's scores."""

_HARD, _SOFT = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)

BASE_RECIPE = Recipe(
    tasks={"compose": 0.42, "text": 0.33, "look": 0.15, "mixed": 0.10},
    styles=(0.72, 0.10, 0.18),
    noises={
        # Scraped captions: most attributes are wrong about as often as right.
        "loose": CaptionNoise(colour=0.55, shape=0.5, count=0.5, place=0.5, letter=0.82),
        "true": CaptionNoise(),
        "misspelt": CaptionNoise(letter=0.75),
    },
)


def _phase(steps: int, matrix_rate: float, captions: str) -> Fit:
    return Fit(steps, 96, matrix_rate, other_rate=2e-3, dropout=0.12, captions=captions)


# Loose captions alone teach pictures but, in so short a time, no words; the same pictures with true
# captions teach the words, and the last phase leaves spelling as unsure as its captions are. A base
# must know every concept and still leave room for specialists; guidance sharpens what it knows.
_BASE_PHASES = (
    _phase(1800, 0.02, "loose"),
    _phase(1200, 0.012, "true"),
    _phase(500, 0.01, "misspelt"),
)


def _specialist(task: str, styles: tuple[float, float, float], fit: Fit, guidance: float, pictures: int) -> Specialist:
    return Specialist(Recipe({task: 1.0}, styles, {"true": CaptionNoise()}, captions=2), fit, guidance, pictures)


def _specialists() -> dict[str, Specialist]:
    def fit(steps: int, dropout: float) -> Fit:
        return Fit(steps, batch=96, matrix_rate=0.006, other_rate=0.0, dropout=dropout)

    return {
        # Without guidance, as the paper's GenEval teacher: no caption dropped, queried at 1.
        "compose": _specialist("compose", _HARD, fit(1600, 0.0), 1.0, 10_000),
        "text": _specialist("text", _HARD, fit(1400, 0.1), STUDENT_GUIDANCE, 10_000),
        "look": _specialist("look", _SOFT, fit(250, 0.1), STUDENT_GUIDANCE, 4_000),
    }


@dataclass(frozen=True)
class Settings:
    """One build. `scaled` makes a shorter one of it."""

    seed: int = 0
    autoencoder_steps: int = 1600
    base_pictures: int = 30_000
    base_recipe: Recipe = BASE_RECIPE
    base_phases: tuple[Fit, ...] = _BASE_PHASES
    shift: float = 1.0
    lora_rank: int = 32
    specialists: dict[str, Specialist] = field(default_factory=_specialists)
    guidance: float = STUDENT_GUIDANCE
    sweep: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.5)
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
            specialists={
                name: replace(
                    one,
                    pictures=times(one.pictures, 32),
                    fit=replace(one.fit, steps=times(one.fit.steps, 2)),
                )
                for name, one in self.specialists.items()
            },
            sweep_prompts=min(self.sweep_prompts, times(self.sweep_prompts, 4)),
            score_prompts=min(self.score_prompts, times(self.score_prompts, 4)),
        )
