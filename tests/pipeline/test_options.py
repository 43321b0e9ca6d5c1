import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_calibtip import (
    AdaQuantOptions,
    AllocationOptions,
    BatchNormTuningOptions,
    BiasTuningOptions,
    PipelineOptions,
    RangeOptions,
    StorageOptions,
)


def labelled_loss(output, batch):
    return output.sum()


def test_nested_mappings_become_the_dataclasses_of_their_stages():
    options = PipelineOptions.of(
        {
            "calibration": {"percentile": 99.5},
            "batch_norm_tuning": {"reference": "training"},
            "adaquant": {"iterations": 7},
            "preparation": {"batch_size": 4},
            "allocation": {"compression": 0.13, "candidates": [4, 8]},
            "bias_tuning": {"epochs": 2},
            "storage": {"activation_budget": "2GB"},
            "state_folder": "runs/state",
            "seed": 3,
        }
    )
    assert options.calibration == RangeOptions(percentile=99.5)
    assert options.batch_norm_tuning == BatchNormTuningOptions(reference="training")
    assert options.adaquant == AdaQuantOptions(iterations=7)
    assert options.preparation == AdaQuantOptions(iterations=100, batch_size=4)
    assert options.allocation == AllocationOptions(compression=0.13, candidates=[4, 8])
    assert options.bias_tuning == BiasTuningOptions(epochs=2)
    assert options.storage == StorageOptions(activation_budget="2GB")
    assert options.state_folder == Path("runs/state") and options.seed == 3
    assert PipelineOptions.of(options) is options and PipelineOptions.of(None) == PipelineOptions()


@pytest.mark.parametrize(
    "given,message",
    [
        (
            {"adaquant": {"iteration": 3}},
            r"options\.adaquant: unknown option 'iteration'; did you mean 'iterations'\? The options are: mode, ",
        ),
        ({"adaqant": {}}, r"options: unknown option 'adaqant'; did you mean 'adaquant'\? The options are: calibration"),
        ({"compression": 0.1}, r"options: unknown option 'compression'\. The options are"),
        (
            {"bias_tuning": {"momentum": 3}},
            r"options\.bias_tuning: unknown option 'momentum'\. The options are: epochs",
        ),
        ({"storage": 3}, r"options\.storage must be StorageOptions or a mapping of its fields, got 3"),
        ({"calibration": AdaQuantOptions()}, r"options\.calibration must be RangeOptions or a mapping"),
        ([("seed", 0)], r"options must be PipelineOptions or a mapping of its fields, got \[\('seed', 0\)\]"),
    ],
)
def test_unknown_options_are_errors_that_name_the_place(given, message):
    with pytest.raises(TypeError, match=message):
        PipelineOptions.of(given)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"adaquant": {"iterations": 0}}, r"options\.adaquant: iterations must be an integer of at least 1, got 0"),
        ({"preparation": {"holdout": 1}}, r"options\.preparation: holdout must be above 0 and below 1"),
        ({"allocation": {"compression": 2.0}}, r"options\.allocation: compression must be"),
        ({"calibration": {"percentile": 3}}, r"options\.calibration: percentile must be"),
        ({"batch_norm_tuning": {"reference": "old"}}, r"options\.batch_norm_tuning: reference must be"),
        ({"storage": {"precision": "int8"}}, r"options\.storage: precision must be"),
        ({"seed": 1.5}, r"options\.seed must be an integer of at least 0 or None, got 1\.5"),
    ],
)
def test_values_out_of_range_are_errors_that_name_the_place(given, message):
    with pytest.raises(ValueError, match=message):
        PipelineOptions.of(given)


def test_plain_values_can_be_written_and_read_again():
    options = PipelineOptions.of(
        {"state_folder": "runs/state", "adaquant": {"blocks": ["layer1"]}, "allocation": {"candidates": [[4, 8], 8]}}
    )
    plain = options.to_dict()
    assert json.loads(json.dumps(plain)) == yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain.keys() == {field.name for field in fields(PipelineOptions)}
    assert PipelineOptions.of(plain).to_dict() == plain
    assert PipelineOptions.of({"adaquant": {"loss": labelled_loss}}).to_dict()["adaquant"]["loss"] == "labelled_loss"
