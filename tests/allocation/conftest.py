import pytest

from tests.networks import calibrated_network, calibration_set


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=8, activation_bits=8), calibration
