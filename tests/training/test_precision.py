"""A network that computes in bfloat16 says of each example what it says in float32, on real images."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from badloss_jax.config import load_config
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.trajectories.store import TrajectoryStore

DETECTION = {
    "recording.epochs": 10,
    "scoring.kinds": "('loss','ranked','features','combined')",
    "retraining.enabled": False,
    "retraining.variants": "()",
    "controls": "()",
    "report.gallery": 1,
}


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_bfloat16_ranks_the_digits_as_float32_does(tmp_path, mesh):
    results, scores, losses = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        changed = DETECTION | {"model.dtype": dtype}
        config = load_config("configs/digits.py", [f"--config.{key}={value}" for key, value in changed.items()])
        results[dtype] = run_experiment(config, tmp_path / dtype, mesh=mesh)["variants"]
        scores[dtype] = pq.read_table(tmp_path / dtype / "scores.parquet")
        losses[dtype] = TrajectoryStore.open(tmp_path / dtype / "trajectories").read("loss")

    assert losses["bfloat16"].dtype == np.float32
    for epoch in range(10):
        assert spearmanr(losses["float32"][:, epoch], losses["bfloat16"][:, epoch])[0] > 0.97
    for kind in ("loss", "ranked", "features", "combined"):
        wide, narrow = (results[dtype][f"{kind}/fraction"]["detection"]["auroc"]["overall"] for dtype in results)
        assert narrow == pytest.approx(wide, abs=0.015), kind
        wide, narrow = (table[f"distance_{kind}"].to_numpy() for table in scores.values())
        assert not (wide == narrow).all()
        assert spearmanr(wide, narrow)[0] > 0.95, kind
