import copy
import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction import adaquant as whole_model
from lightning_calibtip.reconstruction.adam import Adam
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set
from tests.processes import in_a_killed_process, kill_at_call

UNITS, ITERATIONS = 6, 5
BY_LAYERS = AdaQuantOptions(granularity="layer", iterations=ITERATIONS, batch_size=16, drop_probability=0.3)
PARALLEL = replace(BY_LAYERS, mode="parallel")
CANDIDATES = [BitWidths(2, 4), BitWidths(8, 8)]

pytestmark = pytest.mark.usefixtures("one_thread")


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
        for tensor in (layer.weight, layer.bias, *(p for q in layer.quantizers for p in q.parameters()))
    ]


MOMENTS = [(Adam, "step", count) for count in (1, 5, 6, 13, 17, 24, 30)]
MOMENTS += [(Path, "replace", count) for count in (1, 3)] + [(os, "fsync", 6)]


@pytest.mark.parametrize("owner,name,count", MOMENTS, ids=[f"{name} {count}" for _, name, count in MOMENTS])
def test_a_killed_run_is_resumed_to_bit_identical_weights(start, tmp_path, monkeypatch, owner, name, count):
    network, calibration = start()
    wanted = adaquant(network, calibration, BY_LAYERS)
    folder = tmp_path / "state"

    def work():
        kill_at_call(monkeypatch, owner, name, count)
        adaquant(*start(), BY_LAYERS, state_folder=folder)

    in_a_killed_process(work)
    finished = len(list(folder.glob("*.pt")))
    if owner is Adam:
        assert finished == (count - 1) // ITERATIONS
    optimised = []
    optimize_unit = whole_model.optimize_unit

    def noting(unit, *args):
        optimised.append(unit.name)
        return optimize_unit(unit, *args)

    monkeypatch.setattr(whole_model, "optimize_unit", noting)
    resumed, calibration = start()
    results = adaquant(resumed, calibration, BY_LAYERS, state_folder=folder)
    assert len(optimised) == UNITS - finished
    assert all(torch.equal(a, b) for a, b in zip(states(resumed), states(network), strict=True))
    assert [(r.name, r.error_before, r.error_after, r.kept) for r in results] == [
        (r.name, r.error_before, r.error_after, r.kept) for r in wanted
    ]
    assert [layer.errors for layer in resumed.layers.values()] == [layer.errors for layer in network.layers.values()]


def test_candidates_are_resumed_too(start, tmp_path, monkeypatch):
    folder = tmp_path / "state"
    wanted, calibration = start()
    adaquant_candidates(wanted, calibration, PARALLEL, CANDIDATES)

    def work():
        # The first layer is pinned; the second and the third are reconstructed twice each.
        kill_at_call(monkeypatch, Adam, "step", 5 * ITERATIONS + 2)
        network, calibration = start()
        adaquant_candidates(network, calibration, PARALLEL, CANDIDATES, state_folder=folder)

    in_a_killed_process(work)
    assert len(list(folder.glob("*.pt"))) == 5
    network, calibration = start()
    adaquant_candidates(network, calibration, PARALLEL, CANDIDATES, state_folder=folder)
    for name in network.searchable_layers:
        assert len(network.layers[name].variants) == 2
        for config, state in network.layers[name].variants.items():
            assert torch.equal(state.weight, wanted.layers[name].variants[config].weight)
            for found, right in zip(state.qparams, wanted.layers[name].variants[config].qparams, strict=True):
                assert torch.equal(found, right)
    with pytest.raises(ValueError, match="the state of a reconstruction with another candidates, which was killed"):
        adaquant_candidates(*start(), PARALLEL, CANDIDATES[::-1], state_folder=folder)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("calibtip_state")}


def test_a_folder_of_another_run_is_refused_and_left_alone(start, tmp_path, images):
    adaquant(*start(), BY_LAYERS, state_folder=tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="the state of a reconstruction with another iterations, which was killed"):
        adaquant(*start(), replace(BY_LAYERS, iterations=7), state_folder=tmp_path)
    with pytest.raises(ValueError, match="with another mode"):
        adaquant(*start(), PARALLEL, state_folder=tmp_path)
    network, calibration = start()
    calibration.batches[1] = images[:16] + 1
    with pytest.raises(ValueError, match="with another calibration data,"):
        adaquant(network, calibration, BY_LAYERS, state_folder=tmp_path)
    network, calibration = start()
    network.layers["head"].weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="with another calibrated state,"):
        adaquant(network, calibration, BY_LAYERS, state_folder=tmp_path)
    assert before == content(tmp_path)


def test_a_run_with_another_loss_storage_or_precision_is_refused(start, tmp_path):
    def loss(output, batch):
        return output.square().sum()

    options = replace(BY_LAYERS, granularity="block")
    adaquant(*start(), options, state_folder=tmp_path)
    with pytest.raises(ValueError, match="with another loss,"):
        adaquant(*start(), replace(options, loss=loss), state_folder=tmp_path)
    with pytest.raises(ValueError, match="with another storage,"):
        adaquant(*start(), options, ActivationStore(precision=torch.bfloat16), tmp_path)
    network, calibration = start()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="with another precision,"):
        adaquant(network, calibration, options, state_folder=tmp_path)


def closing_over(value):
    return lambda output, batch: (output * float(torch.tensor(1.0) if callable(value) else 1.0)).square().sum()


def test_a_loss_is_told_by_what_it_closes_over_and_refused_where_it_cannot_be(start, tmp_path, caplog):
    options = replace(BY_LAYERS, granularity="block", iterations=1)
    adaquant(*start(), replace(options, loss=closing_over(1)), state_folder=tmp_path / "first")
    adaquant(*start(), replace(options, loss=closing_over(1)), state_folder=tmp_path / "first")
    with pytest.raises(ValueError, match="with another loss,"):
        adaquant(*start(), replace(options, loss=closing_over(2)), state_folder=tmp_path / "first")
    unknown = replace(options, loss=closing_over(iter([1])))
    adaquant(*start(), unknown, state_folder=tmp_path / "second")
    assert "a run that depends on it cannot be resumed: a list_iterator cannot be recognised" in caplog.text
    with pytest.raises(ValueError, match="with another loss,"):
        adaquant(*start(), unknown, state_folder=tmp_path / "second")
    for loss in (functools.partial(closing_over(1)), Loss()):
        adaquant(*start(), replace(options, loss=loss), state_folder=tmp_path / type(loss).__name__)


class Loss(torch.nn.Module):
    def forward(self, output, batch):
        return output.square().sum()


@pytest.mark.parametrize("version, what", [(1, "an earlier release"), (99, r"a later release \(format version 99\)")])
def test_a_folder_of_another_release_is_refused(start, tmp_path, version, what):
    adaquant(*start(), BY_LAYERS, state_folder=tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**described, "format version": version}))
    with pytest.raises(ValueError, match=f"was written by {what}: finish it with that release, or remove the folder"):
        adaquant(*start(), BY_LAYERS, state_folder=tmp_path)


@pytest.mark.parametrize("flip", [20, 2000, -3000, -100])
def test_damaged_state_is_named_and_nothing_of_it_is_taken(start, tmp_path, flip):
    network, calibration = start()
    adaquant(network, calibration, BY_LAYERS, state_folder=tmp_path)
    path = tmp_path / "0002.pt"
    content = bytearray(path.read_bytes())
    content[flip] ^= 4
    path.write_bytes(content)
    again, calibration = start()
    try:
        adaquant(again, calibration, BY_LAYERS, state_folder=tmp_path)
    except ValueError as error:
        assert re.search(r"0002.pt is damaged \(.*\): remove it, and this unit is reconstructed again", str(error))
        path.unlink()
        again, calibration = start()
        adaquant(again, calibration, BY_LAYERS, state_folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(states(again), states(network), strict=True))


def test_a_damaged_description_is_named(start, tmp_path):
    adaquant(*start(), BY_LAYERS, state_folder=tmp_path)
    (tmp_path / "run.json").write_text('{"format')
    with pytest.raises(ValueError, match=r"run.json is damaged .*: remove .* to begin anew"):
        adaquant(*start(), BY_LAYERS, state_folder=tmp_path)
