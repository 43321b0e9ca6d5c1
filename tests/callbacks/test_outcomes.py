"""What stages say became of them."""

from torch import nn

from lightning_calibtip import AdaQuant, BatchNormTuning, BiasTuning, BitAllocation, Calibration, QuantizationModule
from lightning_calibtip.callbacks.equalization import Equalization


def test_stages_say_what_they_kept_and_what_they_put_back(tiny_classifier, loader, make_trainer):
    stages = [
        Calibration(), BitAllocation(compression=0.2, candidates=[2, 4, 8], checks=0), Equalization(),
        BatchNormTuning(), AdaQuant(iterations=3, granularity="layer"), BiasTuning(rate=1e6, epochs=1),
    ]  # fmt: skip
    make_trainer(*stages).fit(QuantizationModule(tiny_classifier, weight_bits=4, activation_bits=4), loader)
    calibration, allocation, equalization, norms, adaquant, biases = (stage.result.outcome for stage in stages)
    assert (
        calibration
        == f"Ranges of {stages[0].figures['layers']:.0f} layers were chosen (activations by 'mse', weights by 'mse')."
    )
    assert f"the loss rises by {stages[1].figures['measured_loss']:.4g}" in allocation
    equalized, inputs = (int(stages[2].figures[name]) for name in ("equalized", "inputs"))
    assert equalization.startswith(f"Channels of {equalized or inputs} inputs were")
    before, after = (stages[3].figures[f"divergence_{when}"] for when in ("before", "after"))
    change = f"fell from {before:.4g} to {after:.4g}" if after < before else "left as they were"
    assert norms.startswith("Statistics of 5 folded BatchNorms were") and change in norms
    units, restored = (int(stages[4].figures[name]) for name in ("units", "restored"))
    assert adaquant.startswith(f"{units - restored} of {units} units w")
    assert "Biases were left as they were: it did not surely lower the held-out divergence" in biases


def test_stages_say_that_there_was_nothing_to_do(make_trainer, images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    stages = [Calibration(), BatchNormTuning(), BiasTuning(epochs=1)]
    make_trainer(*stages).fit(QuantizationModule(net, weight_bits=4), [images])
    assert stages[1].result.outcome.endswith("nothing to tune.")
    assert stages[2].result.outcome == "Biases were left as they were: no layer has a bias."
