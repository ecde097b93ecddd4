"""Eight CPU devices for the tests of sharding; everything else runs on the first, but for tests/gpu.

All processes of a session, those that tests start included, share what XLA compiles, see `compiled`.
"""

import fcntl
import io
import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

from tests.compiled import pytest_sessionfinish  # noqa: F401, a hook; names the folder, which JAX asks for when imported

os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # which would make the folder a part of programs' names

import jax
import numpy as np
import pytest
from PIL import Image

if not os.environ.get("BADLOSS_TEST_GPU"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of `nohup pytest &`; what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

from badloss_jax.config import load_config  # noqa: E402
from badloss_jax.core.mesh import make_mesh  # noqa: E402
from badloss_jax.core.progress import Progress  # noqa: E402
from badloss_jax.data import prepare as prepare_module  # noqa: E402
from badloss_jax.runs.experiment import run_experiment  # noqa: E402
from badloss_jax.settings import RULES  # noqa: E402
from tests.budget import (  # noqa: E402, F401, hooks
    pytest_addoption,
    pytest_fixture_setup,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

# What a process that a test starts gets of the environment: one CPU device, and the session's compiled programs.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
ENVIRONMENT |= {name: value for name, value in os.environ.items() if name.startswith(("JAX_COMP", "JAX_PERSISTENT"))}
ENVIRONMENT |= {"JAX_PLATFORMS": "cpu"}
# Of a process that may end while it writes a program down, which would stay there, torn, for all that come later.
ONLY_READS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)
# The digits config, shrunk to seconds: what it ends with means nothing, that it ends does.
TINY = {
    "data.train_examples": 300,
    "data.test_examples": 60,
    "attacks.names": "('patch','sinusoid')",
    "probes.count": 30,
    "model.stages": "(8,)",
    "recording.epochs": 3,
    "recording.schedule_epochs": 6,
    "scoring.loss.k": 5,
    "scoring.step.k": 5,
    "retraining.epochs": 2,
    "retraining.variants": "('loss/fraction','combined/alpha')",
}

CLASS_NAMES = ("<script>alert(1)</script>", "$x_1$ & 'b'", "c|d", *"3456789")
RECORDED = "'step','prob','logits','ranked','features'"
FINISHED = {
    "recording__kinds": f"({RECORDED})",
    "scoring__kinds": f"('loss',{RECORDED},'combined')",
    "rejection__rules": f"{RULES}",
    "scoring__prob__k": 5,
    "data__class_names": f"{CLASS_NAMES}",
}


def overrides(**changed):
    """TINY, with keys changed (double underscore for a dot), as command line overrides."""
    settings = TINY | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"--config.{key}={value}" for key, value in settings.items()]


def without_cost(variants):
    """The variants of a run without what they cost, which no two runs agree on."""
    return {name: {key: value for key, value in entry.items() if key != "cost"} for name, entry in variants.items()}


def encoded(rng, size=None, kind="JPEG"):
    height, width = size or rng.integers(12, 40, 2)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def unpack(folder, images):
    """Writes {split/class/file: bytes} as a folder of images."""
    for name, content in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepare_in_shards(source, folder, stream=None):
    """As `badloss prepare image_folder`, with two or three images a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_SHARD", 500)
        prepare_module.prepare("image_folder", source, folder, 0, Progress(stream))


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def one_device(mesh):
    """Commands that a module calls in its own process train on the first device, as those of most people do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("experiment", "poison", "scan"):
            patch.setattr(f"badloss_jax.runs.{name}.make_mesh", lambda: mesh)
        yield


@contextmanager
def no_pictures():
    """Within it reports are written, and all of their plots are drawn, but Matplotlib makes no picture of them.

    For runs whose pictures nobody looks at: these take as long as all the rest of a small run.
    """

    def savefig(figure, file, **how):
        if not hasattr(file, "write"):
            Path(file).write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        yield


@pytest.fixture
def unrendered():
    with no_pictures():
        yield


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder of all test processes of the session; their own ones lie in it, beside each other."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def run_once(tmp_path_factory, common, mesh):
    """Lets the first test process of the session run an experiment, by its name, and gives each a copy of its own."""

    def run(name, config):
        made, said = common / name, common / f"{name}.json"
        with open(common / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                said.write_text(json.dumps(run_experiment(config, made, mesh=mesh)))

        workdir = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(made, workdir)
        return workdir, config, json.loads(said.read_text())

    return run


@pytest.fixture(scope="session")
def finished(run_once):
    """One finished run, whose classes have hostile names; the tests only read it."""
    return run_once("finished", load_config("configs/digits.py", overrides(**FINISHED)))


DEFENDED = {
    "scoring__kinds": "('loss',)",
    "controls": "()",
    "retraining__variants": "()",
    "retraining__enabled": False,
    "defenses__names": "('mean_loss_low','badloss_logits','badloss','badloss_step','loss_variance')",
}


@pytest.fixture(scope="session")
def defended(run_once):
    """As `finished`, but with defences beside one kind of trajectory, and nothing retrained; the tests only read it."""
    return run_once("defended", load_config("configs/digits.py", overrides(**FINISHED | DEFENDED)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tiny():
    return lambda **changed: load_config("configs/digits.py", overrides(**changed))


@pytest.fixture
def prepared(tmp_path, rng):
    """A prepared folder of 8 px images, of several shards, and the folder of images that it was made from."""
    images = {f"train/{c}/{i}.png": encoded(rng, (8, 8), "PNG") for c in ("cat", "dog & <b>") for i in range(6)}
    images |= {f"test/cat/{i}.png": encoded(rng, (8, 8), "PNG") for i in range(3)}
    unpack(tmp_path / "folder", images)
    prepare_in_shards(tmp_path / "folder", tmp_path / "out")
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    # Here, as only this needs it, and where it is missing all other tests can run.
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(CHROMEDRIVER))
    yield driver
    driver.quit()


def opened(browser, page, width):
    """Opens a page at a width; returns what the console said and the addresses that were asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return browser.get_log("browser"), asked
