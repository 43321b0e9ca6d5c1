"""Settings of a run for its report."""

from lightning_calibtip import make_stages
from lightning_calibtip.pipeline.options import PipelineOptions
from lightning_calibtip.pipeline.settings import run_settings

OPTIONS = PipelineOptions.of({"adaquant": {"iterations": 9}, "seed": 3, "storage": {"precision": "bfloat16"}})
CONFIGURATION = {"pipeline": "mixed", "overrides": {"head": 8}, "edge_bits": 8, **OPTIONS.to_dict()}


def settings_of(pipeline):
    """Value and whether it is the default, by group and name."""
    stages = make_stages(pipeline, OPTIONS)
    names = [stage.name for stage in stages]
    numbered = [f"{name} 2" if name in names[:place] else name for place, name in enumerate(names)]
    found = run_settings(CONFIGURATION, dict(zip(numbered, stages, strict=True)))
    return {(each.group, each.name): (each.value, each.is_default) for each in found}


def test_each_stage_shows_the_options_that_it_had():
    found = settings_of("mixed")
    assert found["AdaQuant", "iterations"] == ("100", False) and found["AdaQuant 2", "iterations"] == ("9", False)
    assert found["AdaQuant", "mode"] == ('"parallel"', False) and found["AdaQuant 2", "mode"] == ('"sequential"', True)
    assert found["BiasTuning", "seed"] == ("3", False) and found["BiasTuning", "epochs"][1]
    assert found["storage", "precision"] == ('"bfloat16"', False)
    assert {group for group, _ in found} == {
        "", "Calibration", "AdaQuant", "AdaQuant 2", "BitAllocation", "Equalization", "BatchNormTuning", "BiasTuning",
        "storage",
    }  # fmt: skip


def test_stages_that_did_not_run_have_no_settings():
    found = settings_of("calibrate")
    assert {group for group, _ in found} == {"", "Calibration"}
    assert found["", "overrides.head"] == ("8", False) and found["", "edge_bits"] == ("8", True)
    assert not any(name.startswith(("adaquant", "preparation", "storage")) for _, name in found)


def test_where_the_stages_are_not_known_everything_is_shown():
    names = {setting.name for setting in run_settings(CONFIGURATION, {})}
    assert {"adaquant.iterations", "bias_tuning.epochs", "storage.precision", "pipeline"} <= names
