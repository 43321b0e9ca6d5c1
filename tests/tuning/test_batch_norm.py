import pytest
import torch
from torch import nn

from lightning_calibtip.tuning.batch_norm import BatchNormTuningOptions, tune_batch_norm
from tests.conftest import randomize_batch_norms
from tests.networks import calibrated_network, calibration_set


def channel_statistics(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3), correction=0)


@pytest.fixture
def wide_net(generator):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    randomize_batch_norms(net, generator)
    return net


@pytest.fixture
def always_better(monkeypatch):
    """Whatever tuning does counts as an improvement, so that its result can be looked at."""
    divergences = iter([2.0, 1.0])
    monkeypatch.setattr(
        "lightning_calibtip.tuning.batch_norm.measure_divergences", lambda *args: torch.tensor([next(divergences)])
    )


@pytest.mark.usefixtures("always_better")
@pytest.mark.parametrize("group_size", [None, 5, 32])
def test_channels_get_the_float_models_statistics_and_integers_stay(wide_net, images, group_size):
    calibration = calibration_set(wide_net, *images.split(16))
    network = calibrated_network(
        wide_net, calibration, weight_bits=2, activation_bits=3, edge_bits=None, group_size=group_size
    )
    with network.quantized(False):
        wanted = {name: channel_statistics(wide_net, name, images) for name in ("0", "3")}
    before = {name: layer.integer_weight() for name, layer in network.layers.items()}
    errors = [float((channel_statistics(wide_net, "3", images)[1] - wanted["3"][1]).abs().max())]
    result = tune_batch_norm(network, calibration)
    assert result.layers == ("0", "3")
    for name in ("0", "3"):
        for got, target in zip(channel_statistics(wide_net, name, images), wanted[name], strict=True):
            torch.testing.assert_close(got, target, rtol=1e-3, atol=1e-4)
    assert errors[0] > 0.01
    for name, layer in network.layers.items():
        assert torch.equal(layer.integer_weight(), before[name])


@pytest.mark.usefixtures("always_better")
def test_training_reference_is_gamma_and_beta(wide_net, images):
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, weight_bits=2, edge_bits=None)
    tune_batch_norm(network, calibration, BatchNormTuningOptions("training"))
    norm = wide_net.get_submodule("4")
    mean, deviation = channel_statistics(wide_net, "3", images)
    torch.testing.assert_close(mean, norm.bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(deviation, norm.deviation, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("always_better")
def test_without_a_scale_per_channel_only_the_mean_is_corrected(wide_net, images):
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, weight_bits=3, edge_bits=None, per_channel=False)
    with network.quantized(False):
        wanted, _ = channel_statistics(wide_net, "3", images)
    scale = network.layers["3"].weight_quantizer.scale.clone()
    assert tune_batch_norm(network, calibration).kept
    torch.testing.assert_close(channel_statistics(wide_net, "3", images)[0], wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(network.layers["3"].weight_quantizer.scale, scale)


@pytest.mark.parametrize(("target", "rounded"), [("onnxruntime", True), (None, False)])
def test_what_stands_in_for_a_tuned_layer_is_what_it_computes(generator, images, monkeypatch, target, rounded):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Flatten(), nn.Linear(128, 4),
    ).eval()  # fmt: skip
    randomize_batch_norms(net, generator)
    calibration = calibration_set(net, *images.split(16))
    network = calibrated_network(net, calibration, weight_bits=2, activation_bits=8, edge_bits=None, target=target)
    assert (network.layers["0"].output_quantizer is not None) == rounded
    gaps = []

    def measure(calibration, logits, index, run):
        gaps.append(max(float((run(i) - calibration.run(i)).abs().mean()) for i in index))
        return torch.tensor([1.0 / len(gaps)])

    monkeypatch.setattr("lightning_calibtip.tuning.batch_norm.measure_divergences", measure)
    assert tune_batch_norm(network, calibration).kept
    # Before, nothing stands in. Afterwards floats differ by the order of operations, so that few integers may differ by
    # one: on average by far less than rounding, which costs more than 1e-3 here.
    assert gaps[0] == 0 and gaps[1] < 5e-4


def test_a_result_farther_from_float_is_taken_back(wide_net, images, monkeypatch):
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, weight_bits=2, edge_bits=None)
    before = {name: layer.save() for name, layer in network.layers.items()}
    divergences = iter([1.0, 2.0])
    monkeypatch.setattr(
        "lightning_calibtip.tuning.batch_norm.measure_divergences", lambda *args: torch.tensor([next(divergences)])
    )
    result = tune_batch_norm(network, calibration)
    assert not result.kept and result.divergence_after == 1.0
    for name, layer in network.layers.items():
        assert torch.equal(layer.weight, before[name].weight) and torch.equal(layer.bias, before[name].bias)


def test_an_error_on_the_way_leaves_the_model_as_it_was(wide_net, images):
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, weight_bits=2, edge_bits=None, group_size=4)
    before, wanted = {name: layer.save() for name, layer in network.layers.items()}, wide_net(images)

    def stop_at_second(done, total, what):
        if done == 1:
            # The first layer is tuned by now.
            assert not torch.equal(network.layers["0"].bias, before["0"].bias)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_batch_norm(network, calibration, progress=stop_at_second)
    for name, layer in network.layers.items():
        assert torch.equal(layer.weight, before[name].weight) and torch.equal(layer.bias, before[name].bias)
        assert torch.equal(layer.weight_quantizer.scale, before[name].qparams[0])
    assert torch.equal(wide_net(images), wanted)


@pytest.mark.usefixtures("always_better")
@pytest.mark.parametrize("scheme", [{"weight_bits": None, "activation_bits": 3}, {"activation_bits": None}])
def test_layers_with_float_weights_or_float_inputs_are_corrected(wide_net, images, scheme):
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, **{"weight_bits": 2, "edge_bits": None, **scheme})
    with network.quantized(False):
        mean, deviation = channel_statistics(wide_net, "3", images)
    before = network.layers["3"].weight.clone()
    assert tune_batch_norm(network, calibration).layers == ("0", "3")
    found = channel_statistics(wide_net, "3", images)
    torch.testing.assert_close(found[0], mean, rtol=1e-3, atol=1e-4)
    if scheme.get("weight_bits", 2) is None:
        assert torch.equal(network.layers["3"].weight, before), "a float weight has no scale to stretch"
    else:
        torch.testing.assert_close(found[1], deviation, rtol=1e-3, atol=1e-4)


def test_dead_channel_stays_finite(wide_net, images):
    wide_net[1].weight.data[0] = 0
    wide_net[3].weight.data[2] = 0
    calibration = calibration_set(wide_net, images)
    network = calibrated_network(wide_net, calibration, weight_bits=4, edge_bits=None)
    tune_batch_norm(network, calibration)
    assert torch.isfinite(wide_net(images)).all()


def test_model_without_batch_norm_is_left_as_it_is(images):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    calibration = calibration_set(net, images)
    network = calibrated_network(net, calibration)
    wanted = net(images)
    assert tune_batch_norm(network, calibration).layers == ()
    assert torch.equal(net(images), wanted)


def test_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="reference must be one of float, training, got 'batch'"):
        BatchNormTuningOptions("batch")


def test_a_batch_that_calls_a_layer_more_often_is_run_as_a_whole(images):
    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(64, 4)

        def forward(self, x):
            for _ in range(1 if len(x) == 16 else 2):
                x = self.norm(self.conv(x))
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    model = Repeating().eval()
    calibration = calibration_set(model, images[:16], images[16:24])
    network = calibrated_network(model, calibration, weight_bits=2, activation_bits=3, edge_bits=None)
    result = tune_batch_norm(network, calibration)
    assert result.layers == ("conv",) and result.divergence_after <= result.divergence_before
