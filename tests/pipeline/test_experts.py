"""Experts that are given some of the samples each, by what the model decides, and modules whose calls differ."""

import logging

import pytest
import torch
from torch import nn

from lightning_calibtip import quantize
from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set

QUICK = {"adaquant": {"iterations": 20}}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Experts(nn.Module):
    """Two of four experts for each sample; those that no sample chooses do not run."""

    def __init__(self, norm):
        super().__init__()
        # Without biases all experts are chosen about as often, so that rounding cannot leave one without samples.
        self.first, self.router, self.last = nn.Linear(5, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), norm(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x):
        h = self.first(x)
        weights, chosen = torch.topk(self.router(h).softmax(-1), 2)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            sample, slot = (chosen == number).nonzero(as_tuple=True)
            if sample.numel():
                out.index_add_(0, sample, expert(h[sample]) * weights[sample, slot, None])
        return self.last(h + out)


class Masked(Experts):
    """One of four experts, by a mask."""

    def forward(self, x):
        h = self.first(x)
        chosen = self.router(h).argmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            out[mask] = expert(h[mask])
        return self.last(h + out)


class ChoosingExperts(Experts):
    """Each expert chooses a half of the samples, as many in the quantized model as in the float one."""

    def forward(self, x):
        h = self.first(x)
        weights = self.router(h).softmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            weight, sample = torch.topk(weights[:, number], len(x) // 2)
            out = out.index_add(0, sample, expert(h[sample]) * weight[:, None])
        return self.last(h + out)


@pytest.mark.parametrize("kind", [Experts, Masked, ChoosingExperts])
@pytest.mark.parametrize(
    "pipeline,target",
    [("sequential", "onnxruntime"), ("sequential", None), ("light", "onnxruntime"), ("mixed", "onnxruntime")],
)
def test_every_expert_is_reconstructed_where_all_batches_reach_it(kind, pipeline, target, caplog):
    torch.manual_seed(0)
    model, batches = kind(nn.GELU).eval(), [torch.randn(200, 5) for _ in range(3)]
    options = QUICK if pipeline == "sequential" else {**QUICK, "allocation": {"compression": 0.22}}
    with caplog.at_level(logging.WARNING):
        run = quantize(
            model, batches, pipeline=pipeline, weight_bits=4, target=target, options=options, trainer_options=QUIET
        )
    assert "left as it was" not in caplog.text and "not equalized" not in caplog.text
    with torch.no_grad():
        wanted, found = model(batches[0]), run.module(batches[0])
    assert (found - wanted).square().mean() < 0.1 * wanted.var()
    layers = run.module.network.layers
    if pipeline == "sequential":
        errors = {name: layer.errors for name, layer in layers.items() if layer.has_weight}
        assert all(each and each[1] <= each[0] for each in errors.values())
        # Targets of other samples would leave errors of the size of the outputs.
        assert all(each[0] < 0.1 for name, each in errors.items() if name.startswith("experts"))


@pytest.mark.parametrize("norm", [nn.GELU, lambda: nn.BatchNorm1d(16)], ids=["gelu", "batch norm"])
@pytest.mark.parametrize("pipeline", ["sequential", "light", "advanced", "mixed"])
def test_experts_that_some_batches_do_not_reach_are_left_as_they_are(pipeline, norm, caplog):
    torch.manual_seed(2)
    model, batches = Experts(norm).eval(), [torch.randn(3, 5) for _ in range(8)]
    options = QUICK if pipeline == "sequential" else {**QUICK, "allocation": {"compression": 0.24}}
    with caplog.at_level(logging.WARNING):
        run = quantize(model, batches, pipeline=pipeline, weight_bits=4, options=options, trainer_options=QUIET)
    if pipeline != "light":
        assert "left as it was before AdaQuant: calibration batch" in caplog.text
    assert "(larger batches may reach it alike)" in caplog.text
    with torch.no_grad():
        wanted, found = (torch.cat([m(batch) for batch in batches]) for m in (model, run.module))
    assert (found - wanted).square().mean() < 0.5 * wanted.var()


class CalledTwice(nn.Module):
    """A module that is called without and with an optional argument."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.step = Step()

    def forward(self, x):
        h = self.first(x)
        return self.last(self.step(h) + self.step(h, h))


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, past=None):
        return x + self.down(torch.relu(self.up(x if past is None else x + past)))


def test_a_unit_whose_calls_differ_is_left_as_it_was(caplog):
    torch.manual_seed(0)
    model, batches = CalledTwice().eval(), [torch.randn(64, 5) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        run = quantize(model, batches, pipeline="sequential", weight_bits=4, options=QUICK, trainer_options=QUIET)
    said = "its calls differ in which arguments they give"
    assert f"step: its inputs are not equalized (ValueError: {said})" in caplog.text
    assert f"step: left as it was before AdaQuant: it cannot be optimised (ValueError: {said})" in caplog.text
    with torch.no_grad():
        wanted, found = model(batches[0]), run.module(batches[0])
    assert (found - wanted).square().mean() < 0.1 * wanted.var()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_what_was_captured_of_a_unit_that_is_left_is_freed(mode):
    torch.manual_seed(2)
    model = Experts(nn.GELU).eval()
    calibration = calibration_set(model, *[torch.randn(3, 5) for _ in range(8)])
    network, store = calibrated_network(model, calibration, weight_bits=4), ActivationStore()
    results = adaquant(network, calibration, AdaQuantOptions(mode=mode, iterations=2), store)
    assert any("calls it 0 times" in result.note for result in results) and store.in_memory == 0
