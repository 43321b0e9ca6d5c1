import json
from dataclasses import FrozenInstanceError

import pytest

from lightning_calibtip.quantization.spec import (
    BitWidths,
    LayerConfig,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorSpec,
    parse_bit_widths,
)

SPECS = [
    TensorSpec(),
    TensorSpec(4, True, PerChannel(1), one_sided=True),
    TensorSpec(3, granularity=PerGroup(64, 1)),
    TensorSpec(8, granularity=PerToken((-2, -1)), kind="logarithmic", nonnegative=True),
]


@pytest.mark.parametrize("spec", SPECS)
def test_specs_and_configs_survive_json(spec):
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    config = LayerConfig(spec, (None, spec), spec)
    again = LayerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_specs_are_values():
    assert len({TensorSpec(4), TensorSpec(4), TensorSpec(4, granularity=PerTensor())}) == 1
    with pytest.raises(FrozenInstanceError):
        TensorSpec().bits = 4


def test_integer_ranges():
    assert (TensorSpec(4).qmin, TensorSpec(4).qmax) == (0, 15)
    assert (TensorSpec(4, symmetric=True).qmin, TensorSpec(4, symmetric=True).qmax) == (-8, 7)


@pytest.mark.parametrize("bits", [1, 17, 4.0, True])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 16"):
        TensorSpec(bits)


def test_unknown_names_are_refused():
    values = TensorSpec().to_dict()
    with pytest.raises(ValueError, match="per_row"):
        TensorSpec.from_dict({**values, "granularity": {"name": "per_row"}})
    with pytest.raises(ValueError, match="no stride: it was written by a later release"):
        TensorSpec.from_dict({**values, "stride": 2})
    with pytest.raises(ValueError, match="The granularity per_group has no stride"):
        TensorSpec.from_dict({**values, "granularity": {"name": "per_group", "size": 2, "stride": 1}})
    config = LayerConfig(TensorSpec(4)).to_dict()
    with pytest.raises(ValueError, match="A layer's config has no bias"):
        LayerConfig.from_dict({**config, "bias": None})
    with pytest.raises(ValueError, match="A tensor's spec has no stride"):
        LayerConfig.from_dict({**config, "inputs": [{**values, "stride": 2}]})


def test_malformed_granularities_are_refused():
    for size in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=f"size of a group must be an integer of at least 1, got {size}"):
            PerGroup(size)
    for make in (PerChannel, lambda axis: PerGroup(8, axis)):
        with pytest.raises(ValueError, match="axis of channels must be an integer of at least 0, got -1"):
            make(-1)
    with pytest.raises(ValueError, match=r"granularity must be a PerTensor, .*got 'per_channel'"):
        TensorSpec(8, granularity="per_channel")
    with pytest.raises(ValueError, match="nonnegative tensor has unsigned integers"):
        TensorSpec(8, symmetric=True, nonnegative=True)
    with pytest.raises(ValueError, match="kind must be the name of a registered kind of quantizer, got 3"):
        TensorSpec(8, kind=3)


def test_configs_are_keys_of_dictionaries_also_when_made_of_lists():
    results = {LayerConfig(TensorSpec(4), (TensorSpec(8, granularity=PerToken((-1,))),)): "found"}
    assert results[LayerConfig(TensorSpec(4), [TensorSpec(8, granularity=PerToken([-1]))])] == "found"
    assert LayerConfig(TensorSpec(4), (None,)) not in results


def test_bit_widths_of_a_config_are_the_effective_ones():
    eight, four = TensorSpec(8), TensorSpec(4)
    assert LayerConfig(four, (None, eight)).bit_widths == BitWidths(4, 8)
    assert LayerConfig(None, (four,)).bit_widths == BitWidths(None, 4)
    assert LayerConfig(four, ()).bit_widths == BitWidths(4, None)
    assert LayerConfig(None, (None,)).is_float and not LayerConfig(None, (), eight).is_float


def test_candidates_in_every_spelling():
    assert parse_bit_widths(4, "x") == BitWidths(4, 4)
    assert parse_bit_widths(4, "x", quantizes_activations=False) == BitWidths(4, None)
    assert parse_bit_widths((None, 8), "x") == BitWidths(None, 8)
    assert [BitWidths(*pair).label for pair in ((4, 8), (4, None), (None, 8), (None, None))] == [
        "W4A8",
        "W4",
        "A8",
        "float",
    ]
    assert sorted([BitWidths(4, None), BitWidths(8, 8), BitWidths(4, 8)], key=lambda b: b.sort_key)[0] == BitWidths(
        4, 8
    )


@pytest.mark.parametrize("value", ["48", [4], [4, 8, 2], (4, 40), True, 4.0, None])
def test_malformed_candidates_are_refused_by_name(value):
    with pytest.raises(ValueError, match="candidates must be"):
        parse_bit_widths(value, "candidates")


def test_a_candidate_that_quantizes_nothing_is_refused():
    with pytest.raises(ValueError, match="candidates must quantize the weight or the activation"):
        parse_bit_widths((None, None), "candidates")
