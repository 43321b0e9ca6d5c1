"""How stages take their options: as a dataclass, as single fields, from YAML, and what they refuse."""

from dataclasses import fields

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_calibtip import (
    AdaQuant,
    BatchNormTuning,
    BiasTuning,
    BitAllocation,
    Calibration,
    QuantizationModule,
    Stage,
)
from lightning_calibtip.allocation.options import AllocationOptions
from lightning_calibtip.calibration.options import StorageOptions
from lightning_calibtip.quantization.ranges import RangeOptions
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.tuning.batch_norm import BatchNormTuningOptions, tune_batch_norm
from lightning_calibtip.tuning.bias import BiasTuningOptions

# For each stage its options, and a field that differs from the default.
KINDS = {
    Calibration: (RangeOptions, {"observer": "minmax"}),
    AdaQuant: (AdaQuantOptions, {"iterations": 7}),
    BitAllocation: (AllocationOptions, {"candidates": [2, 4, 8]}),
    BatchNormTuning: (BatchNormTuningOptions, {"reference": "training"}),
    BiasTuning: (BiasTuningOptions, {"epochs": 7}),
}


def plain(options):
    """Values by name, with lists for tuples: a parser makes lists of all sequences."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def instantiate(parser, given):
    """Releases of jsonargparse before 4.49 have only the longer name."""
    return getattr(parser, "instantiate", parser.instantiate_classes)(given)


CASES = [pytest.param(stage, *case, id=stage.__name__) for stage, case in KINDS.items()]


@pytest.mark.parametrize("stage,kind,change", CASES)
def test_options_come_as_a_dataclass_as_fields_or_as_both(stage, kind, change):
    assert stage().options == kind()
    assert stage(kind(**change)).options == stage(options=kind(**change)).options == kind(**change)
    assert stage(**change).options == kind(**change)
    assert stage(kind(), **change).options == kind(**change)
    if len(fields(kind)) > 1:
        (name,) = change
        assert stage(kind(**change), **{name: getattr(kind(), name)}).options == kind()


@pytest.mark.parametrize("stage,kind,change", CASES)
def test_an_unknown_option_is_answered_with_the_known_ones(stage, kind, change):
    with pytest.raises(TypeError) as error:
        stage(**change, iteratoins=5)
    message = str(error.value)
    assert message.startswith(f"{stage.__name__}: unknown option 'iteratoins'")
    assert message.endswith(f"The options are: {', '.join(field.name for field in fields(kind))}.")


@pytest.mark.parametrize("stage,kind,change", CASES)
def test_something_else_in_place_of_the_options_is_refused(stage, kind, change):
    with pytest.raises(TypeError, match=f"{stage.__name__} takes {kind.__name__}, or its fields by name .*, got 'x'"):
        stage("x")


@pytest.mark.parametrize("stage,kind,change", CASES)
def test_a_parser_takes_the_fields_as_flat_arguments_with_their_help(stage, kind, change):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--stages", type=list[Stage])
    path = f"lightning_calibtip.{stage.__name__}"
    for init_args in (change, {"options": change}):
        given = parser.parse_object({"stages": [{"class_path": path, "init_args": init_args}]})
        (made,) = instantiate(parser, given).stages
        assert type(made) is stage and plain(made.options) == plain(kind(**change)), init_args
    (name,) = change
    given = parser.parse_args([f"--stages+={path}", f"--stages.{name}={change[name]}"])
    assert plain(instantiate(parser, given).stages[0].options) == plain(kind(**change))
    with pytest.raises(Exception, match="iteratoins"):
        parser.parse_object({"stages": [{"class_path": path, "init_args": {"iteratoins": 5}}]})


def test_a_parser_takes_storage_folder_and_candidates(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--stages", type=list[Stage])
    init_args = {
        "mode": "parallel", "granularity": "layer", "candidates": [4, [2, 8], [4, None]],
        "storage": {"activation_budget": "2GB", "scratch_folder": str(tmp_path)},
        "state_folder": str(tmp_path / "state"),
    }  # fmt: skip
    given = parser.parse_object({"stages": [{"class_path": "lightning_calibtip.AdaQuant", "init_args": init_args}]})
    (stage,) = instantiate(parser, given).stages
    assert stage.storage == StorageOptions("2GB", scratch_folder=tmp_path) and stage.state_folder == tmp_path / "state"
    assert stage.candidates == [4, [2, 8], [4, None]]


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Calibration(observer="entropy"), "observer must be one of"),
        (lambda: Calibration(weight_observer="x"), "weight_observer must be one of"),
        (lambda: Calibration(observer="percentile", percentile=10), "percentile must be above 50"),
        (lambda: Calibration(observer="moving_average", momentum=0), "momentum must be above 0"),
        (lambda: AdaQuant(mode="serial"), "mode must be one of parallel, sequential"),
        (lambda: AdaQuant(granularity="net"), "granularity must be one of layer, block"),
        (lambda: AdaQuant(candidates=[4, 8]), 'need mode="parallel"'),
        (
            lambda: AdaQuant(mode="parallel", granularity="layer", candidates=[1]),
            "candidates must be an integer from 2 to 16, got 1",
        ),
        (
            lambda: AdaQuant(mode="parallel", granularity="layer", candidates=[[None, None]]),
            "candidates must quantize the weight or the activation",
        ),
        (lambda: AdaQuant(iterations=0), "iterations must be an integer of at least 1, got 0"),
        (lambda: AdaQuant(iterations=2.5), "iterations must be an integer of at least 1, got 2.5"),
        (lambda: AdaQuant(blocks="layer1"), "blocks must be a list of names or patterns, got 'layer1'"),
        (lambda: AdaQuant(loss=3), "loss must be kl, mse.* or a function"),
        (lambda: AdaQuant(rounding="up"), "rounding must be one of straight_through, .*learned.*, got 'up'"),
        (lambda: AdaQuant(drop_probability=1.5), "drop_probability must be from 0 to 1, got 1.5"),
        (
            lambda: AdaQuant(storage={"activation_budget": "much"}),
            "activation_budget must be a positive number of bytes",
        ),
        (lambda: AdaQuant(storage={"precision": "int8"}), "precision must be one of float32, bfloat16, got 'int8'"),
        (lambda: BitAllocation(compression=0), "compression must be above 0, got 0"),
        (lambda: BitAllocation(compression=1.5), "compression must be at most 1, got 1.5"),
        (lambda: BitAllocation(compression=[0.1, 1.5]), "compression must be above 0 and at most 1, got 1.5"),
        (lambda: BitAllocation(compression=[]), "a list with at least one, got an empty list"),
        (lambda: BitAllocation(max_loss=0.1), "and none of the loss: max_loss goes with another minimise"),
        (lambda: BitAllocation(bit_operations="many"), "bit_operations must be a number, got 'many'"),
        (
            lambda: BitAllocation(compression=[0.1], pick_under=-1),
            "pick_under must be above 0 and at most 1, got -1",
        ),
        (
            lambda: BitAllocation(compression=[0.1], max_degradation=float("nan")),
            "max_degradation must be a finite number, got nan",
        ),
        (lambda: BitAllocation(candidates=[]), "at least two different bit-widths"),
        (lambda: BitAllocation(candidates=[4, 17]), "candidates\\[1\\] must be an integer from 2 to 16, got 17"),
        (lambda: BitAllocation(weight_bytes="lots"), "weight_bytes must be a positive number of bytes"),
        (lambda: BitAllocation(max_degradation=0.1), "pick a point of a sweep"),
        (lambda: BitAllocation(checks=-1), "checks must be an integer of at least 0, got -1"),
        (lambda: BitAllocation(metric="top1"), "metric must be kl, mse.* or a function"),
        (lambda: BitAllocation(samples=0), "samples must be an integer of at least 1, got 0"),
        (lambda: BitAllocation(solver="glpk"), "solver must be one of cbc, highs, got 'glpk'"),
        (lambda: BitAllocation(latency=3.0), "latency needs a latency_table"),
        (lambda: BitAllocation(candidates=[4]), "at least two different bit-widths"),
        (lambda: BatchNormTuning(reference="gamma"), "reference must be one of"),
        (lambda: BiasTuning(epochs=0), "epochs must be an integer of at least 1"),
    ],
)
def test_bad_values_raise_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_storage_says_which_stage_and_what_there_is():
    with pytest.raises(TypeError, match=r"AdaQuant: storage: unknown option 'budget'.*activation_budget"):
        AdaQuant(storage={"budget": 5})
    with pytest.raises(
        TypeError, match="BitAllocation: storage must be StorageOptions or a mapping of its fields, got 5"
    ):
        BitAllocation(storage=5)


def test_papers_preset_takes_further_arguments():
    stage = AdaQuant.paper(mode="parallel", iterations=7, candidates=[4, 8], state_folder="state")
    options = stage.options
    assert options.iterations == 7 and options.batch_size == 50 and not options.relative
    assert options.granularity == "layer" and stage.candidates == [4, 8] and stage.state_folder.name == "state"


def test_options_and_storage_of_adaquant_reach_the_reconstruction(
    tiny_classifier, loader, make_trainer, tmp_path, monkeypatch
):
    seen = {}

    def watching(network, calibration, options, store, state_folder, progress):
        seen.update(options=options, store=store, state_folder=state_folder)
        return adaquant(network, calibration, options, store, state_folder, progress)

    monkeypatch.setattr("lightning_calibtip.callbacks.adaquant.adaquant", watching)
    options = AdaQuantOptions(mode="parallel", granularity="layer", iterations=2, batch_size=7, seed=9)
    storage = StorageOptions("2kB", "bfloat16", tmp_path / "scratch")
    stage = AdaQuant(options, storage=storage, state_folder=str(tmp_path / "state"))
    make_trainer(Calibration(), stage).fit(QuantizationModule(tiny_classifier), loader)
    store = seen["store"]
    assert seen["options"] == options and seen["state_folder"] == tmp_path / "state"
    assert (store.budget, store.precision, store.folder) == (2000, torch.bfloat16, tmp_path / "scratch")
    figures = stage.result.figures
    assert figures["captured_bytes"] > 2000 and figures["step_seconds"] > 0
    assert (tmp_path / "scratch").is_dir() and not list((tmp_path / "scratch").iterdir())
    assert len(list((tmp_path / "state").glob("*.pt"))) == figures["units"] == 6
    stage.clean_up()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "scheme,expected",
    [
        ({}, [BitWidths(2, 2), BitWidths(4, None)]),
        ({"activation_bits": None}, [BitWidths(2, None), BitWidths(4, None)]),
    ],
)
def test_what_a_candidate_stands_for_is_told_by_the_modules_scheme(
    scheme, expected, tiny_classifier, loader, make_trainer
):
    stage = AdaQuant(mode="parallel", granularity="layer", iterations=1, candidates=[2, (4, None)])
    module = QuantizationModule(tiny_classifier, **scheme)
    make_trainer(Calibration(), stage).fit(module, loader)
    names = [f"reconstruction_{bits.label.lower()}" for bits in expected]
    assert [item.name for item in stage.result.items] == names
    layer = module.network.layers["net.blocks.0.conv1"]
    assert {config.bit_widths for config in layer.variants} == set(expected)


def test_options_storage_and_evaluation_of_bit_allocation_reach_the_program(tiny_classifier, tmp_path, monkeypatch):
    seen = {}

    def watching(network, calibration, options, store, evaluate, progress, table_path):
        seen.update(locals())
        raise KeyboardInterrupt

    def evaluate():
        return {"top1": 0.5}

    monkeypatch.setattr("lightning_calibtip.callbacks.bit_allocation.allocate", watching)
    options = AllocationOptions(compression=[0.1, 0.2], candidates=[[2, 8], 4], checks=3)
    storage = {"activation_budget": "5kB", "scratch_folder": tmp_path}
    stage = BitAllocation(options, storage=storage, state_folder=tmp_path / "state")
    stage.evaluate = evaluate
    with pytest.raises(KeyboardInterrupt):
        stage.run(QuantizationModule(tiny_classifier))
    assert seen["options"] == options and seen["evaluate"] is evaluate
    assert seen["table_path"] == tmp_path / "state" / "sensitivity.csv"
    assert (seen["store"].budget, seen["store"].folder) == (5000, tmp_path)
    stage = BitAllocation(options, state_folder=tmp_path, table=tmp_path / "table.csv")
    with pytest.raises(KeyboardInterrupt):
        stage.run(QuantizationModule(tiny_classifier))
    assert seen["table_path"] == tmp_path / "table.csv" and stage.state_folder is None


def test_the_table_of_measurements_is_kept_until_the_run_is_over(tiny_classifier, loader, make_trainer, tmp_path):
    stage = BitAllocation(compression=0.2, candidates=[2, 8], checks=0, state_folder=tmp_path / "state")
    make_trainer(Calibration(), stage).fit(QuantizationModule(tiny_classifier), loader)
    assert (tmp_path / "state" / "sensitivity.csv").is_file()
    assert stage.result.figures["compression"] <= 0.2 and stage.allocation is not None
    (tmp_path / "state" / "mine.txt").touch()
    stage.clean_up()
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert "mine.txt" in left and "sensitivity.csv" not in left


def test_batch_norm_tuning_keeps_to_its_budget(tiny_classifier, loader, make_trainer, tmp_path, monkeypatch):
    stores = []

    def watching(network, calibration, options, store, progress):
        stores.append(store)
        return tune_batch_norm(network, calibration, options, store, progress)

    monkeypatch.setattr("lightning_calibtip.callbacks.batch_norm_tuning.tune_batch_norm", watching)
    tuned = []
    for budget in (None, 1000):
        module = QuantizationModule(tiny_classifier, weight_bits=3)
        storage = StorageOptions(budget, scratch_folder=tmp_path / "scratch")
        make_trainer(Calibration(), BatchNormTuning(storage=storage)).fit(module, loader)
        tuned.append([layer.bias for layer in module.network.layers.values()])
    assert stores[1].budget == 1000 and stores[1].most_held == stores[0].most_held > 1000
    assert all(torch.equal(a, b) for a, b in zip(*tuned, strict=True))
    assert not list((tmp_path / "scratch").iterdir())
