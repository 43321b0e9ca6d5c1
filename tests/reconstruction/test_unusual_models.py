import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set

QUICK = AdaQuantOptions(iterations=40, batch_size=16)


def test_shared_layer_is_reconstructed_on_all_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.shared(torch.tanh(self.shared(self.first(x))))))

    torch.manual_seed(0)
    model = Shared().eval()
    calibration = calibration_set(model, *torch.randn(1024, 6).split(128))
    network = calibrated_network(model, calibration, weight_bits=2, activation_bits=4)
    options = AdaQuantOptions(iterations=200, batch_size=64)
    results = {result.name: result for result in adaquant(network, calibration, options)}
    assert results["shared"].error_after < results["shared"].error_before


def test_block_with_the_sequence_first_is_kept_whole():
    """Along the first dimension lie positions, which attention mixes: they must not be drawn as if they were
    samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)).eval()
    calibration = calibration_set(model, *torch.randn(12, 16, 8).split(4))
    network = calibrated_network(model, calibration, weight_bits=16, activation_bits=16, edge_bits=None)
    results = adaquant(network, calibration, AdaQuantOptions(iterations=1, granularity="block"))
    assert results[-1].error_before < 1e-6


class WithSkip(nn.Module):
    """A unit in the middle that takes a tuple and a mask by keyword, and a skip around everything."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, pair, *, mask, state):
            x, skip = pair
            return {"out": F.relu_(self.first(x) * mask) + self.second(skip + state["shift"])}

    def __init__(self):
        super().__init__()
        self.start, self.middle, self.end = nn.Linear(8, 8), self.Middle(), nn.Linear(16, 3)

    def forward(self, x, mask):
        early = torch.tanh(self.start(x))
        late = self.middle((early, x), mask=mask, state={"shift": torch.ones(8)})["out"]
        return self.end(torch.cat([late, early], -1))


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("options", [{}, {"drop_probability": 0.5}, {"rounding": "learned"}], ids=str)
def test_tuples_keywords_and_dicts_reach_a_unit(granularity, options):
    torch.manual_seed(0)
    model = WithSkip().eval()
    inputs, masks = torch.randn(1024, 3) @ torch.randn(3, 8), (torch.rand(1024, 8) > 0.2).float()
    batches = list(zip(inputs.split(64), masks.split(64), strict=True))
    calibration = CalibrationSet(lambda batch, index: model(*batch))
    for batch in batches:
        calibration.append(batch)
    network = calibrated_network(model, calibration, weight_bits=2, activation_bits=4, edge_bits=None)
    adaquant_options = AdaQuantOptions(granularity=granularity, blocks=["middle"], iterations=100, **options)
    results = adaquant(network, calibration, adaquant_options)
    assert [result.name for result in results] == ["start", "middle", "end"]
    assert sum(r.error_after for r in results) < sum(r.error_before for r in results)
    assert results[1].error_after < results[1].error_before or options


def test_code_that_views_a_convolutions_output_is_not_given_another_memory_format(images):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 3)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    torch.manual_seed(0)
    model = Views().eval()
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, weight_bits=2, edge_bits=None)
    for granularity in ("layer", "block"):
        adaquant(network, calibration, replace(QUICK, granularity=granularity))


class ViewsInside(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).view(len(x), -1)


def test_a_convolution_whose_own_forward_needs_contiguous_tensors_gets_them(images):
    torch.manual_seed(0)
    model = nn.Sequential(ViewsInside(1, 4, 3), nn.Linear(4 * 36, 3)).eval()
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, weight_bits=2, edge_bits=None)
    results = adaquant(network, calibration, replace(QUICK, granularity="layer"))
    assert results[0].name == "0" and results[0].error_after <= results[0].error_before


class Awkward(nn.Module):
    """Blocks whose outputs cannot be compared by rows, or not at all."""

    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.linear, self.kind = nn.Linear(6, 6), kind

        def forward(self, x):
            y = x + F.relu(self.linear(x))
            extra = {"constant": torch.ones(()), "row": torch.ones(1, 5), "integer": None, "detached": None}[self.kind]
            if self.kind == "integer":
                return (100 * y).long()
            return y.detach() if self.kind == "detached" else (y, extra)

    def __init__(self, kind):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 6), self.Block(kind), nn.Linear(6, 3)

    def forward(self, x):
        out = self.block(self.first(x))
        return self.last((out[0] if isinstance(out, tuple) else out).float())


def test_a_mistake_is_not_taken_for_a_unit_that_cannot_be_optimised(monkeypatch):
    def mistaken(*args):
        raise AttributeError("no such attribute")

    model = nn.Sequential(nn.Linear(6, 3)).eval()
    calibration = calibration_set(model, *torch.randn(64, 6).split(16))
    network = calibrated_network(model, calibration)
    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", mistaken)
    with pytest.raises(AttributeError, match="no such attribute"):
        adaquant(network, calibration, QUICK)


@pytest.mark.parametrize("kind", ["constant", "row", "integer", "detached"])
def test_a_unit_that_cannot_be_optimised_is_named_and_the_run_goes_on(kind, caplog):
    torch.manual_seed(0)
    model = Awkward(kind).eval()
    calibration = calibration_set(model, *torch.randn(64, 6).split(16))
    network = calibrated_network(model, calibration, weight_bits=3, edge_bits=None)
    before = network.layers["block.linear"].save()
    with caplog.at_level(logging.WARNING):
        results = adaquant(network, calibration, replace(QUICK, granularity="layer", blocks=["block"]))
    assert [result.name for result in results] == ["first", "block", "last"]
    if kind in ("integer", "detached"):
        assert not results[1].kept and "block: left as it was before AdaQuant: it cannot be optimised" in caplog.text
        assert torch.equal(network.layers["block.linear"].weight, before.weight)
    else:
        assert results[1].error_after <= results[1].error_before < 0.1


def test_masks_as_long_as_the_batch_reach_transformer_blocks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": layer, "head": nn.Linear(8, 2)}).eval()
    masks = torch.zeros(8, 5, dtype=torch.bool)
    calibration = CalibrationSet(lambda b, i: model["head"](model["encoder"](b, src_key_padding_mask=masks)))
    for batch in torch.randn(32, 5, 8).split(8):
        calibration.append(batch)
    network = calibrated_network(model, calibration, edge_bits=None)
    results = adaquant(network, calibration, replace(QUICK, blocks=["encoder"]))
    assert results[0].name == "encoder" and not results[0].note.startswith("it cannot")
