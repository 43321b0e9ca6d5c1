from dataclasses import replace

import pytest

from lightning_calibtip import PipelineOptions, make_stages
from lightning_calibtip.pipeline.presets import PIPELINES


def stages_by_name(pipeline, options=None):
    return {stage.name: stage for stage in make_stages(pipeline, options)}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_pipeline_passes_each_stage_its_options(pipeline):
    given = {
        "calibration": {"percentile": 99.5, "weight_observer": "minmax"},
        "equalization": {"exponents": [0.5]},
        "batch_norm_tuning": {"reference": "training"},
        "bias_tuning": {"epochs": 2},
        "allocation": {"compression": 0.2},
        "storage": {"activation_budget": "3kB"},
    }
    options, stages = PipelineOptions.of(given), stages_by_name(pipeline, given)
    assert stages["Calibration"].options == options.calibration
    for name, expected in (
        ("Equalization", options.equalization),
        ("BatchNormTuning", options.batch_norm_tuning),
        ("BiasTuning", options.bias_tuning),
    ):
        assert name not in stages or stages[name].options == expected
    if "BitAllocation" in stages:
        assert replace(stages["BitAllocation"].options, reset_to_float=False) == options.allocation
        assert stages["BitAllocation"].options.reset_to_float == (pipeline == "mixed")
    for name in {"AdaQuant", "BitAllocation", "BatchNormTuning", "Equalization"} & stages.keys():
        assert stages[name].storage == options.storage


def test_candidates_are_reconstructed_in_parallel_and_by_layers():
    (advanced,) = (
        stage for stage in make_stages("advanced", {"adaquant": {"iterations": 7}}) if stage.name == "AdaQuant"
    )
    assert (advanced.options.mode, advanced.options.granularity, advanced.options.iterations) == (
        "parallel",
        "layer",
        7,
    )
    preparing, final = (stage for stage in make_stages("mixed") if stage.name == "AdaQuant")
    assert (preparing.options.mode, preparing.options.granularity) == ("parallel", "layer")
    assert preparing.options.iterations == 100
    assert (final.options.mode, final.options.granularity, final.options.iterations) == ("sequential", "block", 500)


def test_mixed_with_sensitivities_does_not_prepare_candidates(tmp_path):
    names = [stage.name for stage in make_stages("mixed", {"allocation": {"sensitivity": tmp_path / "table.csv"}})]
    assert names == ["Calibration", "BitAllocation", "Equalization", "BatchNormTuning", "AdaQuant", "BiasTuning"]


def test_a_seed_is_that_of_every_stage_and_none_leaves_each_its_own():
    of_stages = {"calibration": 4, "adaquant": 5, "preparation": 6, "bias_tuning": 7, "equalization": 8}
    own = {stage: {"seed": seed} for stage, seed in of_stages.items()}
    seeds = [stage.options.seed for stage in make_stages("mixed", own) if hasattr(stage.options, "seed")]
    assert seeds == [4, 6, 8, 5, 7]
    given = [stage.options.seed for stage in make_stages("mixed", {**own, "seed": 3}) if hasattr(stage.options, "seed")]
    assert given == [3, 3, 3, 3, 3]


def test_an_unknown_pipeline_is_an_error_that_lists_all():
    with pytest.raises(ValueError, match=r"pipeline must be one of calibrate, light, .* got 'fast'"):
        make_stages("fast")
