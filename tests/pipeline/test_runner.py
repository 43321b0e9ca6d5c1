import logging
import os
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.modules.module as global_hooks
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibtip import (
    AdaQuantOptions,
    QuantizationModule,
    Stage,
    StageResult,
    StorageOptions,
    make_stages,
    quantize,
    run_stages,
)
from lightning_calibtip.pipeline.presets import PIPELINES
from tests.conftest import TinyClassifier

QUICK = {
    "adaquant": {"iterations": 3},
    "preparation": {"iterations": 3},
    "bias_tuning": {"epochs": 1},
    "allocation": {"compression": 0.2},
}


@pytest.mark.parametrize(
    "pipeline,names",
    [
        ("calibrate", ["Calibration"]),
        ("light", ["Calibration", "BitAllocation", "Equalization", "BatchNormTuning"]),
        ("advanced", ["Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning"]),
        ("sequential", ["Calibration", "Equalization", "BatchNormTuning", "AdaQuant", "BiasTuning"]),
        (
            "mixed",
            [
                "Calibration",
                "AdaQuant",
                "BitAllocation",
                "Equalization",
                "BatchNormTuning",
                "AdaQuant 2",
                "BiasTuning",
            ],
        ),
    ],
)
def test_pipelines_have_their_stages_in_order(pipeline, names, tiny_classifier, loader):
    assert [stage.name for stage in make_stages(pipeline)] == [name.split(" ")[0] for name in names]
    run = quantize(tiny_classifier, loader, loader, pipeline, options=QUICK, weight_bits=4, activation_bits=4)
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
    run = run_stages(Watching(tiny_classifier), make_stages("light", {"allocation": {"compression": 0.2}}), shuffled)
    assert len(set(seen)) == 3 and len(seen) > 3
    assert run.calibration_samples == 48


def test_trainer_options_may_name_loggers_and_callbacks(tiny_classifier, loader, tmp_path):
    class Watching(pl.Callback):
        fits = 0

        def on_fit_start(self, trainer, pl_module):
            self.fits += 1

    watching, logger = Watching(), CSVLogger(tmp_path, name="log", version=0)
    trainer_options = {"logger": logger, "callbacks": [watching]}
    quantize(tiny_classifier, loader, loader, "light", options=QUICK, trainer_options=trainer_options)
    assert watching.fits == 4
    logger.save()
    assert "BatchNormTuning/val_acc" in (tmp_path / "log" / "version_0" / "metrics.csv").read_text()


def test_the_papers_options_reach_adaquant():
    (stage,) = make_stages("sequential", {"adaquant": AdaQuantOptions.paper(iterations=9)})[3:4]
    assert (stage.options.batch_size, stage.options.iterations, stage.options.granularity) == (50, 9, "layer")


def test_same_seed_gives_bit_identical_models_in_two_runs(tiny_classifier, loader):
    states = []
    for _ in range(2):
        run = quantize(tiny_classifier, loader, pipeline="advanced", options=QUICK, weight_bits=4)
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
    run_stages(module, make_stages("sequential", {"adaquant": {"iterations": 100}})[2:], loader)
    assert module.network.layers["net.blocks.0.conv1"].errors is not None
    assert not torch.equal(before, module.network.layers["net.blocks.0.conv1"].weight)


def bit_widths(run):
    return {name: layer.config.bit_widths for name, layer in run.module.network.layers.items()}


def test_mixed_reconstructs_the_chosen_bit_widths_as_sequential_would(tiny_classifier, loader):
    """The candidates' states serve the choice alone: what follows starts from the float weights."""
    mixed = quantize(tiny_classifier, loader, pipeline="mixed", options=QUICK)
    overrides = {name: (bits.weight, bits.activation) for name, bits in bit_widths(mixed).items()}
    assert len(set(overrides.values())) > 1
    options = {key: value for key, value in QUICK.items() if key != "allocation"}
    chosen = quantize(tiny_classifier, loader, pipeline="sequential", options=options, overrides=overrides)
    states = [run.module.network.layers.values() for run in (mixed, chosen)]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one.integer_weight(), other.integer_weight()), one.name


def test_mixed_reuses_a_table_without_preparing_candidates(tiny_classifier, loader, tmp_path):
    # The program's own answer: which alternative has the least true loss depends on the candidates' states.
    allocation = {"compression": 0.2, "checks": 0}
    first = quantize(tiny_classifier, loader, pipeline="mixed", options={**QUICK, "allocation": allocation})
    items = {item.name: item for item in first.stages[2].items}
    items["sensitivity"].save(tmp_path)
    reuse = {**QUICK, "allocation": {**allocation, "sensitivity": tmp_path / "sensitivity.csv"}}
    run = quantize(tiny_classifier, loader, pipeline="mixed", options=reuse)
    assert [stage.name for stage in run.stages][1:3] == ["BitAllocation", "Equalization"]
    assert run.stages[1].figures["predicted_loss"] == first.stages[2].figures["predicted_loss"]


def test_a_table_of_the_user_s_stays_and_a_state_folder_goes(tiny_classifier, loader, tmp_path):
    options = {"allocation": {"compression": 0.2, "output_folder": tmp_path / "shown"}}
    options["state_folder"] = tmp_path / "state"
    run = quantize(tiny_classifier, loader, pipeline="light", options=options)
    assert (tmp_path / "state" / "sensitivity.csv").exists()
    run.save(tmp_path / "quantized.ckpt")
    assert not (tmp_path / "state").exists() and (tmp_path / "shown" / "allocation.png").exists()
    options["allocation"] = {"compression": 0.2, "table": tmp_path / "mine" / "table.csv"}
    quantize(tiny_classifier, loader, pipeline="light", options=options)
    assert (tmp_path / "mine" / "table.csv").exists()


def test_a_sweep_evaluates_each_point_with_the_user_s_validation(tiny_classifier, loader):
    options = {"allocation": {"compression": [0.1, 0.2], "candidates": [2, 4, 8], "checks": 2}}
    run = quantize(tiny_classifier, loader, loader, "light", options)
    trade_off = run.stages[1].items[-1]
    assert trade_off.name == "trade_off" and trade_off.columns[-3:] == ["val_loss", "val_acc", "epoch_ends"]
    assert [row[0] for row in trade_off.rows] == ["0.1", "0.2", "W2A2", "W4A4", "W8A8"]
    assert all(0 <= row[-2] <= 1 and row[3] is not None for row in trade_off.rows)
    assert run.metrics.keys() == run.float_metrics.keys()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_weights_alone_go_through_every_pipeline(pipeline, tiny_classifier, loader, images):
    options = {**QUICK, "allocation": {"compression": 0.2, "candidates": [4, 8]}}
    scheme = {"weight_bits": 4, "activation_bits": None, "group_size": 4}
    run = quantize(tiny_classifier, loader, loader, pipeline, options, **scheme)
    found = set(bit_widths(run).values())
    assert all(bits.activation is None for bits in found) and {bits.weight for bits in found} <= {4, 8}
    with torch.no_grad():
        assert not torch.equal(run.module(images), tiny_classifier(images))
    record = run.record("test", "tiny", "val_acc", 0)
    assert {layer["activation_bits"] for layer in record["layers"]} == {None}


def test_the_configuration_of_a_run_is_what_was_given(tiny_classifier, loader):
    run = quantize(tiny_classifier, loader, pipeline="calibrate", options={"seed": 3}, weight_bits=5)
    assert run.configuration["pipeline"] == "calibrate" and run.configuration["seed"] == 3
    assert run.configuration["weight_bits"] == 5 and run.configuration["adaquant"]["iterations"] == 500


def test_unknown_options_are_errors_before_anything_runs(tiny_classifier, loader):
    with pytest.raises(TypeError, match="quantize: unknown option 'weight_bit'; did you mean 'weight_bits'"):
        quantize(tiny_classifier, loader, weight_bit=4)
    with pytest.raises(TypeError, match=r"options\.calibration: unknown option 'percent'"):
        quantize(tiny_classifier, loader, options={"calibration": {"percent": 99}})


def test_any_stage_may_evaluate_while_it_works(tiny_classifier, loader):
    class Asking(Stage):
        def run(self, module):
            return StageResult({"loss_meanwhile": self.evaluate()["val_loss"]}, [])

    run = run_stages(QuantizationModule(tiny_classifier), [*make_stages("calibrate"), Asking()], loader, loader)
    assert run.stages[1].figures["loss_meanwhile"] == pytest.approx(run.stages[0].metrics["val_loss"])


@pytest.mark.parametrize("pipeline", ["sequential", "advanced"])
def test_storage_options_reach_the_stages_and_the_state_is_removed_at_the_end(
    tiny_classifier, loader, tmp_path, pipeline
):
    options = {
        "storage": {"activation_budget": "3kB", "scratch_folder": tmp_path / "scratch"},
        "state_folder": tmp_path / "state",
        "allocation": {"compression": 0.2},
        "adaquant": {"iterations": 2},
    }
    stages = {stage.name: stage for stage in make_stages(pipeline, options)}
    assert (
        stages["AdaQuant"].storage
        == stages["BatchNormTuning"].storage
        == StorageOptions("3kB", "float32", tmp_path / "scratch")
    )
    run = run_stages(QuantizationModule(tiny_classifier), list(stages.values()), loader)
    assert list((tmp_path / "state").rglob("*.pt"))
    run.save(tmp_path / "first.ckpt", clean_up=False)
    assert list((tmp_path / "state").rglob("*.pt"))
    run.clean_up()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("pipeline", ["mixed", "light"])
def test_a_small_model_gets_a_default_budget_that_it_can_reach(pipeline, caplog):
    linear = torch.nn.Linear
    model = torch.nn.Sequential(linear(10, 16), torch.nn.ReLU(), linear(16, 16), torch.nn.ReLU(), linear(16, 10))
    options = {"adaquant": {"iterations": 2}}
    run = quantize(model, [torch.randn(32, 10)], pipeline=pipeline, options=options)
    (stage,) = (stage for stage in run.stages if stage.name == "BitAllocation")
    # Of 576 weights 256 have 4 or 8 bits, and the others 8.
    assert stage.figures["compression"] == pytest.approx(((320 * 8 + 256 * 4) / 576 + 8) / 2 / 32, abs=0.03)
    assert caplog.text.count("compression=0.13, the default, is out of this model's reach: the budget is 0.2222") == 1


@pytest.mark.parametrize("pipeline", ["advanced", "mixed", "light"])
@pytest.mark.parametrize("options, scheme, message", [
    ({"compression": 0.126}, {}, "compression=0.126 is out of reach: with these candidates it can be"),
    ({"compression": 0.2}, {"overrides": {"*": 8}}, "No layer's bit-widths are free to be chosen"),
])  # fmt: skip
def test_an_allocation_that_cannot_be_solved_is_refused_before_anything_is_reconstructed(
    tiny_classifier, loader, monkeypatch, pipeline, options, scheme, message
):
    monkeypatch.setattr(
        "lightning_calibtip.callbacks.calibration.Calibration.run", lambda *args: pytest.fail("too late")
    )
    with pytest.raises(ValueError, match=message):
        quantize(tiny_classifier, loader, pipeline=pipeline, options={"allocation": options}, **scheme)


def global_state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": random.getstate(),
        "warnings": list(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "hooks": [len(hooks) for hooks in (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)],
        "levels": [logging.getLogger(name).level for name in ("", "lightning.pytorch", "lightning_calibtip")],
        "environment": dict(os.environ),
    }


def test_nothing_global_is_left_changed(tiny_classifier, images, tmp_path):
    dataset = TensorDataset(images, torch.arange(len(images)) % 4)
    shuffled = DataLoader(dataset, batch_size=16, shuffle=True)
    before = global_state()
    run = quantize(tiny_classifier, shuffled, shuffled, "sequential", {**QUICK, "adaquant": {"iterations": 2}})
    run.save(tmp_path / "quantized.ckpt")
    run.write_report(tmp_path, run.record("test", "tiny", "val_acc", 0))
    after = global_state()
    assert [name for name in before if before[name] != after[name]] == []


def test_nothing_global_is_left_changed_by_a_run_that_fails(tiny_classifier, images, monkeypatch):
    def fail(*args):
        torch.rand(3)
        raise KeyError("something of the user's")

    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), batch_size=16, shuffle=True)
    monkeypatch.setattr("lightning_calibtip.callbacks.calibration.Calibration.run", fail)
    before = global_state()
    with pytest.raises(KeyError, match="something of the user's"):
        quantize(tiny_classifier, loader, pipeline="calibrate")
    after = global_state()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_checkpoint_that_reads_differently_is_no_checkpoint(tiny_classifier, loader, tmp_path, monkeypatch):
    run = quantize(tiny_classifier, loader, pipeline="calibrate")
    run.save(tmp_path / "quantized.ckpt")
    before, save = (tmp_path / "quantized.ckpt").read_bytes(), torch.save

    def unsound(content, file):
        save(content, file)
        file.file.seek(1000)
        file.file.write(b"rust")

    monkeypatch.setattr("lightning_calibtip.pipeline.checkpoint_io.torch.save", unsound)
    with pytest.raises(OSError, match="was not written: what was read back differs"):
        run.save(tmp_path / "quantized.ckpt")
    assert (tmp_path / "quantized.ckpt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
