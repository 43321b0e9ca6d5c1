import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_calibtip import Calibration, QuantizationModule, RangeOptions, run_stages
from lightning_calibtip.calibration.logits import measure_divergences
from lightning_calibtip.tuning import joint_search
from lightning_calibtip.tuning.joint_search import EXPONENTS, search_jointly
from tests.networks import calibrated_network, calibration_set

ROWS = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def network_of(model, **scheme):
    calibration = calibration_set(model, *ROWS.split(32))
    formats = {"weight_bits": 3, "activation_bits": 3, "edge_bits": None, **scheme}
    return calibrated_network(model, calibration, **formats), calibration


@pytest.mark.parametrize("scheme, most", [
    ({}, 0.9), ({"target": "onnxruntime"}, 0.9), ({"activation_bits": None}, 0.9),
    # Three steps, which were good already.
    ({"weight_bits": None}, 0.98),
])  # fmt: skip
def test_all_steps_together_come_closer_to_the_float_model(scheme, most):
    network, calibration = network_of(small(), **scheme)
    options = RangeOptions(search="joint", joint_evaluations=400)
    result = search_jointly(network, calibration, options)
    assert result.divergence_after < most * result.divergence_before
    assert set(EXPONENTS) <= set(result.divergences) and 2 <= result.p <= 4
    assert result.divergences[result.p] == min(result.divergences.values())
    # Powell goes on from the best exponent.
    assert result.divergence_after < result.divergences[result.p]


@pytest.fixture
def measured(monkeypatch):
    """How often the network was measured, by an entry each."""
    found = []
    monkeypatch.setattr(
        joint_search, "measure_divergences", lambda *args: found.append(1) or measure_divergences(*args)
    )
    return found


def test_no_more_evaluations_than_allowed_and_never_worse(measured):
    for most in (2, 5, 40):
        network, calibration = network_of(small())
        before = [quantizer.scale.clone() for quantizer in network.quantizers]
        measured.clear()
        result = search_jointly(network, calibration, RangeOptions(search="joint", joint_evaluations=most))
        assert result.evaluations == len(measured) <= most
        assert result.divergence_after <= result.divergence_before
        if result.divergence_after == result.divergence_before:
            assert all(torch.equal(a, b.scale) for a, b in zip(before, network.quantizers, strict=True))


def test_the_stage_searches_and_says_what_it_found():
    progress = []
    stage = Calibration(search="joint", joint_evaluations=60, joint_samples=64)
    stage.progress = lambda *args: progress.append(args)
    module = QuantizationModule(small(), weight_bits=3, activation_bits=3, edge_bits=None)
    run_stages(module, [stage], ROWS.split(32))
    assert stage.figures["divergence_after"] < stage.figures["divergence_before"]
    assert 2 <= stage.figures["evaluations"] <= 60
    plain = QuantizationModule(small(), weight_bits=3, activation_bits=3, edge_bits=None)
    run_stages(plain, [Calibration()], ROWS.split(32))
    assert not torch.equal(module.network.quantizers[0].scale, plain.network.quantizers[0].scale)


class Again(nn.Module):
    """Calls a layer more often where a batch has many rows, so that it cannot be replayed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(1 + len(x) // 32):
            x = self.middle(x).relu()
        return self.last(x)


@pytest.mark.parametrize("make, is_replayed", [(small, True), (lambda: Again().eval(), False)])
def test_what_comes_before_the_layer_that_changes_is_not_computed_again(make, is_replayed, monkeypatch):
    options = RangeOptions(search="joint", joint_evaluations=120, joint_iterations=2)
    found, flops = {}, {}
    for replays in (True, False):
        model = make()
        calibration = calibration_set(model, ROWS[:16], *ROWS[16:].split(40))
        network = calibrated_network(model, calibration, weight_bits=3, activation_bits=3, edge_bits=None)
        if not replays:
            monkeypatch.setattr(joint_search.ReplayedPrefix, "run_at", lambda self, factors: None)
        with FlopCounterMode(display=False) as counter:
            result = search_jointly(network, calibration, options)
        flops[replays] = counter.get_total_flops()
        found[replays] = (result.divergence_after, [quantizer.scale.clone() for quantizer in network.quantizers])
    assert found[True][0] == found[False][0]
    assert all(map(torch.equal, found[True][1], found[False][1]))
    assert (flops[True] < 0.8 * flops[False]) == is_replayed


def test_a_killed_search_goes_on_without_measuring_again(tmp_path, measured):
    options = RangeOptions(search="joint", joint_evaluations=60)
    network, calibration = network_of(small())
    wanted = search_jointly(network, calibration, options)
    scales = [quantizer.scale.clone() for quantizer in network.quantizers]

    def stop(done, most, what):
        if done == 25:
            raise KeyboardInterrupt

    network, calibration = network_of(small())
    with pytest.raises(KeyboardInterrupt):
        search_jointly(network, calibration, options, stop, tmp_path / "state")
    network, calibration = network_of(small())
    measured.clear()
    found = search_jointly(network, calibration, options, state_folder=tmp_path / "state")
    assert found.evaluations == wanted.evaluations and found.p == wanted.p
    assert found.divergence_after == pytest.approx(wanted.divergence_after)
    assert all(torch.equal(a, b.scale) for a, b in zip(scales, network.quantizers, strict=True))
    assert len(measured) == wanted.evaluations - 25
    network, calibration = network_of(small(), weight_bits=4)
    with pytest.raises(ValueError, match=r"joint_search\.json holds an unfinished joint search of another model"):
        search_jointly(network, calibration, options, state_folder=tmp_path / "state")
    (tmp_path / "state" / "joint_search.json").write_text("[]")
    with pytest.raises(ValueError, match=r"joint_search\.json is not the state of a joint search"):
        search_jointly(network, calibration, options, state_folder=tmp_path / "state")


def test_the_stage_keeps_its_measurements_until_the_run_is_written(tmp_path):
    module = QuantizationModule(small(), weight_bits=3, activation_bits=3, edge_bits=None)
    stage = Calibration(search="joint", joint_evaluations=10, state_folder=tmp_path / "state")
    run = run_stages(module, [stage], ROWS.split(32))
    assert (tmp_path / "state" / "joint_search.json").is_file()
    run.save(tmp_path / "quantized.ckpt")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("options, message", [
    ({"search": "both"}, "search must be one of each, joint, got 'both'"),
    ({"search": "joint", "observer": "minmax"}, "observer must be one of mse, lp, percentile, got 'minmax'"),
    ({"joint_samples": 0}, "joint_samples must be an integer of at least 1, got 0"),
    ({"joint_evaluations": 1}, "joint_evaluations must be an integer of at least 2, got 1"),
])  # fmt: skip
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**options)
