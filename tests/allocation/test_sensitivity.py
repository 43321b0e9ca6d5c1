import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.sensitivity import SensitivityOptions, base_bits, measure_sensitivity
from lightning_calibtip.allocation.table import read_table
from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.quantization.spec import BitWidths as B
from recipes.resnet_cifar10.model import ResNet
from tests.conftest import TinyResNet
from tests.networks import calibrated_network, calibration_set

CANDIDATES = [B(2, 8), B(4, 6), B(8, 8)]


def prepared(model, images, batch=16, **scheme):
    calibration = calibration_set(model, *images.split(batch))
    network = calibrated_network(model, calibration, **{"weight_bits": 8, "activation_bits": 8, **scheme})
    return network, calibration


def by_whole_passes(network, loss, candidates):
    """The table as measured without any replay."""
    table = {}
    for name in network.searchable_layers:
        for bits in candidates:
            if bits != base_bits(candidates):
                network.switch(name, bits)
                table[name, bits] = loss()
                network.switch(name, base_bits(candidates))
    return table


class Branches(nn.Module):
    """An early output that only the end reads, a layer that is used twice, and a dict for an output."""

    def __init__(self):
        super().__init__()
        self.stem, self.side = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.twice, self.deep = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu_()
        side = self.side(x)
        x = self.twice(self.deep(self.twice(x)).relu())
        return {"logits": self.head(x.mean((2, 3))), "aside": self.aside(side.mean((2, 3)))}


@pytest.mark.parametrize("make", [TinyResNet, Branches])
@pytest.mark.parametrize("budget", [None, 1])
def test_replayed_measurements_equal_those_of_whole_passes(make, budget, images):
    network, calibration = prepared(make().eval(), images)
    # Divergences of an untrained network are near what float32 resolves.
    loss = Loss(network, calibration, "mse")
    with ActivationStore(budget) as store:
        table = measure_sensitivity(network, loss, CANDIDATES, store=store)
    assert list(table.losses) == [name for name in network.structure.calls_of if name in network.searchable_layers]
    assert all(layer.config.bit_widths == B(8, 8) for layer in network.layers.values())
    for (name, bits), measured in by_whole_passes(network, loss, CANDIDATES).items():
        assert table.losses[name][bits] == pytest.approx(measured, rel=2e-2, abs=1e-8), (name, bits)
    assert table.base_loss == pytest.approx(loss(), rel=2e-2, abs=1e-8)


def test_the_prefix_of_a_layer_is_not_computed_again(images, monkeypatch):
    """Of what whole passes cost, replay costs about half, and the deeper the network the nearer to it."""
    counted, convolve = [], nn.Conv2d._conv_forward

    def counting(self, x, weight, bias):
        output = convolve(self, x, weight, bias)
        counted.append(output.numel() * weight[0].numel())
        return output

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counting)
    candidates = [B(2, 8), B(3, 8), B(4, 8)]
    shares = []
    for depth in (2, 6):
        model = ResNet(depth).eval()
        network, calibration = prepared(model, images[:16].repeat(1, 3, 1, 1), batch=2, observer="minmax")
        loss = Loss(network, calibration)
        counted.clear()
        loss()
        # The base, and two candidates beside it for each layer.
        whole = sum(counted) * (1 + 2 * len(network.searchable_layers))
        counted.clear()
        measure_sensitivity(network, loss, candidates)
        shares.append(sum(counted) / whole)
    assert shares[1] < shares[0] < 0.8 and shares[1] < 0.62


class Saved(nn.Module):
    """What the model returns beside its logits was left in an attribute by a part."""

    def __init__(self):
        super().__init__()
        self.part, self.b = nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)
        self.part.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.saved = output.mean((2, 3)) + 1

    def forward(self, x):
        x = self.b(self.part(x))
        return self.head(x.mean((2, 3))), self.saved


class LeavesTheGraph(nn.Module):
    """A number is taken out of a layer's output, by which a later one is scaled."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x)
        size = x.norm().item()
        return self.head(self.c(self.b(x) * size / 100).mean((2, 3)))


class Aliased(nn.Module):
    """An in-place activation on what a dropout returned changes the shortcut too."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.relu = nn.Conv2d(1, 4, 3), nn.Dropout(), nn.ReLU(inplace=True)
        self.b, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.relu(self.drop(x)))
        return self.head((x + y).mean((2, 3)))


class Nested(nn.Linear):
    """A layer with layers inside."""

    def __init__(self):
        super().__init__(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "make", [Saved, LeavesTheGraph, Aliased, lambda: nn.Sequential(nn.Linear(8, 8), Nested(), nn.Linear(8, 3))]
)
def test_models_that_replay_does_not_serve_are_measured_by_whole_passes(make, images):
    torch.manual_seed(0)
    model = make().eval()
    inputs = images if not isinstance(model, nn.Sequential) else torch.randn(32, 8)
    network, calibration = prepared(model, inputs, edge_bits=None)
    loss = Loss(network, calibration, "mse")
    table = measure_sensitivity(network, loss, CANDIDATES)
    assert table.losses.keys() == set(network.searchable_layers)
    for (name, bits), measured in by_whole_passes(network, loss, CANDIDATES).items():
        assert table.losses[name][bits] == pytest.approx(measured, rel=2e-2, abs=1e-8), (name, bits)


def test_a_layer_that_the_first_batch_does_not_reach_is_measured(images):
    class Sometimes(TinyResNet):
        def forward(self, x):
            x = self.relu(self.norm(self.stem(x)))
            return self.head(self.blocks(x).mean((2, 3)) if len(x) < 16 else self.blocks[0](x).mean((2, 3)))

    network, calibration = prepared(Sometimes().eval(), images[:40], batch=16)
    table = measure_sensitivity(network, Loss(network, calibration), CANDIDATES)
    assert "blocks.1.conv1" in table.losses and table.losses.keys() == set(network.searchable_layers)


def test_base_is_the_widest_of_both_and_not_measured(images):
    assert base_bits([B(2, 8), B(8, 2)]) == B(8, 8)
    network, calibration = prepared(TinyResNet().eval(), images)
    table = measure_sensitivity(network, Loss(network, calibration), [B(2, 8), B(8, 2)])
    assert table.conditions.base == B(8, 8)
    assert all(of_layer.keys() == {B(2, 8), B(8, 2)} for of_layer in table.losses.values())
    assert base_bits([B(2, None), B(4, 8)]) == B(4, None)


def test_candidates_of_one_effective_format_are_measured_once(images, monkeypatch):
    network, calibration = prepared(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)),
                                    torch.randint(0, 9, (8, 3)), edge_bits=None)  # fmt: skip
    counted, measured = [], Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda self, run=None: counted.append(None) or measured(self, run))
    table = measure_sensitivity(network, Loss(network, calibration), [B(2, 4), B(2, 8), B(8, 8)])
    # An embedding has no input to quantize.
    assert table.losses["0"][B(2, 4)] == table.losses["0"][B(2, 8)] and len(counted) == 1 + 1 + 2


def test_a_killed_run_goes_on_and_measures_nothing_twice(images, tmp_path, monkeypatch):
    network, calibration = prepared(TinyResNet().eval(), images)
    initial = {name: layer.save() for name, layer in network.layers.items()}
    loss = Loss(network, calibration)
    whole = measure_sensitivity(network, loss, CANDIDATES)
    for kill_at in (0, 1, 4, 8):
        for name, layer in network.layers.items():
            layer.variants.clear()
            layer.restore(initial[name])
        path = tmp_path / f"{kill_at}.csv"
        counted = 0

        def counting(self, *args, call=Loss.__call__, stop=kill_at):
            nonlocal counted
            counted += 1
            if counted == stop + 1:
                raise KeyboardInterrupt
            return call(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Loss, "__call__", counting)
            with pytest.raises(KeyboardInterrupt):
                measure_sensitivity(network, loss, CANDIDATES, path)
        for name, layer in network.layers.items():
            layer.variants.clear()
            layer.restore(initial[name])
        with monkeypatch.context() as patch:
            counted = -100
            patch.setattr(Loss, "__call__", counting)
            table = measure_sensitivity(network, loss, CANDIDATES, path)
            assert counted + 100 == 1 + 4 * 2 - kill_at
        assert table == read_table(path) and table.conditions == whole.conditions
        assert list(table.losses) == list(whole.losses)
        for name, of_layer in whole.losses.items():
            assert table.losses[name] == pytest.approx(of_layer, rel=1e-2, abs=1e-6)


def test_a_layer_whose_loss_is_not_finite_is_named(images):
    network, calibration = prepared(TinyResNet().eval(), images)
    calls = iter(range(100))
    loss = Loss(network, calibration, lambda output, batch: torch.tensor(float("nan") if next(calls) == 9 else 1.0))
    with pytest.raises(
        ValueError, match=r"the loss with blocks.0.conv2 at 2 bits of weight and 8 of activation is nan"
    ):
        measure_sensitivity(network, loss, CANDIDATES)


@pytest.mark.parametrize(("samples", "message"), [(0, "samples must be an integer of at least 1, got 0")])
def test_bad_settings_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        SensitivityOptions(samples=samples)
    with pytest.raises(ValueError, match=r"metric must be kl, mse.* or a function"):
        SensitivityOptions(metric="accuracy")
