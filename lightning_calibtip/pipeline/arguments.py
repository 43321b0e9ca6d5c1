"""Command-line arguments for the fields of QuantizationScheme and PipelineOptions, for parsers of jsonargparse."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..network.scheme import QuantizationScheme
from .options import PipelineOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_scheme_and_options(
    parser: "ArgumentParser", scheme: QuantizationScheme | None = None, options: PipelineOptions | None = None
) -> None:
    """Add an argument for every field: ``--weight_bits``, ``--adaquant.iterations``, ``--allocation.compression``, ...

    Args:
        parser: Parser of jsonargparse; it gets the same names in its configuration files.
        scheme: Defaults of the scheme's fields.
        options: Defaults of the options' fields.

    Example:
        >>> from jsonargparse import ArgumentParser
        >>> parser = ArgumentParser()
        >>> add_scheme_and_options(parser, QuantizationScheme(weight_bits=4))
        >>> given = parser.parse_args(["--activation_bits=null", "--adaquant.iterations=200"])
        >>> scheme, options, others = split_scheme_and_options(given.as_dict())
        >>> scheme.weight_bits, scheme.activation_bits, options.adaquant.iterations, others
        (4, None, 200, {})
    """
    for defaults in (scheme or QuantizationScheme(), options or PipelineOptions()):
        parser.add_class_arguments(type(defaults), nested_key=None)
        parser.set_defaults(_defaults(defaults))


def split_scheme_and_options(
    values: Mapping[str, Any],
) -> tuple[QuantizationScheme, PipelineOptions, dict[str, Any]]:
    """Split what a parser has read into the scheme, the options, and everything else.

    Args:
        values: Values by the names of arguments; a stage's options may be a nested mapping.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        See ``add_scheme_and_options``.
    """
    of_scheme, of_options = ({field.name for field in fields(kind)} for kind in (QuantizationScheme, PipelineOptions))
    scheme = QuantizationScheme(**{name: value for name, value in values.items() if name in of_scheme})
    options = PipelineOptions.of({name: value for name, value in values.items() if name in of_options})
    return scheme, options, {name: value for name, value in values.items() if name not in of_scheme | of_options}


def _defaults(options: Any) -> dict[str, Any]:
    """Values of the fields by name, with those of a nested dataclass as a mapping."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: _defaults(value) if is_dataclass(value) else value for name, value in values.items()}
