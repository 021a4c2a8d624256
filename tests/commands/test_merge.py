"""`opd-ray merge`, and models that are BASE+LORA."""

import json
from pathlib import Path

import pytest


def test_merge_then_sample(cli, tiny, tiny_teachers, tmp_path):
    done = cli("merge", *tiny_teachers.values(), "--scale", "1.5", "--out", tmp_path / "mean")
    assert done.code == 0 and "mean of 2 LoRAs in" in done.out and "rank 8" in done.out
    about = json.loads((tmp_path / "mean" / "merge.json").read_text())
    assert (about["method"], about["scale"], about["rank"], about["kept"]) == ("mean", 1.5, 8, 1.0)
    assert [len(one["sha256"]) for one in about["loras"]] == [64, 64]
    model = f"{tiny}+{tmp_path / 'mean'}"
    drawn = cli("sample", model, "-p", "a cat", "--count", "1", "--steps", "2", "--out", tmp_path / "a", "--json")
    base = cli("sample", tiny, "-p", "a cat", "--count", "1", "--steps", "2", "--out", tmp_path / "b", "--json")
    assert drawn.code == base.code == 0, drawn.err
    pictures = [json.loads(one.out)["files"][0]["file"] for one in (drawn, base)]
    assert Path(pictures[0]).read_bytes() != Path(pictures[1]).read_bytes()


def test_ties_says_what_its_rank_holds(cli, tiny_teachers, tmp_path):
    args = ("merge", *tiny_teachers.values(), "--method", "ties", "--json")
    small, large = (json.loads(cli(*args, "--rank", rank, "--out", tmp_path / rank).out) for rank in ("2", "1000"))
    assert 0 < small["kept"] < large["kept"] and large["kept"] == pytest.approx(1)
    assert small["rank"] == 2 and small["density"] == 0.2


def test_refusals(cli, tiny, tiny_teachers, tmp_path):
    both = tuple(tiny_teachers.values())
    out = ("--out", tmp_path / "out")
    assert "--scale 0: expected a number other than 0" in cli("merge", *both, "--scale", "0", *out).error
    assert "--density 0: expected a share above 0" in cli("merge", *both, "--density", "0", *out).error
    assert "1 LoRA to merge; give two or more" in cli("merge", both[0], *out).error
    assert "there is no such file or folder" in cli("merge", both[0], "/no/lora", *out).error
    assert not (tmp_path / "out").exists()
    assert "holds a LoRA already; choose another place" in cli("merge", *both, "--out", both[0]).error
    twice = cli("sample", f"world/compose+{both[0]}", "-p", "x").error
    assert "world/compose has a LoRA of its own; give the base of both, then + and the LoRA" in twice
    assert "It was made for another architecture" in cli("sample", f"world+{both[0]}", "-p", "x").error
