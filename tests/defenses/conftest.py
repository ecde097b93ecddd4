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


def home_config(name, *overrides):
    settings = HOME | {"defenses.names": f"('{name}',)"}
    return load_config(
        "configs/digits.py", [*(f"--config.{key}={value}" for key, value in settings.items()), *overrides]
    )


@pytest.fixture(scope="session")
def at_home(tmp_path_factory, mesh):
    """Lets a defence work at home, on one attacked network for all: (name, *overrides) -> what results.json holds."""
    folder = tmp_path_factory.mktemp("home")

    def run(name, *overrides):
        workdir = folder / f"{name}-{len(list(folder.iterdir()))}"
        return run_experiment(home_config(name, *overrides), workdir, mesh=mesh, shared=folder / "shared")

    return run
