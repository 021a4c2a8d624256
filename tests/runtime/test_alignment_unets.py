"""Alignment of a U-Net: its times are a table's, and each row of a forward may be at its own one."""

import pytest

from opd_ray.run import Run
from tests.models.tiny_unet import make_tiny_sd
from tests.runtime.runs import go, metric


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def config(make_config, unet):
    def made(name, **algorithm):
        return make_config(
            rounds=1,
            model={"family": "sd", "path": str(unet)},
            algorithm={"name": name, **algorithm},
            rewards={"tests.commands.scoring:brightness": {}},
            batch={"images_per_task": 4, "item_size": 4, "images_per_prompt": 2},
            teachers={},
        )

    return made


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddpo", {}),
        ("sdpo_stepwise", {}),
        ("ddpo", {"kernel": "cps"}),
        ("diffusion_dpo", {"pairs": "online", "beta": 1.0}),
        ("flow_grpo", {"kernel": "ddim", "item_parts": 1, "steps_per_update": 1}),
        ("diffusion_nft", {}),
    ],
)
def test_the_first_update_finds_what_was_drawn_and_learns(config, tmp_path, monkeypatch, name, changes):
    reports, finish = [], Run.finish_round

    def finishing(run, batch, updates, weights):
        reports.extend(report for (report,) in updates)
        finish(run, batch, updates, weights)

    monkeypatch.setattr(Run, "finish_round", finishing)
    go(config(name, **changes), tmp_path / "run")
    assert all(report.grad_norm > 0 for report in reports)
    if name not in {"diffusion_dpo", "diffusion_nft"}:
        assert max(metric(reports[0], "ratio")) == 0 < max(metric(reports[-1], "ratio"))
