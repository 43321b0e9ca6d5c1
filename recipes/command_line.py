"""Command lines of the recipes: a recipe's own arguments beside every field of the scheme and of the options."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_calibtip.pipeline.arguments import add_scheme_and_options, split_scheme_and_options


def make_parser(main: Callable[..., Any]) -> ArgumentParser:
    """Parser for a recipe: ``--config file.yaml``, the arguments of ``main``, and ``--weight_bits``,
    ``--adaquant.iterations`` and all other fields of ``QuantizationScheme`` and ``PipelineOptions``.

    Args:
        main: Function of the recipe. The defaults of its parameters ``scheme`` and ``options`` are the defaults of the
            fields.

    Example:
        >>> from recipes.resnet_cifar10.__main__ import main
        >>> given = make_parser(main).parse_args(["--checkpoint=resnet20.pt", "--allocation.compression=0.13"])
        >>> given.weight_bits, given.allocation.compression
        (4, 0.13)
    """
    command = f"python -m {main.__globals__['__package__']}"
    parser = ArgumentParser(prog=command, usage=f"{command} [--config FILE] [options]", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_function_arguments(main, as_positional=False, skip={"scheme", "options"})
    parameters = inspect.signature(main).parameters
    # The defaults of a recipe are those of its own scheme and options.
    add_scheme_and_options(parser, parameters["scheme"].default, parameters["options"].default)
    return parser


def run_recipe(main: Callable[..., Any], args: Sequence[str] | None = None) -> None:
    """Call a recipe's function with what its command line says; what is wrong with it is said without a traceback.

    Args:
        main: Function of the recipe, with parameters ``scheme`` and ``options``.
        args: Words of the command line; those of this process if None.

    Example:
        See ``make_parser``.
    """
    parser = make_parser(main)
    values = parser.parse_args(args).as_dict()
    values.pop("config", None)
    try:
        scheme, options, others = split_scheme_and_options(values)
    except ValueError as error:
        parser.error(str(error))
    main(**others, scheme=scheme, options=options)
