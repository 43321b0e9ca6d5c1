"""AdaQuant at several bit-widths: a reconstructed state of each layer for every candidate of bit allocation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import ranks
from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.progress import ProgressCallback, no_progress, part_of
from ..calibration.replay import NotReachedError
from ..files.state_folder import holding
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.shared import work_of
from ..network.states import LayerState
from ..quantization.quantizers import Quantizer
from ..quantization.spec import BitWidths, LayerConfig
from .adaquant import left_as_it_was, open_finished, prepare_units, reconstruct, summary_of
from .float_stream import FloatRecord, FloatStream
from .optimize import UnitResult
from .options import AdaQuantOptions
from .resume import FinishedUnits
from .unit_data import UnitData
from .units import Unit


def check_candidates(options: AdaQuantOptions, candidates: Sequence[BitWidths]) -> None:
    """Raise ``ValueError`` unless there are candidates, to be reconstructed in parallel and layer by layer.

    Args:
        options: Options of the reconstruction.
        candidates: Bit-widths.

    Example:
        >>> check_candidates(AdaQuantOptions(mode="parallel", granularity="layer"), [BitWidths(4, 8)])
    """
    if (options.mode, options.granularity, len(options.blocks)) != ("parallel", "layer", 0) or not candidates:
        raise ValueError(
            f'candidates must not be empty and need mode="parallel", granularity="layer" and no blocks, got '
            f"{[candidate.label for candidate in candidates]}, {options.mode!r}, {options.granularity!r} and "
            f"{list(options.blocks)}: states that were reconstructed together cannot be mixed."
        )


def adaquant_candidates(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: AdaQuantOptions,
    candidates: Sequence[BitWidths],
    store: ActivationStore | None = None,
    state_folder: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[BitWidths, list[UnitResult]]:
    """Run parallel AdaQuant at each candidate's bit-widths and keep the results as each layer's ``variants``.

    Only parallel reconstruction of single layers makes states that can be mixed: a sequential one assumes the
    bit-widths of the layers before it. For the same reason the range of a tensor that several layers read stays as it
    was calibrated. The float model is walked once for all candidates; layers with pinned bit-widths are reconstructed
    once, and so are candidates that come to the same format of a layer. Afterwards each searchable layer has its former
    bit-widths if these are among the candidates, else the widest ones.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: Options of a parallel reconstruction by layers.
        candidates: Bit-widths to reconstruct at.
        store: Store of captured activations; all in memory if None.
        state_folder: Folder for the finished units, from which a killed run is resumed; None to keep none.
        progress: Progress callback, over the optimiser's steps on all units and candidates.

    Returns:
        The units' results by candidate.

    Raises:
        RuntimeError: If the model is not calibrated, or there is no calibration batch.
        ValueError: If the options are sequential or by blocks, there is no candidate, or ``state_folder`` holds another
            run.

    Example:
        See ``adaquant``, which differs in the arguments only.
    """
    check_candidates(options, candidates)
    with holding(state_folder):
        return _adaquant_candidates(
            network, calibration, options, candidates, store or ActivationStore(), state_folder, progress
        )


def _adaquant_candidates(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: AdaQuantOptions,
    candidates: Sequence[BitWidths],
    store: ActivationStore,
    state_folder: Path | None,
    progress: ProgressCallback,
) -> dict[BitWidths, list[UnitResult]]:
    network.warn_of_equalization()
    former = {name: network.layers[name].config for name in network.searchable_layers}
    # Ratios do not belong to the formats that are to be compared.
    options = replace(options, ratio_rate=0.0)
    work = _Work(network, options, list(dict.fromkeys(candidates)), progress)
    units = prepare_units(network, calibration, options)
    if state_folder is not None:
        labels = [candidate.label for candidate in candidates]
        work.finished = open_finished(
            state_folder, options, units, network, calibration, store, candidates=labels, scheme=network.scheme
        )
    work.total = sum(len(list(work.versions(unit))) for unit in units)
    results: dict[BitWidths, list[UnitResult]] = {candidate: [] for candidate in candidates}
    floats = FloatStream(network, calibration, options, units, store)
    structure = network.structure
    assert structure is not None
    owners = ranks.deal([sum(work_of(layer, structure) for layer in unit.layers) for unit in units])
    by_unit: dict[int, dict[_Key, UnitResult]] = {}
    left: set[str] = set()
    for position, unit in enumerate(units):
        is_mine = owners[position] == ranks.rank()
        try:
            record = floats.record(unit, keep_inputs=is_mine)
        except NotReachedError as error:
            left_as_it_was(unit, str(error))
            left.add(unit.name)
            continue
        if is_mine:
            with ranks.alone():
                by_unit[position] = {
                    key: work.reconstruct(position, unit, candidate, record) for key, candidate in work.versions(unit)
                }
        floats.finish(unit, record)
    floats.forget()
    by_unit = _exchange(network, units, by_unit)
    for position, unit in enumerate(units):
        for candidate in candidates:
            if (result := by_unit.get(position, {}).get(work.key(unit, candidate))) is not None:
                results[candidate].append(result)
    reconstructed = {layer.name for unit in units if unit.name not in left for layer in unit.layers}
    widest = max(candidates, key=lambda candidate: (candidate.total, candidate.sort_key))
    for name, config in former.items():
        layer, configs = network.layers[name], [network.config_for(name, candidate) for candidate in candidates]
        if name not in reconstructed:
            # Embeddings, and what some batches do not reach: their states come from ranges alone.
            for other in configs:
                _make_variant(layer, other)
        plain = config.without_equalization
        layer.switch(plain if plain in configs else network.config_for(name, widest))
    return results


def _exchange(
    network: QuantizedNetwork, units: Sequence[Unit], mine: dict[int, dict["_Key", UnitResult]]
) -> dict[int, dict["_Key", UnitResult]]:
    """Give all ranks the results and the states of the units that each has reconstructed."""
    if ranks.rank_count() == 1:
        return mine
    variants = {
        layer.name: [ranks.to_cpu(state.to_dict()) for state in (*layer.variants.values(), layer.save())]
        for position in mine
        for layer in units[position].layers
    }
    everything: dict[int, dict[_Key, UnitResult]] = {}
    for results, found in ranks.from_all((mine, variants)):
        everything |= results
        for name, states in found.items():
            layer = network.layers[name]
            *others, present = map(LayerState.from_dict, states)
            layer.variants |= {state.config: state for state in others}
            layer.restore(present)
    return everything


# Formats of a unit's layers, and of those that own their weights: what tells versions of a unit apart.
_Key = tuple[LayerConfig, ...]


@dataclass
class _Work:
    """The reconstructions of each unit, one for each format that the candidates come to."""

    network: QuantizedNetwork
    options: AdaQuantOptions
    candidates: list[BitWidths]
    progress: ProgressCallback
    finished: FinishedUnits | None = None
    total: int = 0
    done: int = 0

    def config(self, layer: QuantizedLayer, candidate: BitWidths) -> LayerConfig:
        """Format of a layer at a candidate; of a pinned one, its own."""
        pinned = layer.name not in self.network.searchable_layers
        return layer.config if pinned else self.network.config_for(layer.name, candidate)

    def key(self, unit: Unit, candidate: BitWidths) -> _Key:
        """What the unit's reconstruction at a candidate depends on."""
        return tuple(self.config(layer, candidate) for layer in _with_owners(unit))

    def versions(self, unit: Unit) -> Iterator[tuple[_Key, BitWidths]]:
        """Each format of the unit that is quantized at all, with the first candidate that comes to it."""
        first: dict[_Key, BitWidths] = {}
        for candidate in self.candidates:
            first.setdefault(self.key(unit, candidate), candidate)
        return ((key, candidate) for key, candidate in first.items() if not all(config.is_float for config in key))

    def reconstruct(self, position: int, unit: Unit, candidate: BitWidths, record: FloatRecord) -> UnitResult:
        """Reconstruct a unit at a candidate, or load what a killed run has found; keeps its layers' variants."""
        for layer in _with_owners(unit):
            if layer.name in self.network.searchable_layers:
                config = self.config(layer, candidate)
                if layer in unit.layers:
                    layer.variants.pop(config, None)
                layer.switch(config)
        report = part_of(self.progress, self.done, self.total, f"{candidate.label} ")
        result = self.finished.load(position, unit, candidate.label) if self.finished else None
        if result is None:
            assert record.inputs is not None
            data = UnitData(record.inputs, record.targets, None, record.weights)
            result = reconstruct(unit, data, self.options, _read_elsewhere(unit), report)
            if self.finished:
                self.finished.save(position, unit, result, candidate.label)
        report(self.options.iterations, self.options.iterations, summary_of(result))
        self.done += 1
        for layer in unit.layers:
            if layer.name in self.network.searchable_layers:
                layer.variants[layer.config] = layer.save()
        return result


def _with_owners(unit: Unit) -> list[QuantizedLayer]:
    """The unit's layers, and those that own the weights of these."""
    owners = [layer.tied_to for layer in unit.layers if layer.tied_to is not None]
    return [*unit.layers, *owners]


def _read_elsewhere(unit: Unit) -> set[Quantizer]:
    """Quantizers of the unit's inputs that layers outside of it read as well, at some bit-widths."""
    inside = {layer.name for layer in unit.layers}
    return {
        quantizer
        for layer in unit.layers
        for tensor, quantizer in zip(layer.tensors, layer.input_quantizers, strict=True)
        if quantizer is not None and not inside.issuperset(tensor.readers)
    }


def _make_variant(layer: QuantizedLayer, config: LayerConfig) -> None:
    """Keep the state that a layer has in another format by ranges alone."""
    layer.variants.pop(config, None)
    layer.switch(config)
    layer.variants[config] = layer.save()
