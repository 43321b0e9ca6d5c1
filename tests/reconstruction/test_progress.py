import copy
import os
from pathlib import Path

import pytest
import torch

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.reconstruction import adaquant as whole_model
from lightning_calibtip.reconstruction.adam import Adam
from lightning_calibtip.reconstruction.adaquant import Reconstruction, adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.settings import AdaQuantSettings
from tests.networks import calibrated_network, calibration_set
from tests.processes import in_a_killed_process, kill_at_call

UNITS, ITERATIONS = 6, 5
SETTINGS = AdaQuantSettings(iterations=ITERATIONS, batch_size=16, drop_probability=0.3)


@pytest.fixture
def start(tiny_resnet, images):
    """Fresh copies of a calibrated network."""

    def make():
        model = copy.deepcopy(tiny_resnet)
        calibration = calibration_set(model, *images.split(16))
        return calibrated_network(model, calibration, weight_bits=2, activation_bits=4), calibration

    return make


def states(network):
    return [
        tensor
        for layer in network.layers.values()
        for tensor in (layer.weight, layer.bias, *(p for q in layer.quantizers for p in (q.scale, q.zero_point)))
    ]


MOMENTS = [(Adam, "step", count) for count in (1, 5, 6, 13, 17, 24, 30)]
MOMENTS += [(Path, "replace", count) for count in (1, 3)] + [(os, "fsync", 6)]


@pytest.mark.parametrize("owner,name,count", MOMENTS, ids=[f"{name} {count}" for _, name, count in MOMENTS])
def test_a_killed_run_goes_on_to_bit_identical_weights(start, tmp_path, monkeypatch, owner, name, count):
    network, calibration = start()
    wanted = adaquant(network, calibration, Reconstruction(SETTINGS, granularity="layer"))
    how = Reconstruction(SETTINGS, granularity="layer", progress=tmp_path / "state")

    def work():
        kill_at_call(monkeypatch, owner, name, count)
        adaquant(*start(), how)

    in_a_killed_process(work)
    finished = len(list(tmp_path.glob("state/*.pt")))
    if owner is Adam:
        assert finished == (count - 1) // ITERATIONS
    optimised = []
    optimize_unit = whole_model.optimize_unit

    def noting(unit, *args):
        optimised.append(unit.name)
        return optimize_unit(unit, *args)

    monkeypatch.setattr(whole_model, "optimize_unit", noting)
    resumed, calibration = start()
    results = adaquant(resumed, calibration, how)
    assert len(optimised) == UNITS - finished
    assert all(torch.equal(a, b) for a, b in zip(states(resumed), states(network), strict=True))
    assert [(r.name, r.error_before, r.error_after, r.kept) for r in results] == [
        (r.name, r.error_before, r.error_after, r.kept) for r in wanted
    ]
    assert [layer.errors for layer in resumed.layers.values()] == [layer.errors for layer in network.layers.values()]


def test_candidates_go_on_too(start, tmp_path, monkeypatch):
    how = Reconstruction(SETTINGS, "parallel", "layer", progress=tmp_path / "state")
    wanted, calibration = start()
    adaquant_candidates(wanted, calibration, Reconstruction(SETTINGS, "parallel", "layer"), [(2, 4), (8, 8)])

    def work():
        kill_at_call(monkeypatch, Adam, "step", UNITS * ITERATIONS + 12)
        network, calibration = start()
        adaquant_candidates(network, calibration, how, [(2, 4), (8, 8)])

    in_a_killed_process(work)
    assert len(list((tmp_path / "state" / "w8a8").glob("*.pt"))) == 2
    network, calibration = start()
    adaquant_candidates(network, calibration, how, [(2, 4), (8, 8)])
    for name in network.free_layers:
        for bits, state in network.layers[name].variants.items():
            assert torch.equal(state.weight, wanted.layers[name].variants[bits].weight)


def test_a_folder_of_another_run_is_refused_and_left_alone(start, tmp_path, images):
    adaquant(*start(), Reconstruction(SETTINGS, granularity="layer", progress=tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    longer = AdaQuantSettings(iterations=7)
    with pytest.raises(ValueError, match="an unfinished reconstruction with another settings: repeat that run"):
        adaquant(*start(), Reconstruction(longer, granularity="layer", progress=tmp_path))
    with pytest.raises(ValueError, match="with another mode"):
        adaquant(*start(), Reconstruction(SETTINGS, "parallel", "layer", progress=tmp_path))
    network, calibration = start()
    calibration.batches[1] = images[:16] + 1
    with pytest.raises(ValueError, match="with another calibration data:"):
        adaquant(network, calibration, Reconstruction(SETTINGS, granularity="layer", progress=tmp_path))
    network, calibration = start()
    network.layers["head"].weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="with another calibrated state:"):
        adaquant(network, calibration, Reconstruction(SETTINGS, granularity="layer", progress=tmp_path))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_with_another_loss_storage_or_precision_is_refused(start, tmp_path):
    def loss(output, batch):
        return output.square().sum()

    adaquant(*start(), Reconstruction(SETTINGS, progress=tmp_path))
    with pytest.raises(ValueError, match="with another loss:"):
        adaquant(*start(), Reconstruction(SETTINGS, loss=loss, progress=tmp_path))
    with pytest.raises(ValueError, match="with another storage:"):
        store = ActivationStore(precision=torch.bfloat16)
        adaquant(*start(), Reconstruction(SETTINGS, progress=tmp_path), store)
    network, calibration = start()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="with another precision:"):
        adaquant(network, calibration, Reconstruction(SETTINGS, progress=tmp_path))
