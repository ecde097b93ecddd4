import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from badloss_jax.core import topology
from badloss_jax.core.errors import UsageError
from badloss_jax.core.topology import CHIPS, local_topology, parse, prepare, why_not_compiled
from tests.conftest import ENVIRONMENT


@pytest.mark.parametrize(
    ("name", "size", "hosts"),
    [
        ("v4:2x2x1", 4, 1),
        ("v5e:1x1", 1, 1),
        ("v5e:2x4", 8, 2),
        ("v5e:16x16", 256, 64),
        ("v5p:4x4x4", 64, 16),
        ("v6e:8x8", 64, 16),
        ("h100:1x8", 8, 1),
        ("h100:8x8", 64, 8),
    ],
)
def test_topologies_are_named_by_their_chips_along_each_axis(name, size, hosts):
    parsed = parse(name)
    assert (parsed.name, parsed.size, parsed.hosts) == (name, size, hosts)
    assert parsed.chip is CHIPS[name.partition(":")[0]]
    assert parsed.memory == parsed.chip.memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected v5e: and 2 sizes, of which the first two are even, or 1x1, such as v5e:2x4"),
        ("v5e:16", "expected v5e: and 2 sizes"),
        ("v5e:3x3", "expected v5e: and 2 sizes"),
        ("v5e:0x4", "expected v5e: and 2 sizes"),
        ("v5e:1x4", "expected v5e: and 2 sizes"),
        ("v5p:1x1x1", "expected v5p: and 3 sizes, of which the first two are even, such as"),
        ("v5p:4x4", "expected v5p: and 3 sizes"),
        ("h100:8", "expected h100: and NODESxGPUS"),
        ("h10:1x8", "expected one of v4, v5e, v5p, v6e, h100, local"),
        ("h10:1x8", "did you mean 'h100'"),
    ],
)
def test_a_name_that_there_is_not_says_which_there_are(name, message):
    with pytest.raises(UsageError) as caught:
        parse(name)
    assert message in str(caught.value)
    assert "v5p:4x4x4" in str(caught.value)


def test_sums_take_what_the_slowest_links_need():
    # Of a pod all links at once: 7/8 of the bytes, twice.
    assert parse("v5e:2x4").reduction_seconds(800) == pytest.approx(2 * 700 / 0.2e12)
    # Of one node NVLink alone; of eight, each GPU exchanges an eighth with the seven others.
    assert parse("h100:1x8").reduction_seconds(800) == pytest.approx(2 * 700 / 0.45e12)
    assert parse("h100:8x8").reduction_seconds(800) == pytest.approx(2 * 7 / 8 * 100 / 0.05e12)
    assert parse("h100:1x1").gathering_seconds(800) == 0


@pytest.mark.parametrize(
    ("kind", "chip"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", None)]
)
def test_devices_that_are_here_are_known_by_their_kind(kind, chip):
    devices = [SimpleNamespace(device_kind=kind, process_index=number // 4) for number in range(8)]
    here = local_topology(devices, 0)
    assert here.chip is (CHIPS[chip] if chip else None)
    assert (here.size, here.hosts, here.is_local) == (8, 2, True)
    assert here.memory == (CHIPS[chip].memory if chip else 0)
    assert local_topology(devices, 5).memory == 5
    assert here.describe() == f"8 x {CHIPS[chip].name if chip else kind} in 2 hosts"


def test_the_environment_is_left_alone_for_the_machine_that_is_here(monkeypatch):
    monkeypatch.setattr(topology.os, "environ", {})
    prepare(None)
    assert os.environ == {}
    prepare(parse("v5e:2x4"))
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_what_cannot_be_compiled_is_said(monkeypatch):
    assert "each core of a TPU v4" in why_not_compiled(parse("v4:2x2x1"))
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert "libtpu is not installed" in why_not_compiled(parse("v5e:2x4"))
    assert "jax-cuda13-plugin" in why_not_compiled(parse("h100:1x8"))
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    assert why_not_compiled(parse("v5e:2x4")) == why_not_compiled(parse("h100:1x8")) == ""


def test_names_are_checked_without_jax():
    code = (
        "import sys; from badloss_jax.core import topology; topology.parse('v5e:2x4'); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
