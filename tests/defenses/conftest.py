"""The home of the defences that look at one trained network: digits with one strong patch, 10 % of the images."""

import pytest

from badloss_jax.config import load_config
from badloss_jax.runs.experiment import run_experiment

HOME = {
    "attacks.names": "('patch',)",
    "attacks.patch.ratio": 0.1,
    "attacks.patch.target": 3,
    "controls": "()",
    "scoring.kinds": "()",
    "retraining.variants": "()",
    "retraining.epochs": 15,
    "recording.epochs": 6,
    "evaluation.max_triggered": 200,
}


def home_config(names, *overrides):
    settings = HOME | {"defenses.names": f"{tuple(names.split(','))}"}
    return load_config(
        "configs/digits.py", [*(f"--config.{key}={value}" for key, value in settings.items()), *overrides]
    )


@pytest.fixture(autouse=True)
def _unrendered(unrendered):
    """Nobody looks at pictures at home."""


@pytest.fixture(scope="session")
def at_home(tmp_path_factory, common, mesh):
    """Lets defences work at home, on one attacked network for all: ("A,B", *overrides) -> what results.json holds."""

    def run(names, *overrides):
        workdir = tmp_path_factory.mktemp("home") / "run"
        return run_experiment(home_config(names, *overrides), workdir, mesh=mesh, shared=common / "at-home")

    return run
