"""The model card beside what was trained: what a hub shows of it, and what whoever loads it has to know.

Names, tasks and paths are other people's text: each passes through ``_text`` on its way into Markdown,
and through YAML's or Python's own quoting elsewhere. Folders of this machine go in by their last name
alone: a card is made to be published.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd_ray import __version__
from opd_ray.config import ModelConfig
from opd_ray.errors import UserError
from opd_ray.models.alphas import AlphaSchedule
from opd_ray.models.base import family_class
from opd_ray.report.run_folder import RunFolder, mapping, numbers
from opd_ray.report.table import Results, Score
from opd_ray.report.wording import MISSING, Write, count, model_title, percent, span

__all__ = ["write_card"]

# Family -> folder and class of its denoiser, its pipeline; your own families are taken for SD3's.
STOCK = {
    "sd3": ("transformer", "SD3Transformer2DModel", "StableDiffusion3Pipeline"),
    "sd": ("unet", "UNet2DConditionModel", "StableDiffusionPipeline"),
    "sdxl": ("unet", "UNet2DConditionModel", "StableDiffusionXLPipeline"),
}
TAGS = ["text-to-image", "diffusers", "opd-ray"]
LICENSE = "# license: yours to choose, within those of the base"
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$:@])")
"""What Markdown, tables, HTML or a hub's autolinks could take for their own."""


def write_card(run_dir: Path) -> Path:
    """Write README.md beside the LoRA, or the denoiser, from the run's configuration, facts and result.

    Raises:
        RunFolderError: there is no such folder.
    """
    run = RunFolder.read(run_dir)
    target = run_dir / _trained(run.config) / "README.md"
    draft = target.with_name(".README.md.tmp")
    draft.write_text(card(run), encoding="utf-8")
    os.replace(draft, target)
    return target


def card(run: RunFolder) -> str:
    """The whole card."""
    parts = [
        _front_matter(run.config),
        f"# {_text(run.name)}",
        f"A {_trained(run.config).replace('lora', 'LoRA')} for text-to-image diffusion, {_made(run)} by opd-ray.",
        "## Use",
        _usage(run.config),
        *(["## Teachers", "\n".join(_teachers(run))] if run.config.get("teachers") else []),
        "## Scores",
        _scores(run.result),
        "## Settings",
        "\n".join(f"- {name}: {value}" for name, value in _settings(run)),
    ]
    return "\n\n".join(parts) + "\n"


def _whole(config: Mapping[str, Any]) -> bool:
    """Whether the denoiser itself was trained; what is not known is taken for a LoRA."""
    student = mapping(config.get("student"))
    return "lora" in student and student["lora"] is None


def _trained(config: Mapping[str, Any]) -> str:
    """The folder of what was trained."""
    return _stock(config)[0] if _whole(config) else "lora"


def _stock(config: Mapping[str, Any]) -> tuple[str, str, str]:
    return STOCK.get(str(mapping(config.get("model")).get("family")), STOCK["sd3"])


def _made(run: RunFolder) -> str:
    return "distilled on-policy from the teachers below" if run.config.get("teachers") else "trained"


def _text(value: object) -> str:
    """One line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def _public(path: object) -> str:
    """A hub id or `world/<name>` as it is, and a folder of this machine by its last name."""
    text = str(path or "")
    return text if _published(text) else Path(text).name


def _published(path: str) -> bool:
    return not (Path(path).is_absolute() or path.startswith((".", "~")))


def _front_matter(config: Mapping[str, Any]) -> str:
    base, whole = str(mapping(config.get("model")).get("path", "")), _whole(config)
    of_teachers = " and of the teachers" if config.get("teachers") else ""
    tags = TAGS if whole else ["lora", *TAGS]
    known = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if base.partition("/")[0] != "world" and _published(base):
        relation = "finetune" if whole else "adapter"
        head = yaml.safe_dump({"base_model": base, "base_model_relation": relation}, sort_keys=False)
    else:
        head = f"# base_model: the hub id of the base, which was {json.dumps(_public(base))} here\n"
    return f"---\n{head}{yaml.safe_dump(known, sort_keys=False)}{LICENSE}{of_teachers}\n---"


def _usage(config: Mapping[str, Any]) -> str:
    model, student = mapping(config.get("model")), mapping(config.get("student"))
    base, options = str(model.get("path", "")), {}
    if revision := model.get("revision"):
        options["revision"] = revision
    if subfolder := model.get("subfolder"):
        options["subfolder"] = subfolder
    world, _, of_world = base.partition("/")
    if world == "world":
        lacking = "safety_checker=None" if of_world else "text_encoder_3=None, tokenizer_3=None"
        start = "from opd_ray import world\n"
        source = f"world.pipeline_path({json.dumps(of_world) if of_world else ''}), {lacking}"
    else:
        start, source = "", json.dumps(base if _published(base) else f"path/to/{_public(base)}")
    part, network, pipeline = _stock(config)
    call = {
        "guidance_scale": student.get("guidance"),
        "num_inference_steps": _first(mapping(config.get("evaluation")).get("steps")),
        "max_sequence_length": model.get("max_sequence_length") if part == "transformer" else None,
        "height": model.get("resolution"),
        "width": model.get("resolution"),
    }
    kinds, given, before, after = [pipeline], "", "", ""
    if part == "unet" and (solver := _solver(model)):
        kinds = [solver[0], *kinds]
        after = f"pipe.scheduler = {solver[0]}.from_config(pipe.scheduler.config{solver[1]})\n"
    if _whole(config):
        kinds, given = [network, *kinds], f", {part}={part}"
        before = f'{part} = {network}.from_pretrained("path/to/{part}")  # this folder\n'
    else:
        after += 'pipe.load_lora_weights("path/to/lora")  # this folder, or its hub id\n'
    return (
        f"```python\n{start}from diffusers import {', '.join(kinds)}\n\n{before}"
        f"pipe = {pipeline}.from_pretrained({source}{given}{_arguments(options)})\n{after}"
        f'image = pipe("a prompt"{_arguments(call)}).images[0]\n```'
    )


def _solver(model: Mapping[str, Any]) -> tuple[str, str] | None:
    """The stock scheduler, with its arguments, of the ODE that pictures are drawn by here; None: as the base comes."""
    schedule = None
    with contextlib.suppress(UserError, ValueError):  # a card is also written where the base is out of reach
        chosen = ModelConfig.model_validate(model)
        schedule = family_class(chosen.family).read_schedule(chosen)
    if not isinstance(schedule, AlphaSchedule):
        return "DDIMScheduler", _arguments({"clip_sample": False, "timestep_spacing": model.get("spacing")})
    if schedule.spacing == "lcm":
        return None  # no other class goes through these timesteps
    if schedule.euler:
        return "EulerDiscreteScheduler", _arguments({"timestep_spacing": schedule.spacing})
    how = {"clip_sample": False, "timestep_spacing": schedule.spacing, "set_alpha_to_one": schedule.ends_at_zero}
    return "DDIMScheduler", _arguments(how)


def _arguments(options: Mapping[str, Any]) -> str:
    return "".join(
        f", {name}={value if isinstance(value, bool) else json.dumps(value)}"
        for name, value in options.items()
        if value is not None
    )


def _teachers(run: RunFolder) -> Iterator[str]:
    facts = mapping(run.facts.get("teachers"))
    if not (teachers := mapping(run.config.get("teachers"))):
        return
    yield "| teacher | tasks | from | guidance | file sha256 |\n|---|---|---|---|---|"
    for name, given in teachers.items():
        teacher, fact = mapping(given), mapping(facts.get(name))
        origin = _public(teacher.get("lora") or teacher.get("model"))
        where = [origin, *(str(teacher[key]) for key in ("subfolder", "revision") if teacher.get(key))]
        tasks = ", ".join(map(str, teacher.get("tasks") or (name,)))
        cells = (name, tasks, ", ".join(where), teacher.get("guidance", MISSING), fact.get("sha256", MISSING))
        yield f"| {' | '.join(map(_text, cells))} |"


def _scores(result: Mapping[str, Any]) -> str:
    results = Results.read(result)
    if not results.models:
        return "The run was not evaluated."
    lines = [
        f"| | {' | '.join(map(_text, results.tasks))} |",
        f"|---|{'---|' * len(results.tasks)}",
    ]
    for model in results.models:
        cells = [_cell(results.scores.get((model, task)), results.write(task)) for task in results.tasks]
        lines.append(f"| {_text(model_title(model))} | {' | '.join(cells)} |")
    if results.gap_closed:
        cells = [_cell(results.gap_closed.get(task), percent) for task in results.tasks]
        lines.append(f"| **gap closed** | {' | '.join(cells)} |")
    how = mapping(result.get("evaluation"))
    images, steps, seed = (how.get(key) for key in ("images_per_task", "steps", "seed"))
    drawn = f", from {images} images a task in {steps} steps with seed {seed}" if images is not None else ""
    guidance = ", ".join(f"{_text(model_title(m))} {g:g}" for m, g in numbers(how.get("guidance")).items())
    told = f" Guidance: {guidance}." if guidance else ""
    return "\n".join(lines) + f"\n\nMeans on held-out prompts with their intervals{drawn}.{told}"


def _cell(score: Score | None, write: Write) -> str:
    if score is None:
        return MISSING
    interval = span(score.low, score.high, write)
    return write(score.value) + (f" ({interval})" if interval else "")


def _settings(run: RunFolder) -> Iterator[tuple[str, str]]:
    config, result = run.config, run.result
    model, algorithm = mapping(config.get("model")), mapping(config.get("algorithm"))
    student, batch = mapping(config.get("student")), mapping(config.get("batch"))
    lora = mapping(student.get("lora"))
    at = [f"{key} {model[key]}" for key in ("revision", "subfolder") if model.get(key)]
    yield "base", _text(", ".join([_public(model.get("path")), *at]))
    yield "trained", count(int(numbers(result).get("rounds", 0)), "round")
    yield "weights", _weights(mapping(config.get("ema")), result)
    told: dict[str, Mapping[str, Any]] = {
        "LoRA": {key: lora.get(key) for key in ("rank", "alpha")},
        "student": {"guidance": student.get("guidance"), "steps": mapping(config.get("sampling")).get("steps")},
        "algorithm": {key: x for key, x in algorithm.items() if isinstance(x, str | int | float)},
        "batch": batch,
        "optimizer": {key: mapping(config.get("optimizer")).get(key) for key in ("lr", "schedule", "weight_decay")},
        "run": {"seed": config.get("seed"), "precision": config.get("precision")},
        "versions": {"opd-ray": __version__, **mapping(run.facts.get("versions"))},
    }
    for name, values in told.items():
        shown = [f"{key} {value}" for key, value in values.items() if value is not None]
        if shown:
            yield name, _text(", ".join(shown))


def _weights(ema: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Which weights the file holds; an average that was never taken is the last step's."""
    raw, averaged = result.get("student_sha256"), result.get("ema_sha256")
    if averaged is None or averaged == raw:
        return f"raw, as of the last step (sha256 {_text(raw or 'unknown')})"
    how = ", ".join(f"{key} {_text(ema[key])}" for key in ("decay", "every") if key in ema)
    return f"averaged over steps ({how or 'EMA'}; sha256 {_text(averaged)})"


def _first(found: object) -> object:
    return found[0] if isinstance(found, list) and found else found
