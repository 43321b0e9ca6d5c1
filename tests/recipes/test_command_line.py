import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from lightning_calibtip import AdaQuantOptions, PipelineOptions, QuantizationScheme
from lightning_calibtip.pipeline.arguments import split_scheme_and_options
from recipes.bert_squad import __main__ as bert_squad
from recipes.command_line import make_parser, run_recipe
from recipes.graph_network import __main__ as graph_network
from recipes.resnet_cifar10 import __main__ as resnet_cifar10
from recipes.resnet_imagenet import __main__ as resnet_imagenet
from recipes.utility import __main__ as utility

RECIPES = [bert_squad, graph_network, resnet_cifar10, resnet_imagenet, utility]
FOLDER = Path(__file__).parents[2] / "recipes"
REQUIRED = {
    bert_squad: [],
    graph_network: [],
    resnet_cifar10: ["--checkpoint=resnet20.pt"],
    resnet_imagenet: ["--data=images"],
    utility: [],
}


def read(recipe, *words):
    values = make_parser(recipe.main).parse_args([*REQUIRED[recipe], *words]).as_dict()
    scheme, options, others = split_scheme_and_options(values)
    return scheme, options, others


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_every_field_of_the_scheme_and_of_the_options(recipe):
    text = make_parser(recipe.main).format_help()
    names = [field.name for field in fields(QuantizationScheme)]
    for field in fields(PipelineOptions):
        value = getattr(PipelineOptions(), field.name)
        names += [f"{field.name}.{inner.name}" for inner in fields(value)] if is_dataclass(value) else [field.name]
    for name in ("pipeline", "output", *names):
        assert f"--{name} " in text, name


@pytest.mark.parametrize(
    "recipe,bits", [(bert_squad, (4, 8)), (graph_network, (4, 4)), (resnet_cifar10, (4, 4)), (resnet_imagenet, (4, 8))]
)
def test_each_recipe_has_its_own_default_bit_widths(recipe, bits):
    scheme, options, _ = read(recipe)
    assert (scheme.weight_bits, scheme.activation_bits) == bits
    # The parser makes lists of what the dataclasses hold as tuples.
    assert options.to_dict() == PipelineOptions(seed=0).to_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_fields_are_read_from_the_command_line(recipe):
    scheme, options, _ = read(
        recipe,
        "--weight_bits=4",
        "--activation_bits=null",
        "--group_size=32",
        "--target=null",
        '--overrides={"head": null, "layer1.*": [4, 8]}',
        "--per_token=true",
        "--seed=3",
        "--adaquant.iterations=120",
        "--allocation.compression=0.094",
        "--allocation.candidates=[[2, 8], [4, null]]",
        "--calibration.observer=minmax",
        "--calibration.percentile=99.5",
        "--batch_norm_tuning.reference=training",
        "--bias_tuning.epochs=2",
        "--storage.activation_budget=2GB",
    )
    assert (scheme.weight_bits, scheme.activation_bits, scheme.group_size, scheme.per_token) == (4, None, 32, True)
    assert scheme.overrides == {"head": None, "layer1.*": [4, 8]}
    assert options.adaquant.iterations == 120 and options.preparation.iterations == 100
    assert options.allocation.compression == 0.094
    assert [list(pair) for pair in options.allocation.candidates] == [[2, 8], [4, None]]
    assert (options.calibration.observer, options.calibration.percentile) == ("minmax", 99.5)
    assert options.batch_norm_tuning.reference == "training" and options.bias_tuning.epochs == 2
    assert options.storage.activation_budget == "2GB" and options.seed == 3


def test_the_papers_settings_of_adaquant_are_a_file_that_goes_with_others(tmp_path):
    paper = f"--config={FOLDER / 'paper_adaquant.yaml'}"
    _, options, _ = read(resnet_cifar10, paper)
    assert options.adaquant == AdaQuantOptions.paper()
    few = f"--config={FOLDER / 'resnet_imagenet' / 'few_images.yaml'}"
    _, options, others = read(resnet_imagenet, paper, few, "--adaquant.batch_size=2")
    assert (options.adaquant.granularity, options.adaquant.schedule) == ("layer", "constant")
    assert (options.adaquant.iterations, options.adaquant.batch_size) == (120, 2)
    assert others["calibration_samples"] == 100


def test_no_file_but_the_papers_has_rates_of_its_own():
    files = list(FOLDER.glob("*/*.yaml"))
    assert len(files) > 10 and not [path.name for path in files if "_rate" in path.read_text()]


@pytest.mark.parametrize(
    "word,message",
    [
        ("--adaquant.iteration=3", "adaquant.iteration"),
        ("--weight_bit=3", "weight_bit"),
        ("--weight_bits=1", "weight_bits must be"),
        ("--adaquant.iterations=0", "options.adaquant: iterations must be an integer of at least 1, got 0"),
        ("--pipeline=fast", "pipeline"),
    ],
)
def test_a_wrong_option_or_value_is_said_without_a_traceback(word, message, capsys):
    with pytest.raises(SystemExit):
        run_recipe(resnet_cifar10.main, [*REQUIRED[resnet_cifar10], word])
    assert message in capsys.readouterr().err


def test_groups_of_weights_alone_go_through_a_recipe(tiny_cifar, cifar_checkpoint, tmp_path):
    words = {"checkpoint": cifar_checkpoint, "data": tiny_cifar, "output": tmp_path / "out", "accelerator": "cpu"}
    words |= {
        "weight_bits": 4,
        "activation_bits": "null",
        "group_size": 32,
        "target": "null",
        "calibration_samples": 32,
    }
    words |= {"calibration_samples": 32, "adaquant.iterations": 2, "bias_tuning.epochs": 1}
    run_recipe(resnet_cifar10.main, [f"--{name}={value}" for name, value in words.items()])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {layer["activation_bits"] for layer in record["layers"]} == {None}
    assert {layer["weight_bits"] for layer in record["layers"]} == {4, 8}
    assert all(layer["error_after"] <= layer["error_before"] for layer in record["layers"])
    configuration = (tmp_path / "out" / "report.html").read_text()
    assert "group_size" in configuration and "AdaQuant" in configuration
