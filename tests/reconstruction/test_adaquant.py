import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.calibration.recording import UnitCall
from lightning_calibtip.reconstruction.adam import Adam
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.objectives import SquaredError
from lightning_calibtip.reconstruction.optimize import optimize_unit, relative_error
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.unit_data import UnitDataset
from lightning_calibtip.reconstruction.units import Unit, find_units
from tests.conftest import TinyResNet
from tests.networks import calibrated_network, calibration_set, recorded

QUICK = AdaQuantOptions(iterations=40, batch_size=16)


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=4), calibration


def layer_errors(network, images):
    """Each layer's output error on float inputs, after the ReLU where one follows, computed without the package."""
    relu = {"stem", "blocks.0.conv1", "blocks.1.conv1"}
    inputs = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda m, args, n=name: inputs.__setitem__(n, args[0].clone()))
        for name, layer in network.layers.items()
    ]
    errors = {}
    with torch.no_grad():
        with network.quantized(False):
            network.model(images)
            for handle in handles:
                handle.remove()
            wanted = {name: layer.module(inputs[name]) for name, layer in network.layers.items()}
        for name, layer in network.layers.items():
            act = F.relu if name in relu else (lambda x: x)
            errors[name] = float((act(layer.module(inputs[name])) - act(wanted[name])).square().mean())
    return errors


def test_parallel_reconstruction_lowers_the_output_error_of_every_layer(calibrated, generator):
    network, calibration = calibrated
    fresh = torch.randn(64, 1, 8, 8, generator=generator)
    before = layer_errors(network, fresh)
    options = AdaQuantOptions("parallel", "layer", iterations=200, batch_size=16, weight_rate=3e-2)
    adaquant(network, calibration, options)
    after = layer_errors(network, fresh)
    for name in network.searchable_layers:
        assert after[name] < 0.9 * before[name], name


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_reconstruction_lowers_held_out_errors_and_keeps_the_float_model(
    tiny_resnet, images, calibrated, mode, granularity
):
    network, calibration = calibrated
    with torch.no_grad(), network.quantized(False):
        wanted = tiny_resnet(images)
    options = AdaQuantOptions(mode, granularity, iterations=200, batch_size=16, weight_rate=3e-2)
    results = adaquant(network, calibration, options)
    with torch.no_grad(), network.quantized(False):
        torch.testing.assert_close(tiny_resnet(images), wanted)
    for result in results:
        # The edges have 8 bits and hardly an error to lower.
        edge = result.name in ("stem", "head")
        assert result.error_after < result.error_before or (edge and not result.kept)
    for layer in network.layers.values():
        assert torch.equal(layer.weight_quantizer.zero_point, layer.weight_quantizer.zero_point.round())
        assert layer.errors is not None


def test_sequential_units_see_the_quantized_outputs_before_them(tiny_resnet, images, calibrated, monkeypatch):
    network, calibration = calibrated
    seen = {}

    def record(unit, dataset, *args):
        batch = dataset.take(torch.arange(dataset.count))
        seen[unit.name] = (batch.call.args[0], batch.target)
        return optimize_unit(unit, dataset, *args)

    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", record)
    adaquant(network, calibration, replace(QUICK, granularity="layer"))
    inputs = {name: [] for name in network.layers}
    for name, layer in network.layers.items():
        layer.module.register_forward_pre_hook(
            lambda m, args, name=name: inputs[name].append(args[0].clone()), prepend=True
        )
    with torch.no_grad():
        # In the batches of the calibration set: other sizes may round otherwise.
        for batch in images.split(16):
            tiny_resnet(batch)
        for name, (unit_input, _) in seen.items():
            torch.testing.assert_close(unit_input, torch.cat(inputs[name]), msg=name)
        with network.quantized(False):
            logits = tiny_resnet(images)
    torch.testing.assert_close(seen["head"][1], logits)


def test_diverging_unit_is_restored_bit_for_bit_and_named(calibrated, caplog):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    absurd = AdaQuantOptions(iterations=20, batch_size=16, weight_rate=1e6, bias_rate=1e6, relative=False)
    with caplog.at_level(logging.WARNING):
        results = adaquant(network, calibration, replace(absurd, granularity="layer"))
    for result in results:
        assert not result.kept and result.error_after == result.error_before
        assert f"{result.name}: restored" in caplog.text
        layer, state = network.layers[result.name], before[result.name]
        assert torch.equal(layer.weight, state.weight) and torch.equal(layer.bias, state.bias)
        assert torch.equal(layer.input_quantizers[0].scale, state.qparams[2])


def test_nan_is_restored_and_the_run_goes_on(calibrated, monkeypatch, caplog):
    network, calibration = calibrated
    before = network.layers["blocks.0.conv1"].save()
    output_tensors = Unit.output_tensors

    def poison(unit, output):
        leaves = output_tensors(unit, output)
        if unit.name == "blocks.0.conv1" and torch.is_grad_enabled():
            leaves = [leaf * float("nan") for leaf in leaves]
        return leaves

    monkeypatch.setattr(Unit, "output_tensors", poison)
    with caplog.at_level(logging.WARNING):
        results = {
            result.name: result for result in adaquant(network, calibration, replace(QUICK, granularity="layer"))
        }
    assert not results["blocks.0.conv1"].kept and "nan at step 0" in results["blocks.0.conv1"].note
    assert "blocks.0.conv1: restored" in caplog.text
    assert torch.equal(network.layers["blocks.0.conv1"].weight, before.weight)
    assert any(result.kept for result in results.values())


def test_autocast_sees_every_step_of_the_optimiser(images):
    """Autocast caches casts of parameters: without clearing, each step would compute with the first step's biases."""
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    calibration = calibration_set(model, images)
    network = calibrated_network(model, calibration)

    def note(layer, args, output):
        if output.requires_grad:
            seen.append(output.detach().float().mean(0))

    model[1].register_forward_hook(note)
    frozen = {"weight_rate": 0, "weight_range_rate": 0, "input_range_rate": 0, "zero_point_rate": 0}
    options = AdaQuantOptions(granularity="layer", iterations=3, batch_size=99, bias_rate=1.0, relative=False, **frozen)
    with torch.autocast("cpu", torch.bfloat16):
        adaquant(network, calibration, options)
    assert len(seen) == 3
    assert not torch.allclose(seen[0], seen[1], atol=0.05) and not torch.allclose(seen[1], seen[2], atol=0.05)


def test_same_seed_gives_bit_identical_weights_and_another_seed_does_not(tiny_resnet, images):
    weights = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(tiny_resnet)
        calibration = calibration_set(model, *images.split(16))
        network = calibrated_network(model, calibration)
        adaquant(network, calibration, AdaQuantOptions(granularity="layer", iterations=15, batch_size=16, seed=seed))
        weights.append([layer.weight.clone() for layer in network.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_a_parameter_with_rate_zero_stays(calibrated):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    only_bias = AdaQuantOptions(
        iterations=10, batch_size=16, weight_rate=0, weight_range_rate=0, input_range_rate=0, bias_rate=1e-3
    )
    adaquant(network, calibration, replace(only_bias, granularity="layer"))
    for name, layer in network.layers.items():
        assert torch.equal(layer.weight, before[name].weight)
        assert torch.equal(layer.weight_quantizer.scale, before[name].qparams[0])
        assert torch.equal(layer.input_quantizers[0].scale, before[name].qparams[2])
    assert any(not torch.equal(layer.bias, before[name].bias) for name, layer in network.layers.items())


def test_one_dead_channel_does_not_spoil_the_rates():
    errors = []
    for dead in (0, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        model[0].weight.data.mul_(0.05)
        model[0].weight.data[:dead] = 0
        # Correlated inputs: for uncorrelated ones, rounding to nearest is the optimum already.
        inputs = torch.randn(512, 4) @ torch.randn(4, 16)
        calibration = calibration_set(model, *inputs.split(128))
        network = calibrated_network(model, calibration, weight_bits=3, activation_bits=8, edge_bits=None)
        result = adaquant(network, calibration, AdaQuantOptions(iterations=200, mode="parallel", granularity="layer"))[
            0
        ]
        errors.append(result.error_after / result.error_before)
    assert errors[0] < 0.9 and errors[1] < 0.9


def test_uncalibrated_model_and_unknown_mode_are_errors(calibrated):
    network, calibration = calibrated
    with pytest.raises(ValueError, match="mode must be one of parallel, sequential, got 'serial'"):
        AdaQuantOptions("serial")
    with pytest.raises(ValueError, match="granularity must be one of"):
        AdaQuantOptions("parallel", "stage")
    with pytest.raises(ValueError, match=r"rounding must be one of straight_through, .*learned.*, got 'up'"):
        AdaQuantOptions(rounding="up")
    with pytest.raises(ValueError, match=r"objective must be one of squared_error, fisher.*, got 'mine'"):
        AdaQuantOptions(objective="mine")
    with pytest.raises(
        ValueError, match="objective='fisher' weights output elements by the gradient of a loss: give loss"
    ):
        AdaQuantOptions(objective="fisher")
    network.calibrated = False
    with pytest.raises(RuntimeError, match="run Calibration first"):
        adaquant(network, calibration, replace(QUICK, granularity="layer"))


@pytest.mark.parametrize(
    "name,value",
    [
        ("iterations", 0),
        ("batch_size", 0),
        ("weight_rate", -1.0),
        ("bias_rate", float("inf")),
        ("input_range_rate", float("nan")),
        ("schedule", "linear"),
        ("holdout", 0.0),
        ("holdout", 1.0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdaQuantOptions(**{name: value})


def test_papers_options_are_absolute_and_constant():
    options = AdaQuantOptions.paper()
    assert (options.granularity, options.batch_size, options.iterations, options.relative) == ("layer", 50, 1000, False)
    assert options.rate_at(0) == options.rate_at(999) == 1.0
    assert AdaQuantOptions.paper(batch_size=3).batch_size == 3
    assert AdaQuantOptions(iterations=10).rate_at(5) == pytest.approx(0.5)


def test_error_is_relative_to_the_targets_power(calibrated):
    network, _ = calibrated
    unit = find_units(network, "layer")[-1]
    x = torch.randn(20, 6)
    with torch.no_grad():
        output = unit.module(x)
    dataset = UnitDataset(recorded(UnitCall((x,), {})), recorded(output + 2.0))
    wanted = float(4.0 / (output + 2.0).square().mean())
    assert relative_error(unit, [SquaredError()], dataset, torch.arange(20)) == pytest.approx(wanted, rel=1e-4)


def run_on_a_budget(tiny_resnet, images, **options):
    model = copy.deepcopy(tiny_resnet)
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, weight_bits=2)
    with ActivationStore(**options) as store:
        adaquant(network, calibration, replace(QUICK, granularity="layer"), store)
    return store, [layer.weight for layer in network.layers.values()]


def test_what_lies_on_disk_gives_the_same_weights(tiny_resnet, images, tmp_path):
    in_memory, wanted = run_on_a_budget(tiny_resnet, images)
    budget = in_memory.most_held // 5
    on_disk, weights = run_on_a_budget(tiny_resnet, images, budget=budget, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
    assert on_disk.most_held == in_memory.most_held
    assert not list(tmp_path.iterdir())


def test_half_precision_storage_gives_nearly_the_same_errors(tiny_resnet, images):
    full, wanted = run_on_a_budget(tiny_resnet, images)
    half, weights = run_on_a_budget(tiny_resnet, images, precision=torch.bfloat16)
    assert half.most_held < 0.55 * full.most_held
    assert not all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
    gap = sum(float((a - b).detach().square().sum()) for a, b in zip(weights, wanted, strict=True))
    assert gap < 0.1 * sum(float(weight.detach().square().sum()) for weight in wanted)


@pytest.mark.parametrize("mode,most", [("parallel", 2.1), ("sequential", 3.1)])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_whole_network_is_computed_a_constant_number_of_times(images, mode, most, granularity):
    """One pass for the float targets, one for the quantized outputs; the rest is a look at a few samples, six at the
    held-out ones and one step for each unit."""
    passes: dict[int, float] = {}
    for blocks in (2, 10):
        torch.manual_seed(0)
        model = TinyResNet(blocks=blocks).eval()
        calibration = calibration_set(model, *images.repeat(4, 1, 1, 1).split(64))
        network = calibrated_network(model, calibration)
        with FlopCounterMode(display=False) as one, torch.no_grad():
            for index in range(len(calibration)):
                calibration.run(index)
        with FlopCounterMode(display=False) as all_passes:
            adaquant(network, calibration, AdaQuantOptions(mode, granularity, iterations=1, batch_size=4))
        passes[blocks] = all_passes.get_total_flops() / one.get_total_flops()
    assert 1 <= passes[2] < most and abs(passes[10] - passes[2]) < 0.1


def weights_after(tiny_resnet, images, **changes):
    model = copy.deepcopy(tiny_resnet)
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, weight_bits=3, activation_bits=3)
    adaquant(network, calibration, AdaQuantOptions(**{"iterations": 20, "batch_size": 16, **changes}))
    return torch.cat([layer.weight.detach().flatten() for layer in network.layers.values()])


def squares_of_the_first_logit(output, batch):
    return output[:, 0].square().sum()


@pytest.mark.parametrize(
    "one,other",
    [
        ({}, {"loss": squares_of_the_first_logit}),
        ({"input_range_interval": 1}, {"input_range_interval": 4}),
        ({"rounding": "learned", "rounding_strength": 0.0}, {"rounding": "learned", "rounding_strength": 50.0}),
        ({"rounding": "learned", "weight_range_rate": 0.0}, {"rounding": "learned", "weight_range_rate": 0.5}),
        ({"rounding": "learned", "rounding_rate": 0.01}, {"rounding": "learned", "rounding_rate": 0.1}),
    ],
    ids=["loss", "interval", "strength", "learned scale", "rounding rate"],
)
def test_an_option_changes_what_is_found(tiny_resnet, images, one, other):
    assert not torch.equal(weights_after(tiny_resnet, images, **one), weights_after(tiny_resnet, images, **other))


def test_float_inputs_are_mixed_in_where_quantization_is_dropped(calibrated, monkeypatch):
    network, calibration = calibrated
    seen = []

    def record(unit, dataset, *args):
        batch = dataset.take(torch.arange(4))
        seen.append((batch.call.args[0], batch.float_call and batch.float_call.args[0]))
        return optimize_unit(unit, dataset, *args)

    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", record)
    adaquant(network, calibration, AdaQuantOptions(iterations=1, drop_probability=0.5))
    assert all(exact is not None and exact.shape == quantized.shape for quantized, exact in seen)
    assert not torch.equal(*seen[-1])
    seen.clear()
    adaquant(network, calibration, AdaQuantOptions(iterations=1))
    assert all(exact is None for _, exact in seen)


def test_nothing_is_held_when_all_is_done(calibrated):
    network, calibration = calibrated
    for mode in ("parallel", "sequential"):
        store = ActivationStore()
        options = AdaQuantOptions(mode, iterations=1, drop_probability=0.5, loss=squares_of_the_first_logit)
        adaquant(network, calibration, options, store)
        assert store.most_held > 0 and store.in_memory == 0


def test_an_interrupted_unit_is_as_it_was(calibrated, monkeypatch):
    network, calibration = calibrated
    before = [tensor.clone() for layer in network.layers.values() for tensor in (layer.weight, layer.bias)]
    steps = []

    def interrupt(self, factor):
        steps.append(step(self, factor))
        if len(steps) == 5:
            raise KeyboardInterrupt

    step = Adam.step
    monkeypatch.setattr(Adam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adaquant(network, calibration, AdaQuantOptions(iterations=9, rounding="learned"))
    after = [tensor for layer in network.layers.values() for tensor in (layer.weight, layer.bias)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
