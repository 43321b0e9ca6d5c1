"""SPARQ against a reference in plain Python, and in the pipelines."""

import random

import pytest
import torch
from torch import nn

from lightning_calibtip import QuantizationModule, QuantizationScheme, quantize
from lightning_calibtip.quantization.sparq import trim, trim_pairs

PLACES = {5: (0, 1, 2, 3, 4), 3: (0, 2, 4), 2: (0, 4)}


def reference(value: int, windows: int) -> int:
    """Bits as a text: the window at the first place that holds the leading one, and the bit below it rounds up."""
    bits = f"{value:08b}"
    place = next(place for place in PLACES[windows] if "1" not in bits[: 4 - place])
    kept = int(bits[4 - place : 8 - place], 2)
    if place and bits[8 - place] == "1":
        kept = min(kept + 1, 15)
    return kept * 2**place


@pytest.mark.parametrize("windows", PLACES)
def test_values_and_pairs_are_those_of_the_reference(windows):
    rng = random.Random(0)
    pairs = [(rng.choice([0, rng.randrange(256)]), rng.randrange(256)) for _ in range(10_000)]
    wanted = [(a if b == 0 else reference(a, windows), b if a == 0 else reference(b, windows)) for a, b in pairs]
    found = trim_pairs(torch.tensor(pairs), axis=-1, windows=windows)
    assert found.tolist() == [list(pair) for pair in wanted]
    # Along another dimension, with a last one that has no neighbour.
    column = trim_pairs(torch.tensor([[a, b, 77] for a, b in pairs]).T, axis=0, windows=windows)
    assert column[:2].T.tolist() == found.tolist() and set(column[2].tolist()) == {77}
    everything = torch.arange(256)
    assert trim(everything, windows).tolist() == [reference(value, windows) for value in range(256)]


SCHEME = {"activation_quantizer": "sparq", "overrides": {"net.stem": (8, None)}}


@pytest.mark.parametrize("pipeline", ["calibrate", "light", "advanced", "sequential"])
def test_pipelines_take_it_and_the_report_shows_its_shares(pipeline, tiny_classifier, loader, images, tmp_path):
    options = {
        "adaquant": {"iterations": 2}, "bias_tuning": {"epochs": 1},
        "allocation": {"candidates": [(4, 8), (8, 8)], "compression": 0.2},
    }  # fmt: skip
    settings = {"trainer_options": {"accelerator": "cpu"}, **SCHEME, "activation_options": {"windows": 3}}
    run = quantize(tiny_classifier, loader, loader, pipeline, options, weight_bits=8, **settings)
    quantizer = run.module.network.layers["net.blocks.0.conv1"].input_quantizers[0]
    assert quantizer.windows == 3 and quantizer.axis == -3 and float(quantizer.zero_point) == 0
    with torch.no_grad():
        x = torch.relu(torch.randn(4, 6, 8, 8))
        integers = quantizer.fake_quantize(x) / quantizer.scale
        torch.testing.assert_close(integers, quantizer.encode(x).float(), rtol=1e-5, atol=1e-4)
        # What remains has four bits at one of three places, or is beside a zero.
        whole = integers.round().int()
        neighbour = whole.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        fits = sum((whole % 2**place == 0) & (whole < 16 * 2**place) for place in (0, 2, 4)) > 0
        assert bool((fits | (neighbour == 0)).all()) and bool((whole > 15).any())
        kept = run.module(images)
    item = next(item for item in run.items if item.name == "shares")
    assert item.columns == ["tensor", "zeros", "cut"] and all(0 <= row[2] < 1 for row in item.rows)
    run.save(tmp_path / "sparq.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "sparq.ckpt", model=tiny_classifier)
    with torch.no_grad():
        assert torch.equal(loaded(images), kept)


def test_what_it_cannot_be_is_refused_by_name(tiny_classifier, loader, images):
    cpu = {"trainer_options": {"accelerator": "cpu"}, "activation_quantizer": "sparq"}
    with pytest.raises(ValueError, match=r"net\.stem input: values down to -.* are never negative"):
        quantize(tiny_classifier, loader, None, "calibrate", **cpu)
    with pytest.raises(ValueError, match="a simulation that no engine runs: give target=None"):
        QuantizationScheme(activation_quantizer="sparq", target="onnxruntime")
    with pytest.raises(ValueError, match="windows must be one of 5, 3, 2, got 4"):
        QuantizationScheme(activation_quantizer="sparq", activation_options={"windows": 4})
    with pytest.raises(ValueError, match="AffineQuantizer has no options, got windows"):
        QuantizationScheme(activation_options={"windows": 3})
    with pytest.raises(ValueError, match="0 input: sparq cuts unsigned activations of 8 bits"):
        quantize(
            nn.Sequential(nn.Linear(2, 2)),
            [torch.rand(4, 2)],
            None,
            "calibrate",
            activation_bits=4,
            edge_bits=None,
            **cpu,
        )
