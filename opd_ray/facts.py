"""What is known of a run once its workers are up: it goes into run.json and result.json."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ray.runtime.group import LearnerGroup
from opd_ray.runtime.pool import Pool
from opd_ray.scoring import Judges
from opd_ray.storage.run_folder import read_json, write_json_atomic

__all__ = ["facts_of", "note_facts", "other_versions"]


def facts_of(
    rollout: Pool | None, teachers: Mapping[str, Pool], judges: Judges | None, learner: LearnerGroup
) -> dict[str, Any]:
    """Teachers' files with their hashes, rewards' proofs, what each role computes in, and versions of what computes."""
    found: dict[str, Any] = {}
    for pool in dict.fromkeys(teachers.values()):
        for name, facts in pool.workers[0].facts.items():
            lora = facts.lora
            of_lora = {"tensors": lora.tensors, "rank": lora.rank, "alpha": lora.alpha} if lora else {}
            about = {"path": facts.path, "sha256": facts.sha256, **of_lora, "guidance": facts.guidance}
            found[name] = about | {"precision": facts.precision, "own_text_encoders": facts.own_text}
    precision = {"learner": learner.facts.precision}
    if rollout is not None:
        precision["rollout"] = rollout.workers[0].facts
    precision |= {f"teacher {name}": about["precision"] for name, about in found.items()}
    packages = ("ray", "torch", "diffusers", "transformers", "accelerate", "peft")
    return {
        "teachers": found,
        "rewards": judges.proofs if judges is not None else {},
        "precision": precision,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def note_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Add to run.json."""
    path = folder / "run.json"
    write_json_atomic(path, read_json(path) | facts)


def other_versions(folder: Path, facts: dict[str, Any]) -> str:
    """Packages that are not those of the attempt before."""
    before, now = read_json(folder / "run.json").get("versions", {}), facts["versions"]
    changed = [f"{name} {before[name]} -> {now[name]}" for name in before if before[name] != now.get(name)]
    return f"other packages than before ({', '.join(changed)}): the student's bits may differ" if changed else ""
