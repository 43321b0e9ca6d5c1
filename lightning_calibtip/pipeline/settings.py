"""Settings of a run for its report: those of the stages that ran, and of everything else."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from ..calibration.options import StorageOptions
from ..callbacks.stage import Stage
from ..network.scheme import QuantizationScheme
from ..report.settings import Setting, flat_settings
from .options import PipelineOptions, plain_values


def run_settings(configuration: Mapping[str, Any], stages: Mapping[str, Stage]) -> list[Setting]:
    """List the settings of a run: what is in its configuration, but of the stages' options only those that had a part.

    Args:
        configuration: Settings by name, those of stages nested.
        stages: The stages that ran, by their names in the run; none where this is not known.

    Example:
        >>> from lightning_calibtip.callbacks.bias_tuning import BiasTuning
        >>> configuration = {"weight_bits": 4, **PipelineOptions.of({"bias_tuning": {"epochs": 2}}).to_dict()}
        >>> settings = run_settings(configuration, {"BiasTuning": BiasTuning(epochs=2)})
        >>> [(setting.group, setting.name, setting.value) for setting in settings if not setting.is_default]
        [('', 'weight_bits', '4'), ('BiasTuning', 'epochs', '2')]
    """
    if stages:
        # The stages themselves know better which options they had.
        of_stages = {declared.name for declared in fields(PipelineOptions) if callable(declared.default_factory)}
        configuration = {name: value for name, value in configuration.items() if name not in of_stages}
    of_run = {
        declared.name: declared.default for declared in fields(PipelineOptions) if declared.default is not MISSING
    }
    defaults = {**QuantizationScheme().to_dict(), **of_run, "ckpt_path": None}
    found = list(flat_settings("", plain_values(configuration), defaults))
    for name, stage in stages.items():
        options = getattr(stage, "options", None)
        if is_dataclass(options) and not isinstance(options, type):
            found += flat_settings(name, plain_values(options), plain_values(type(options)()))
        if (candidates := getattr(stage, "candidates", None)) is not None:
            found.append(Setting(name, "candidates", str(candidates)))
    return found + _storage(list(stages.items()))


def _storage(stages: Sequence[tuple[str, Stage]]) -> list[Setting]:
    """Options of storage, which in a pipeline all stages share."""
    found = {name: getattr(stage, "storage", None) for name, stage in stages}
    storages = {name: storage for name, storage in found.items() if isinstance(storage, StorageOptions)}
    defaults = plain_values(StorageOptions())
    if len(set(map(repr, storages.values()))) == 1:
        return list(flat_settings("storage", plain_values(next(iter(storages.values()))), defaults))
    return [
        setting
        for name, storage in storages.items()
        for setting in flat_settings(f"{name}, storage", plain_values(storage), defaults)
    ]
