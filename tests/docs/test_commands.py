"""Every YAML block and every command of README and docs/ is read by the program that it is for."""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterable
from types import ModuleType

import pytest
import yaml
from jsonargparse import ArgumentParser, auto_parser

from lightning_calibtip.cli import QuantizationCLI, QuantizationTrainer
from recipes.benchmark.__main__ import COMMANDS
from recipes.command_line import make_parser, run_recipe
from recipes.quickstart.__main__ import main as quickstart
from recipes.resnet_cifar10.__main__ import main as resnet_cifar10
from tests.cli_model import Blobs, Classifier
from tests.docs.pages import ROOT, blocks, inline_code

_OPTIONAL = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
EXTRAS = re.findall(r"^(\w+) = \[", _OPTIONAL, re.MULTILINE)
SETTINGS = blocks("yaml")


def commands(text: str) -> Iterable[list[str]]:
    """Words of each command of a Bash block; what begins with # is left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


class ReadingCLI(QuantizationCLI):
    """The command line, which reads its arguments and does nothing."""

    def _parse_ckpt_path(self):
        """The pages' checkpoints are the reader's."""

    def instantiate_classes(self):
        """Nothing is built."""

    def _run_subcommand(self, subcommand):
        """Nothing runs."""


def read_command_line(arguments: list[str]) -> None:
    ReadingCLI(
        trainer_class=QuantizationTrainer,
        save_config_callback=None,
        args=arguments,
        parser_kwargs={"exit_on_error": False},
    )


def read_recipe(module: str, arguments: list[str]) -> None:
    """Let the parser of ``python -m <module>`` read its arguments."""
    parser: ArgumentParser
    if module == "recipes.benchmark":
        parser = auto_parser(COMMANDS, as_positional=False)
    elif module == "recipes.quickstart":
        parser = auto_parser(quickstart, as_positional=False)
    else:
        parser = make_parser(importlib.import_module(f"{module}.__main__").main)
    parser.exit_on_error = False
    parser.parse_args(arguments)


def read_install(requirements: list[str]) -> None:
    """Extras of this package must exist; what else is installed has a name that can be one."""
    for requirement in requirements:
        name, _, extras = requirement.rstrip("]").partition("[")
        assert name in (".", "lightning-calibtip") or (not extras and re.fullmatch(r"[\w-]+", name)), requirement
        assert all(extra in EXTRAS for extra in extras.split(",") if extra), requirement


def read(words: list[str]) -> None:
    """Read a command as its program would.

    Raises:
        AssertionError: If nothing here knows how the program reads its arguments.
    """
    while re.fullmatch(r"[A-Z_]+=\w+", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "torchrun":
        assert arguments[0] == "--nproc_per_node" and arguments[1].isdigit() and arguments[2] == "-m"
        program, arguments = "python", arguments[2:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments and set(arguments) <= set(targets)
    elif program == "pip":
        assert arguments[0] == "install"
        read_install(arguments[1:])
    elif program == "jupyter":
        assert arguments[0] == "notebook" and (ROOT / arguments[1]).is_file()
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in arguments[2:] if not path.startswith("-"))
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith("tests."):
        assert importlib.util.find_spec(arguments[1]) is not None and len(arguments) == 2
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith("recipes."):
        read_recipe(arguments[1], arguments[2:])
    elif program == "python" and arguments[:2] == ["-m", "lightning_calibtip"]:
        read_command_line(arguments[2:])
    else:
        raise AssertionError(f"no test knows how {program} reads {shlex.join(arguments)}: teach it in this file")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The reader's own project and its YAML file, in a folder with the recipes."""
    project = ModuleType("my_project")
    project.Classifier, project.Images = Classifier, Blobs
    monkeypatch.setitem(sys.modules, "my_project", project)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in SETTINGS:
        name = re.match(r"# ([\w.]+)\n", block.text)
        assert name, f"the YAML of {block.key} does not begin with the name of its file"
        (tmp_path / name[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_calibtip"])
    return tmp_path


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.key)
def test_yaml_is_read_by_the_command_line(block, settings, capsys):
    name = re.match(r"# ([\w.]+)\n", block.text)[1]
    read_command_line(["quantize", f"--config={name}"])
    (settings / name).write_text(yaml.safe_dump({**yaml.safe_load(block.text), "modle": 1}))
    with pytest.raises((ArgumentError, SystemExit)) as caught:
        read_command_line(["quantize", f"--config={name}"])
    assert "modle" in f"{caught.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.key)
def test_commands_are_read_by_their_programs(block, settings):
    for words in commands(block.text):
        read(words)


def test_commands_within_the_text_are_read_by_their_programs(settings):
    complete = named = 0
    for page, text in inline_code():
        if not re.match(r"(make|pip|torchrun|python -m) ", text) or re.search(r"\.\.\.|\||-m$", text):
            continue
        words = shlex.split(text)
        if words[0] == "python" and not any(word.startswith("--") for word in words):
            # The program and at most its command are named, not how it is called.
            assert importlib.util.find_spec(f"{words[2]}.__main__") is not None, f"{page}: `{text}`"
            assert set(words[3:]) <= {*COMMANDS, *QuantizationCLI.subcommands()}, f"{page}: `{text}`"
            named += 1
            continue
        try:
            read(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page}: `{text}`: {error}")
        complete += 1
    assert complete > 5 and named > 0


def test_options_within_the_text_exist(settings):
    names = {"--stages", "--ckpt_path"}
    names |= {f"--{name}" for name in inspect.signature(QuantizationTrainer.diagnose).parameters}
    for recipe in ("bert_squad", "causal_lm", "resnet_cifar10", "resnet_imagenet", "utility"):
        names |= set(make_parser(importlib.import_module(f"recipes.{recipe}.__main__").main)._option_string_actions)
    for command in COMMANDS.values():
        names |= {f"--{name}" for name in inspect.signature(command).parameters}
    used = {
        (page, option)
        for page, text in inline_code()
        if not text.startswith(("pip", "torchrun"))
        for option in re.findall(r"(?:^|(?<= ))--[\w.]+", text)
    }
    assert len(used) > 30
    assert {(page, option) for page, option in used if option not in names} == set()


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make nothing", "nothing"),
        ('pip install ".[nothing]"', "nothing"),
        ("python -m recipes.resnet_cifar10 --checkpoint a --data b --weight_bit 4", "--weight_bit"),
        ("python -m recipes.benchmark accuracy --data a --netwerks resnet20", "--netwerks"),
        ("python -m lightning_calibtip quantize --config config.yaml --weigth_bits 4", "--weigth_bits"),
        ("ls docs", "ls"),
    ],
)
def test_a_wrong_command_is_noticed(command, wrong, settings, capsys):
    with pytest.raises((AssertionError, ArgumentError, SystemExit)) as caught:
        read(shlex.split(command))
    assert wrong in f"{caught.value} {capsys.readouterr().err}"


def test_no_block_goes_without_a_test():
    # Those without a language show what is printed.
    known = {"python", "bash", "yaml", ""}
    assert [block.key for block in blocks() if block.language not in known] == []


def test_readme_leads_with_the_two_commands():
    head = (ROOT / "README.md").read_text()[:800]
    assert "make quickstart" in head and "make test" in head


def test_readme_recipe_command_runs_as_written(tmp_path, tiny_cifar, cifar_checkpoint):
    words = next(
        words for block in blocks("bash") if block.key.startswith("README.md") for words in commands(block.text)
        if words[:3] == ["python", "-m", "recipes.resnet_cifar10"]
    )[3:]  # fmt: skip
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values["--data"] == "cifar10" and values["--output"].startswith("runs/")
    values |= {"--checkpoint": str(cifar_checkpoint), "--data": str(tiny_cifar), "--output": str(tmp_path / "out")}
    values |= {"--calibration_samples": "32", "--adaquant.iterations": "2", "--accelerator": "cpu"}
    run_recipe(resnet_cifar10, [word for pair in values.items() for word in pair])
    assert (tmp_path / "out" / "result.json").exists() and (tmp_path / "out" / "quantized.ckpt").exists()


def test_recipe_takes_its_options_from_yaml(tmp_path, tiny_cifar, cifar_checkpoint):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"checkpoint: {cifar_checkpoint}\ndata: {tiny_cifar}\npipeline: calibrate\nweight_bits: 5\n"
        f"calibration_samples: 16\naccelerator: cpu\noutput: {tmp_path / 'yaml'}\n"
    )
    run_recipe(resnet_cifar10, ["--config", str(config)])
    record = json.loads((tmp_path / "yaml" / "result.json").read_text())
    assert record["layers"][1]["weight_bits"] == 5
