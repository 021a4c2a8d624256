"""As much of kustomize as deploy/kuberay uses, for machines without it; what it does not know, it refuses.

A test compares it with `kubectl kustomize` where that is installed.
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KNOWN = {"apiVersion", "kind", "resources", "replacements", "patches"}


def build(folder: Path) -> list[dict[str, Any]]:
    """The manifests that a kustomization stands for."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(rules) <= KNOWN, f"{folder}: {sorted(set(rules) - KNOWN)} are not supported here"
    documents: list[dict[str, Any]] = []
    for name in rules["resources"]:
        path = folder / name
        documents += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for patch in rules.get("patches", []):
        told = yaml.safe_load(patch["patch"])
        assert set(patch) == {"patch"} and told.pop("$patch") == "delete", f"{folder}: only $patch: delete is supported"
        documents.remove(one(documents, told["kind"], told["metadata"]["name"]))
    for replacement in rules.get("replacements", []):
        source = replacement["source"]
        value = at(one(documents, source["kind"]), source["fieldPath"].split("."))
        for target in replacement["targets"]:
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                section = at(one(documents, target["select"]["kind"]), parents)
                assert last in section, f"{path} is not there to be replaced"
                section[last] = value
    return documents


def one(documents: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The only document of a kind."""
    (found,) = (d for d in documents if d["kind"] == kind and name in {None, d["metadata"]["name"]})
    return found


def at(document: dict[str, Any], path: list[str]) -> Any:
    """What lies at a path of keys."""
    for key in path:
        document = document[key]
    return document
