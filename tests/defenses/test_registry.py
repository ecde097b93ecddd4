import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from badloss_jax.config import default_config, load_config
from badloss_jax.defenses import DEFENSES
from badloss_jax.runs.experiment import run_experiment
from tests.conftest import no_pictures, overrides

SHRUNK = {
    "recording.kinds": "('step','prob','logits','ranked','features')",
    "defenses.names": f"{tuple(DEFENSES)}",
    "retraining.variants": f"{tuple(f'{name}/own' for name, defense in DEFENSES.items() if defense.own_rule)}",
    "scoring.prob.k": 5,
    "defenses.neural_cleanse.epochs": 2,
    "defenses.neural_cleanse.steps": 5,
    "defenses.cognitive_distillation.steps": 3,
    "defenses.frequency_analysis.epochs": 2,
    "defenses.abl.epochs": 2,
    "defenses.cbd.backdoor_epochs": 1,
    "defenses.pss.early_epochs": 1,
    "defenses.pss.epochs": 1,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory, mesh):
    """One run of all defences on digits, shrunk: that they work together, not how well."""
    workdir = tmp_path_factory.mktemp("everything") / "run"
    config = load_config("configs/digits.py", [*overrides(), *(f"--config.{k}={v}" for k, v in SHRUNK.items())])
    with no_pictures():
        return workdir, config, run_experiment(config, workdir, mesh=mesh)


def test_all_defences_end_to_end(everything):
    workdir, config, results = everything
    for name, defense in DEFENSES.items():
        if defense.cleanses:
            variant = results["variants"][name]
            assert "recall" not in variant
            assert variant["removed_share"] == 0
            assert variant["retrained"]["attack_success_rate"].keys() == {"patch", "sinusoid"}
            assert (workdir / "models" / name / "about.json").is_file()
        else:
            rules = [*(["own"] if defense.own_rule else []), *config.rejection.rules]
            assert [key for key in results["variants"] if key.startswith(f"{name}/")] == [f"{name}/{r}" for r in rules]
            variant = results["variants"][f"{name}/{rules[0]}"]
            assert ("retrained" in variant) == defense.own_rule
            assert 0 <= variant["detection"]["auroc"]["overall"] <= 1
        assert variant["cost"]["seconds"] > 0
        assert name in variant["cost"]["seconds_of"]
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    scores = pq.read_table(workdir / "scores.parquet").to_pydict()
    is_probe = np.array(scores["probe"])
    for name in (name for name, defense in DEFENSES.items() if defense.own_rule):
        assert not np.array(scores[f"removed_{name}_own"])[is_probe].any()
        assert np.isfinite(scores[f"distance_{name}"]).all()
    page, markdown = (workdir / "report.html").read_text(), (workdir / "report.md").read_text()
    assert all(name in page and name in markdown for name in DEFENSES)


def test_what_defences_found_is_kept(everything, mesh, monkeypatch):
    workdir, config, results = everything

    def again(*_, **__):
        raise AssertionError("worked again")

    for name, defense in DEFENSES.items():
        if not defense.recorded:
            monkeypatch.setitem(DEFENSES, name, type(defense)(again, defense.own_rule, defense.cleanses))
    monkeypatch.setattr("badloss_jax.runs.trainer.train", again)
    assert run_experiment(config, workdir, mesh=mesh)["variants"].keys() == results["variants"].keys()


def test_every_group_of_settings_is_a_defences():
    assert set(default_config().defenses) - {"names"} <= set(DEFENSES)
