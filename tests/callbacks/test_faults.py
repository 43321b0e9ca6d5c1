"""What goes wrong in models and data is said by its name, and as early as it can be known."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_calibtip import (
    AdaQuant,
    BatchNormTuning,
    BiasTuning,
    BitAllocation,
    Calibration,
    Equalization,
    QuantizationModule,
    quantize,
    run_stages,
)
from lightning_calibtip.calibration.finite import require_finite_outputs
from lightning_calibtip.callbacks.stage import Stage, StageResult
from lightning_calibtip.network.layers import QuantizedLayer

ROWS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
CPU = {"accelerator": "cpu"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_refused(dtype):
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"0: its weight is {kind}, .*: quantize model.float\(\)"):
        QuantizationModule(net().to(dtype))


def test_batch_norms_are_folded_under_autocast_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    # An offset beside which its deviation is small: 16 bits do not tell one rounding of it from another.
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)
        model[1].running_var.fill_(1e-3)
    images = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    module = QuantizationModule(model)
    run_stages(module, [Calibration()], images.split(8), trainer_options={**CPU, "precision": "bf16-mixed"})
    assert [fold.normalization for fold in module.network.plan.folds] == ["1"]


class Breaking(Stage):
    """Writes a NaN where no error shows."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def run(self, module):
        with torch.no_grad():
            self.change(module.network.layers["3"])
        return StageResult()


@pytest.mark.parametrize("change, what", [
    (lambda layer: layer.bias[0].fill_(float("nan")), "bias"),
    (lambda layer: layer.weight_quantizer.scale[0].fill_(float("inf")), "scale of 3 weight"),
])  # fmt: skip
def test_a_model_that_gives_nan_only_when_quantized_is_an_error_that_names_the_layer(change, what):
    message = (
        f"has NaN or infinity, which the float model's has not: first that of layer 3, whose {what} has such values"
    )
    module = QuantizationModule(net())
    with pytest.raises(FloatingPointError, match=message):
        run_stages(module, [Calibration(), Breaking(change)], ROWS.split(8), trainer_options=CPU)
    # The batches are not held on to.
    assert not module.calibration.batches


@pytest.mark.parametrize("pipeline", ["calibrate", "sequential"])
def test_a_pipeline_does_not_end_with_a_model_that_gives_nan(monkeypatch, pipeline):
    fit_ranges = QuantizedLayer.fit_ranges

    def ruin(layer):
        fit_ranges(layer)
        if layer.name == "0":
            layer.weight_quantizer.scale[0].fill_(float("nan"))

    monkeypatch.setattr(QuantizedLayer, "fit_ranges", ruin)
    with pytest.raises(FloatingPointError, match="first that of layer 0, whose scale of 0 weight"):
        quantize(net(), ROWS.split(8), pipeline=pipeline, trainer_options=CPU)


def test_infinity_that_the_float_model_gives_too_is_the_user_s_own():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).masked_fill(torch.tensor([True, False, False]), -torch.inf)

    run = run_stages(QuantizationModule(Masked().eval()), [Calibration()], ROWS.split(8), trainer_options=CPU)
    assert run.module.network.calibrated


@pytest.mark.parametrize("position", [0, 1])
def test_an_empty_batch_is_named(position):
    batches = list(ROWS.split(8))
    batches[position] = ROWS[:0]
    with pytest.raises(ValueError, match=f"Calibration batch {position} holds no samples: leave empty batches out"):
        quantize(net(), batches, pipeline="calibrate", trainer_options=CPU)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


def test_an_output_may_be_a_dataclass():
    options = {"adaquant": {"iterations": 2}}
    run = quantize(Wrapped(Output).eval(), ROWS.split(8), options=options, trainer_options=CPU)
    assert run.stages[-1].name == "BiasTuning" and run.stages[-1].figures["divergence_before"] > 0


@pytest.mark.parametrize("stage", [
    Equalization(), BatchNormTuning(), BiasTuning(), BitAllocation(compression=0.3, candidates=[4, 8]),
])  # fmt: skip
def test_an_output_without_logits_is_refused_before_anything_is_reconstructed(monkeypatch, stage):
    monkeypatch.setattr(AdaQuant, "run", lambda *args: pytest.fail("too late"))
    module = QuantizationModule(Wrapped(lambda output: output.argmax(1)).eval())
    with pytest.raises(TypeError, match="holds no logits to compare"):
        run_stages(module, [Calibration(), AdaQuant(), stage], ROWS.split(8), trainer_options=CPU)


def test_stages_that_compare_no_logits_need_none():
    module = QuantizationModule(Wrapped(lambda output: output.argmax(1)).eval())
    run_stages(module, [Calibration(), AdaQuant(iterations=2)], ROWS.split(8), trainer_options=CPU)


class Logarithm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.shift = nn.Linear(4, 3), 1.0

    def forward(self, x):
        y = self.fc(x)
        return torch.log(y.abs() + self.shift)


def test_nan_of_an_operation_names_no_layer_to_leave_in_float(monkeypatch):
    module = QuantizationModule(Logarithm().eval())
    run_stages(module, [Calibration()], ROWS.split(8), trainer_options=CPU)
    module.calibration.append(ROWS[:8])
    forward = module.model.forward
    layer = module.network.layers["fc"]
    monkeypatch.setattr(module.model, "forward", lambda x: forward(x) * (torch.nan if layer.enabled else 1))
    with pytest.raises(FloatingPointError, match=r"of no module's own\. Give the layers before it more bits"):
        require_finite_outputs(module.network, module.calibration)


class Extra:
    pass


class WithObjects(QuantizationModule):
    def __init__(self, model, extra=None, **options):
        super().__init__(model, **options)
        self.save_hyperparameters({"extra": extra})


def test_hyperparameters_of_a_subclass_may_be_objects(tmp_path):
    run = run_stages(WithObjects(net(), Extra()), [Calibration()], ROWS.split(8), trainer_options=CPU)
    run.save(tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match=r"objects.ckpt holds Python objects besides tensors.*pass weights_only=False"):
        WithObjects.load_from_checkpoint(tmp_path / "objects.ckpt", model=net())
    loaded = WithObjects.load_from_checkpoint(tmp_path / "objects.ckpt", model=net(), weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(ROWS), run.module(ROWS))


def test_a_checkpoint_may_go_to_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_stages(QuantizationModule(net()), [Calibration()], ROWS.split(8), trainer_options=CPU)
    run.save("memory://bucket/quantized.ckpt")
    assert not list(tmp_path.iterdir())
    loaded = QuantizationModule.load_from_checkpoint("memory://bucket/quantized.ckpt", model=net())
    with torch.no_grad():
        assert torch.equal(loaded(ROWS), run.module(ROWS))
