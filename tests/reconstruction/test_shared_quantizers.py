"""Layers that read the same tensor share its quantizer: it is learned once."""

import pytest
import torch
from torch import nn

from lightning_calibtip.calibration.replay import Replay
from lightning_calibtip.reconstruction.adam import Adam
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.optimize import optimize_unit
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set


class Fork(nn.Module):
    """A block in which two layers read what a layer before it writes, and a third reads it after the block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.left(x)) + self.right(x)

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), self.Block(), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.block(x) + self.last(x)


@pytest.fixture
def fork():
    torch.manual_seed(0)
    model = Fork().eval()
    calibration = calibration_set(model, *(torch.randn(512, 3) @ torch.randn(3, 8)).split(64))
    network = calibrated_network(model, calibration, weight_bits=2, activation_bits=3, edge_bits=None)
    readers = [network.layers[name] for name in ("block.left", "block.right", "last")]
    assert len({layer.input_quantizers[0] for layer in readers}) == 1
    return network, calibration


def scale_after_each_unit(monkeypatch, quantizer):
    """Scale before the first unit and after each, by the unit's name."""
    scales = {"": quantizer.scale.clone()}

    def noting(unit, *args):
        result = optimize_unit(unit, *args)
        scales[unit.name] = quantizer.scale.clone()
        return result

    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", noting)
    return scales


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("granularity,learner", [("layer", "block.left"), ("block", "block")])
def test_the_first_unit_learns_the_scale_and_later_ones_leave_it(fork, monkeypatch, mode, granularity, learner):
    network, calibration = fork
    scales = scale_after_each_unit(monkeypatch, network.layers["last"].input_quantizers[0])
    results = adaquant(network, calibration, AdaQuantOptions(mode, granularity, iterations=100, batch_size=32))
    kept = {result.name: result.kept for result in results}
    assert kept[learner] and kept["last"]
    names = list(scales)
    place = names.index(learner)
    assert all(torch.equal(scales[name], scales[""]) for name in names[:place])
    assert not torch.equal(scales[learner], scales[""])
    assert all(torch.equal(scales[name], scales[learner]) for name in names[place:])


def test_a_shared_scale_is_one_parameter_of_the_optimiser(fork, monkeypatch):
    network, calibration = fork
    lists = []

    def keep(self, parameters, rates):
        lists.append(list(parameters))
        init(self, parameters, rates)

    init = Adam.__init__
    monkeypatch.setattr(Adam, "__init__", keep)
    adaquant(network, calibration, AdaQuantOptions(iterations=1))
    scale = network.layers["last"].input_quantizers[0].scale
    assert [sum(parameter is scale for parameter in parameters) for parameters in lists] == [0, 1, 0]


def test_a_layer_that_answers_from_store_does_not_switch_off_what_others_compute_with(fork):
    network, calibration = fork
    names = list(network.layers)
    stream = Replay(network.model, network.structure, calibration, names, to_end=True)
    with torch.no_grad():
        wanted = [calibration.run(index) for index in range(len(calibration))]
    for name in names:
        stream.finish(name, stream.record(name).outputs)
        for index, output in enumerate(wanted):
            assert torch.equal(stream.run(index), output), name
    assert all(quantizer.enabled for quantizer in network.quantizers)


def test_sequential_inputs_are_those_of_the_quantized_model(fork, monkeypatch):
    network, calibration = fork
    seen = {}

    def record(unit, dataset, *args):
        seen[unit.name] = dataset.take(torch.arange(dataset.count)).call.args[0]
        return optimize_unit(unit, dataset, *args)

    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", record)
    adaquant(network, calibration, AdaQuantOptions(granularity="layer", iterations=20, batch_size=32))
    inputs = {name: [] for name in seen}
    for name, kept in inputs.items():
        network.layers[name].module.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0].clone()), prepend=True
        )
    with torch.no_grad():
        for index in range(len(calibration)):
            calibration.run(index)
    for name, kept in inputs.items():
        torch.testing.assert_close(seen[name], torch.cat(kept), msg=name)
    assert all(quantizer.enabled for quantizer in network.quantizers)
