"""A scan takes the largest network that it has the time for, and keeps it."""

import pytest

from badloss_jax.core.mesh import make_mesh
from badloss_jax.runs.sizing import Network, candidates, choose

NETWORKS = [
    Network("resnet_small", (8,), 2),
    Network("resnet_small", (16,), 2),
    Network("resnet_small", (32,), 2, share=0.5),
]
RATES = {(8,): 1000.0, (16,): 500.0, (32,): 200.0}  # images a second


def chosen(seconds, asked=None):
    def rate_of(network):
        if asked is not None:
            asked.append(network.stages)
        return RATES[network.stages]

    return choose(NETWORKS, rate_of, 3_000, 20, seconds)


@pytest.mark.parametrize(
    ("seconds", "stages", "epochs", "planned"),
    [(1_000, (32,), 10, 200), (200, (32,), 10, 200), (199, (16,), 20, 160), (159, (8,), 20, 80), (80, (8,), 20, 80)],
)
def test_the_largest_that_fits(seconds, stages, epochs, planned):
    """An epoch and its sweep take four thirds of the training: 3,000 images, 20 epochs, 1,000 a second are 80 s."""
    choice = chosen(seconds)
    assert (choice.network.stages, choice.epochs, choice.rate) == (stages, epochs, RATES[stages])
    assert choice.seconds == pytest.approx(planned)


@pytest.mark.parametrize(("seconds", "epochs"), [(40, 10), (36, 9), (10, 8), (0.1, 8)])
def test_fewer_epochs_where_not_even_the_smallest_fits(seconds, epochs):
    choice = chosen(seconds)
    assert (choice.network.stages, choice.epochs) == ((8,), epochs)
    assert choice.seconds == pytest.approx(4 * epochs)


def test_no_network_is_measured_that_cannot_fit():
    asked = []
    chosen(90, asked)
    assert asked == [(8,)]
    chosen(170, asked)
    assert asked == [(8,), (8,), (16,)]


@pytest.mark.parametrize(
    ("images", "stride", "expected"),
    [
        (20_000, 2, [((16, 32, 64), 2), ((32, 64, 128), 2), ((16, 32, 64), 1), ((32, 64, 128), 1)]),
        (4_999, 2, [((16, 32, 64), 2), ((16, 32, 64), 1)]),
        (20_000, 1, [((16, 32, 64), 1), ((32, 64, 128), 1)]),
        (4_999, 4, [((16, 32, 64), 4), ((16, 32, 64), 2)]),
    ],
)
def test_of_few_images_narrow_networks_and_no_stride_below_one(images, stride, expected):
    networks = candidates(images, make_mesh(), (16, 32, 64), stride)
    assert [(network.stages, network.stem_stride) for network in networks] == expected
