"""The command line, from fit to export, for the user's own LightningModule and DataModule."""

import logging
from dataclasses import fields
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from .diagnosis.options import DiagnosisOptions
from .network.checkpoint import is_quantized
from .pipeline.arguments import add_scheme_and_options, split_scheme_and_options
from .trainer import QuantizationTrainer

_DIAGNOSIS = {field.name for field in fields(DiagnosisOptions)}


class QuantizationCLI(LightningCLI):
    """The commands ``fit``, ``validate``, ``test``, ``predict``, ``quantize``, ``diagnose`` and ``export``.

    Example:
        >>> sorted(QuantizationCLI.subcommands())
        ['diagnose', 'export', 'fit', 'predict', 'quantize', 'test', 'validate']
    """

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """The commands, and which of their arguments come from elsewhere."""
        data = {"model", "datamodule"}
        return {
            "fit": {*data, "train_dataloaders", "val_dataloaders"},
            "validate": {*data, "dataloaders"},
            "test": {*data, "dataloaders"},
            "predict": {*data, "dataloaders"},
            "quantize": {*data, "scheme", "options"},
            "export": data,
            "diagnose": {*data, "options"},
        }

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Take no abbreviations: a slip of the keys must not start a run."""
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Give ``quantize`` an argument for each field of the scheme and of the options, ``diagnose`` of its own."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "quantize":
            add_scheme_and_options(parser)
        elif subcommand == "diagnose":
            parser.add_class_arguments(DiagnosisOptions, nested_key=None)
        return parser

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Pass these fields on as the scheme and the options."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "quantize":
            scheme, options, _ = split_scheme_and_options(self.config_init[subcommand].as_dict())
            arguments |= {"scheme": scheme, "options": options}
        elif subcommand == "diagnose":
            given = self.config_init[subcommand].as_dict()
            arguments["options"] = DiagnosisOptions(**{f.name: given[f.name] for f in fields(DiagnosisOptions)})
            arguments = {name: value for name, value in arguments.items() if name not in _DIAGNOSIS}
        return arguments

    @override
    def _parse_ckpt_path(self) -> None:
        """Take a model's arguments from its checkpoint; a quantized one holds bit-widths instead."""
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if not path or not is_quantized(path):
            super()._parse_ckpt_path()


def main() -> None:
    """Run the command line. See ``QuantizationCLI``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    QuantizationCLI(
        trainer_class=QuantizationTrainer,
        save_config_callback=None,
        parser_kwargs={"prog": "python -m lightning_calibtip"},
    )
