import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_calibtip import QuantizationModule, make_stages, quantize, run_stages
from tests.conftest import TinyClassifier

QUICK = {
    "adaquant": {"iterations": 3},
    "preparation": {"iterations": 3},
    "bias_tuning": {"epochs": 1},
    "compression": 0.2,
}


@pytest.mark.parametrize(
    "pipeline,names",
    [
        ("calibrate", ["Calibration"]),
        ("light", ["Calibration", "BitAllocation", "BatchNormTuning"]),
        ("advanced", ["Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning"]),
        ("sequential", ["Calibration", "BatchNormTuning", "AdaQuant", "BiasTuning"]),
        ("mixed", ["Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "AdaQuant 2", "BiasTuning"]),
    ],
)
def test_pipelines_have_their_stages_in_order(pipeline, names, tiny_classifier, loader):
    assert [stage.name for stage in make_stages(pipeline)] == [name.split(" ")[0] for name in names]
    run = quantize(tiny_classifier, loader, loader, pipeline, stage_options=QUICK, weight_bits=4, activation_bits=4)
    assert [stage.name for stage in run.stages] == names
    record = run.record("test", "tiny", "val_acc", 0)
    assert record["float"] == run.float_metrics["val_acc"] and record["calibration_samples"] == 48
    assert [stage["name"] for stage in record["stages"]] == names


def test_users_step_may_use_the_trainer_and_the_logger(loader):
    class Chatty(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.experiment.add_image("first", batch[0][0])
            self.log("batches", float(self.trainer.num_val_batches[0]))

    run = quantize(Chatty(), loader, loader, "calibrate")
    assert run.metrics["batches"] == 3


def test_shuffled_loader_gives_all_stages_the_same_samples(tiny_classifier, images):
    seen = []

    class Watching(QuantizationModule):
        def calibration_step(self, batch, batch_idx):
            seen.append(float(batch.sum()))
            return super().calibration_step(batch, batch_idx)

    shuffled = DataLoader(images, batch_size=16, shuffle=True)
    run = run_stages(Watching(tiny_classifier), make_stages("light", compression=0.2), shuffled)
    assert len(set(seen)) == 3 and len(seen) > 3
    assert run.calibration_samples == 48


def test_trainer_options_may_name_loggers_and_callbacks(tiny_classifier, loader, tmp_path):
    class Watching(pl.Callback):
        fits = 0

        def on_fit_start(self, trainer, pl_module):
            self.fits += 1

    watching, logger = Watching(), CSVLogger(tmp_path, name="log", version=0)
    options = {"logger": logger, "callbacks": [watching]}
    quantize(tiny_classifier, loader, loader, "light", stage_options=QUICK, trainer_options=options)
    assert watching.fits == 3
    logger.save()
    assert "BatchNormTuning/val_acc" in (tmp_path / "log" / "version_0" / "metrics.csv").read_text()


def test_papers_preset_reaches_adaquant_and_an_unknown_one_is_refused():
    stages = {stage.name: stage for stage in make_stages("sequential", adaquant={"preset": "paper", "iterations": 9})}
    settings = stages["AdaQuant"].reconstruction.settings
    assert settings.batch_size == 50 and settings.iterations == 9
    with pytest.raises(ValueError, match="adaquant preset must be one of default, paper, got 'fast'"):
        make_stages("sequential", adaquant={"preset": "fast"})


def test_same_seed_gives_bit_identical_models_in_two_runs(tiny_classifier, loader):
    states = []
    for _ in range(2):
        run = quantize(tiny_classifier, loader, pipeline="advanced", stage_options=QUICK, weight_bits=4)
        states.append(run.module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_batches_may_be_a_plain_list_and_validation_left_out(tiny_classifier, images):
    run = quantize(tiny_classifier, list(images.split(16)), pipeline="calibrate", calibration_samples=20)
    assert run.calibration_samples == 32 and run.metrics == {}


def test_a_metric_that_was_not_logged_is_an_error_that_lists_what_was(tiny_classifier, loader):
    run = quantize(tiny_classifier, loader, loader, "calibrate")
    with pytest.raises(KeyError, match=r"validation logged no 'f1', only .*val_acc"):
        run.record("test", "tiny", "f1", 0)


def test_further_stages_can_run_on_the_result(tiny_classifier, loader):
    module = QuantizationModule(tiny_classifier, weight_bits=2)
    run_stages(module, make_stages("calibrate"), loader)
    before = module.network.layers["net.blocks.0.conv1"].weight.clone()
    run_stages(module, make_stages("sequential", adaquant={"iterations": 100})[2:], loader)
    assert module.network.layers["net.blocks.0.conv1"].errors is not None
    assert not torch.equal(before, module.network.layers["net.blocks.0.conv1"].weight)


def test_mixed_reconstructs_the_chosen_widths_as_sequential_would(tiny_classifier, loader, tmp_path):
    """The candidates' states serve the choice alone: what follows starts from the float weights."""
    mixed = quantize(tiny_classifier, loader, pipeline="mixed", stage_options=QUICK)
    bits = {name: layer.bits for name, layer in mixed.module.network.layers.items()}
    assert len(set(bits.values())) > 1
    options = {key: value for key, value in QUICK.items() if key != "compression"}
    chosen = quantize(tiny_classifier, loader, pipeline="sequential", stage_options=options, overrides=bits)
    states = [run.module.network.layers.values() for run in (mixed, chosen)]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one.integer_weight(), other.integer_weight()), one.name


def test_mixed_takes_a_table_again_without_preparing_candidates(tiny_classifier, loader, tmp_path):
    first = quantize(tiny_classifier, loader, pipeline="mixed", stage_options=QUICK)
    exhibits = {exhibit.name: exhibit for exhibit in first.stages[2].exhibits}
    exhibits["sensitivity"].save(tmp_path)
    again = {**QUICK, "allocation": {"sensitivity": tmp_path / "sensitivity.csv"}}
    run = quantize(tiny_classifier, loader, pipeline="mixed", stage_options=again)
    assert [stage.name for stage in run.stages][1:3] == ["BitAllocation", "BatchNormTuning"]
    assert run.stages[1].figures["predicted_loss"] == first.stages[2].figures["predicted_loss"]


def test_a_table_of_the_user_s_stays_and_a_state_folder_goes(tiny_classifier, loader, tmp_path):
    options = {**QUICK, "state_folder": tmp_path / "state", "allocation": {"output_folder": tmp_path / "shown"}}
    quantize(tiny_classifier, loader, pipeline="light", stage_options=dict(options))
    assert not (tmp_path / "state").exists() and (tmp_path / "shown" / "allocation.png").exists()
    options["allocation"] = {"table": tmp_path / "mine" / "table.csv"}
    quantize(tiny_classifier, loader, pipeline="light", stage_options=options)
    assert (tmp_path / "mine" / "table.csv").exists()


def test_a_sweep_evaluates_each_point_with_the_user_s_validation(tiny_classifier, loader):
    options = {"compression": [0.1, 0.2], "candidates": [2, 4, 8], "allocation": {"checks": 2}}
    run = quantize(tiny_classifier, loader, loader, "light", stage_options=options)
    trade_off = run.stages[1].exhibits[-1]
    assert trade_off.name == "trade_off" and trade_off.columns[-3:] == ["val_loss", "val_acc", "epoch_ends"]
    assert [row[0] for row in trade_off.rows] == ["0.1", "0.2", "W2A2", "W4A4", "W8A8"]
    assert all(0 <= row[-2] <= 1 and row[3] is not None for row in trade_off.rows)
    assert run.metrics.keys() == run.float_metrics.keys()


@pytest.mark.parametrize("pipeline", ["sequential", "advanced"])
def test_storage_options_reach_the_stages_and_the_state_is_removed_at_the_end(
    tiny_classifier, loader, tmp_path, pipeline
):
    options = {"activation_budget": "3kB", "scratch_folder": tmp_path / "scratch", "state_folder": tmp_path / "state"}
    stages = {
        stage.name: stage for stage in make_stages(pipeline, **options, compression=0.2, adaquant={"iterations": 2})
    }
    assert stages["AdaQuant"].activation_budget == stages["BatchNormTuning"].activation_budget == 3000
    assert stages["AdaQuant"].scratch_folder == stages["BatchNormTuning"].scratch_folder == tmp_path / "scratch"
    seen = []
    stages["AdaQuant"].clean_up, clean_up = (
        lambda: seen.extend((tmp_path / "state").rglob("*.pt")),
        stages["AdaQuant"].clean_up,
    )
    run_stages(QuantizationModule(tiny_classifier), list(stages.values()), loader)
    assert seen
    clean_up()
    assert not (tmp_path / "state").exists()
