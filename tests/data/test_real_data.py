"""The shipped configs on real images, shrunk to seconds: that it runs, not how well it works."""

import os
from pathlib import Path

import numpy as np
import pytest

from badloss_jax.config import load_config
from badloss_jax.data import load_dataset
from badloss_jax.runs.experiment import run_experiment
from tests.conftest import overrides

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR10 = os.environ.get("BADLOSS_CIFAR10", "")
GTSRB = os.environ.get("BADLOSS_GTSRB", "")

pytestmark = pytest.mark.usefixtures("unrendered")


def shrunk(spec, **changed):
    """A shipped config with its own data, attacks and network, and little of everything else."""
    little = {"data__train_examples": 2000, "data__test_examples": 300, "probes__count": 100}
    settings = overrides(**little, retraining__variants="()", controls="()", **changed)
    dropped = ("--config.attacks.names", "--config.model.stages", "--config.scoring.loss.k")
    return load_config(spec, [text for text in settings if not text.startswith(dropped)])


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist(tmp_path, mesh):
    config = shrunk("configs/fashion_mnist.py:quick", recording__batch_size=32, retraining__batch_size=32)
    dataset = load_dataset(load_config("configs/fashion_mnist.py").data, 0)
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    results = run_experiment(config, tmp_path, mesh=mesh)
    assert results["undefended"]["clean_accuracy"] > 0.5
    assert len(results["undefended"]["attack_success_rate"]) == 6


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10, reason="BADLOSS_CIFAR10 does not name a folder with {train,test}/<class>/*")
def test_cifar10(tmp_path, mesh):
    changed = {"data__dir": CIFAR10, "data__cache_dir": str(tmp_path / "cache")}
    assert load_dataset(shrunk("configs/cifar10.py:quick", **changed).data, 0).image_shape == (32, 32, 3)
    results = run_experiment(shrunk("configs/cifar10.py:quick", **changed), tmp_path / "run", mesh=mesh)
    assert results["undefended"]["clean_accuracy"] > 0.15
    assert len(results["undefended"]["attack_success_rate"]) == 7


@pytest.mark.slow
@pytest.mark.skipif(not GTSRB, reason="BADLOSS_GTSRB does not name the official folder GTSRB, whole or reduced")
def test_gtsrb(tmp_path, mesh):
    dataset = load_dataset(load_config("configs/gtsrb.py:third", [f"--config.data.dir={GTSRB}"]).data, 0)
    assert dataset.image_shape == (32, 32, 3)
    assert len(np.unique(dataset.train.labels)) == len(np.unique(dataset.test.labels)) == 43
    changed = {"attacks__sinusoid__min_class": 50, "attacks__sinusoid__min_images": 20}
    results = run_experiment(shrunk("configs/gtsrb.py:third", data__dir=GTSRB, **changed), tmp_path / "run", mesh=mesh)
    assert results["undefended"]["clean_accuracy"] > 0.05
    assert results["attacks"]["sinusoid"]["examples"] >= 20
    assert results["class_names"][14] == "stop"
