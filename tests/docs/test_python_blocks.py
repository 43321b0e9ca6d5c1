"""Every Python block of README and docs/ runs as written, with fewer steps, and does what its page says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_calibtip
from lightning_calibtip import Calibration, QuantizationModule, export_onnx, quantize
from lightning_calibtip.pipeline.runner import run_stages
from tests.docs.pages import blocks

BLOCKS = {block.key: block.text for block in blocks("python")}
SHORT = {"iterations": 2, "batch_size": 8}


class QuietTrainer(pl.Trainer):
    """The pages' Trainer, kept short and silent."""

    def __init__(self, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        super().__init__(**{**options, **quiet, "max_epochs": 1})


def short_quantize(*args, options: Mapping[str, Any] | None = None, **others):
    """The pages' ``quantize``, with few steps."""
    options = {**(options or {}), "bias_tuning": {"epochs": 1}, "equalization": {"samples": 16}}
    options["adaquant"] = {**options.get("adaquant", {}), **SHORT}
    return quantize(*args, options=options, trainer_options={"accelerator": "cpu"}, **others)


@dataclass(frozen=True)
class Ran:
    """What a block has left."""

    names: dict[str, Any]
    printed: str
    folder: Path
    model: torch.nn.Module
    images: torch.Tensor
    loader: DataLoader

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


Check = Callable[[Ran], None]
CHECKS: dict[str, Check] = {}


def checks(*keys: str) -> Callable[[Check], Check]:
    """Register what must be true after these blocks have run."""

    def register(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(keys, check))
        return check

    return register


def stage_names(run) -> list[str]:
    return [stage.name for stage in run.stages]


SEQUENTIAL = ["Calibration", "Equalization", "BatchNormTuning", "AdaQuant", "BiasTuning"]


@checks("README.md: A callback on the Trainer")
def quantizes_when_training_ends(ran):
    quantizer = ran["quantizer"]
    assert "val_acc" in ran.printed and "QLinearConv" in ran.printed
    assert quantizer.checkpoint_path.exists() and (quantizer.report_folder / "report.html").exists()
    assert (ran.folder / "model.onnx").exists() and stage_names(quantizer.result) == SEQUENTIAL


@checks("README.md: Stages or one call, on a finished model", "index.md: lightning_calibtip")
def writes_a_checkpoint_and_metrics(ran):
    assert "val_acc" in ran.printed and stage_names(ran["run"])[:5] == SEQUENTIAL
    loaded = QuantizationModule.load_from_checkpoint(ran.folder / "quantized.ckpt", model=ran.model)
    with torch.no_grad():
        assert torch.equal(loaded(ran.images), ran["run"].module(ran.images))


@checks("README.md: Run the result")
def exports_a_checkpoint(ran):
    assert "QLinearConv" in ran.printed and ran["report"].agreement > 0.8
    assert (ran.folder / "model.onnx").exists()


@checks("README.md: Run the result 2", "deployment.md: Run it")
def runs_without_torch(ran):
    with torch.no_grad():
        wanted = QuantizationModule.load_from_checkpoint(ran.folder / "quantized.ckpt", model=ran.model)(ran["batch"])
    assert ran["logits"] == pytest.approx(wanted.numpy(), abs=float(wanted.abs().max()) / 10)


@checks("stages.md: Pipelines")
def takes_options_of_stages(ran):
    options = ran["quantizer"].options
    assert (options.adaquant.iterations, options.calibration.observer) == (200, "percentile")


@checks("stages.md: Stages on a finished model")
def runs_stages_by_themselves(ran):
    assert "6 quantized, 5 folded, 0 float" in ran.printed and (ran.folder / "quantized.ckpt").exists()
    with torch.no_grad():
        assert ran["quantized"](ran.images).shape == (48, 4)


@checks("stages.md: Stages on a finished model 2")
def quantizes_in_one_call(ran):
    layers = ran["weights_only"].record("", "", None, None)["layers"]
    assert stage_names(ran["run"]) == SEQUENTIAL
    assert {layer["activation_bits"] for layer in layers} == {None}


@checks("sparse_activations.md: Sparse activations in 4 bits")
def simulates_sparq(ran):
    assert "val_acc" in ran.printed and "net.blocks.0.conv1 input" in ran.printed
    assert ran["run"].module.network.layers["net.head"].input_quantizers[0].windows == 3


@checks("graph_networks.md: Graph networks")
def quantizes_a_graph_network(ran):
    assert "first.factor_edge_weight" in ran.printed and "second.aggregates" in ran.printed
    assert stage_names(ran["run"]) == SEQUENTIAL and ran["run"].module(ran["graph"]).shape == (34, 4)


@checks("costs.md: What mistakes cost")
def counts_what_mistakes_cost(ran):
    outcome, worst = ran.printed.strip().splitlines()[-2:]
    assert "By the labels of 48 samples a decision of the float model costs" in outcome
    assert worst in ran["run"].module.network.layers and stage_names(ran["run"])[5] == "DecisionCosts"


@checks("stages.md: AdaQuant")
def reconstructs_with_these_options(ran):
    stage = ran["stage"]
    stage.options = replace(stage.options, **SHORT)
    run_stages(QuantizationModule(ran.model, weight_bits=4), [Calibration(), stage], ran.loader)
    assert stage.result.figures["units"] == 5 and (ran.folder / "runs" / "state").exists()


@checks("stages.md: Bit allocation")
def allocates_with_these_options(ran):
    for stage in (ran["stage"], ran["cheapest"]):
        QuietTrainer(callbacks=[Calibration(), stage]).fit(QuantizationModule(ran.model), ran.loader)
    assert len(ran["stage"].allocation.curve) == 3 and ran["stage"].result.figures["compression"] <= 0.16
    assert ran["cheapest"].result.figures["measured_loss"] <= 0.02


@checks("deployment.md: Export, check, load")
def exports_and_loads_packed_files(ran):
    assert "QLinearConv" in ran.printed and (ran.folder / "model.onnx").exists()
    with torch.no_grad():
        assert torch.equal(ran["module"](ran.images), ran["run"].module(ran.images))


@checks("extending.md: Parts of your own")
def reconstructs_by_an_own_objective(ran):
    objective = ran["Huber"]()
    output = torch.tensor([0.5, 3.0])
    assert objective.loss(output, torch.zeros(2), None) == 0.25 + 5 == objective.power(output, None)
    adaquant = next(stage for stage in ran["run"].ran if stage.name == "AdaQuant")
    assert adaquant.options.objective == "huber"


@checks("choosing.md: A first run")
def compares_two_pipelines(ran):
    calibrated, sequential = ran.printed.strip().splitlines()
    assert calibrated.startswith("calibrate {'Calibration': {") and "BiasTuning" not in calibrated
    assert sequential.startswith("sequential {") and "BiasTuning" in sequential


@checks("accuracy.md: First, where is it lost")
def says_where_accuracy_is_lost(ran):
    stages, *layers = ran.printed.strip().splitlines()
    assert "val_acc" in stages and len(layers) == 3 and all("overrides=" in line for line in layers)
    assert layers[0].startswith(ran["found"].worst(1)[0].name)
    assert (ran.folder / "runs" / "why" / "diagnosis.html").exists()


@checks("accuracy.md: First, where is it lost 2")
def applies_remedies(ran):
    result = ran["result"]
    assert result.outcome in ran.printed and (ran.folder / "mended.ckpt").exists()


def test_every_python_block_has_a_check_and_every_check_a_block():
    assert set(CHECKS) == set(BLOCKS)


@pytest.mark.parametrize("key", BLOCKS)
def test_python_block_runs_as_written(key, tiny_classifier, images, tmp_path, monkeypatch, capsys):
    assert key in CHECKS, f"{key} is new: say in this file, by @checks, what must be true after it has run."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    monkeypatch.setattr(lightning_calibtip, "quantize", short_quantize)
    # Few steps are enough to see that the code runs.
    code = BLOCKS[key].replace('AdaQuant(mode="sequential")', 'AdaQuant(mode="sequential", iterations=2)')
    code = code.replace("calibration_samples=512", f'calibration_samples=48, options={{"adaquant": {SHORT}}}')
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), batch_size=16)
    names = {
        "model": tiny_classifier,
        "train_loader": loader,
        "val_loader": loader,
        "calibration_loader": loader,
        "batch": images[:8],
    }
    if key.startswith("graph_networks.md"):
        graphs = pytest.importorskip("tests.graphs")
        names |= {"model": graphs.make("gcn"), "graph": graphs.karate()}
    if key in ("README.md: Run the result", "README.md: Run the result 2", "deployment.md: Run it"):
        # These go on with what blocks before them have written.
        run = quantize(
            tiny_classifier, loader, pipeline="calibrate", target="onnxruntime", trainer_options={"accelerator": "cpu"}
        )
        run.save("quantized.ckpt")
        export_onnx(run.module, "model.onnx", images[:8], check=False)
    exec(code, names)
    CHECKS[key](Ran(names, capsys.readouterr().out, tmp_path, tiny_classifier, images, loader))
