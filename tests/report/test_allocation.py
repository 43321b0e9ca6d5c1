import csv

import pytest

from lightning_calibtip.allocation.outcome import Allocation, Point
from lightning_calibtip.allocation.table import Conditions, SensitivityTable, read_table
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.report.allocation import allocation_items

BASE, W2, W4 = BitWidths(8, 8), BitWidths(2, 8), BitWidths(4, 4)


def point(label, bits, compression, loss, **metrics):
    return Point(label, bits, compression, loss, 1.1 * loss, {"compression": compression}, metrics)


@pytest.fixture
def allocation():
    names = [f"layer{i}.conv" for i in range(80)]
    table = SensitivityTable(Conditions("m", "s", "kl", 8, BASE), 0.01)
    for index, name in enumerate(names):
        table.losses[name] = {W2: 0.01 + 0.001 * index, W4: 0.0099}
    mixed = {name: [W2, W4, BASE][index % 3] for index, name in enumerate(names)}
    curve = [point("0.1", mixed, 0.098, 0.5, top1=0.8), point("0.2", mixed, 0.197, 0.1, top1=0.85)]
    uniform = [point("W2A8", mixed, 0.0625, 2.0, top1=0.1), point("W8A8", mixed, 0.25, 0.0, top1=0.9)]
    return Allocation(curve[1], curve, uniform, table)


def test_items_tell_bits_sensitivities_and_the_trade_off(allocation):
    bits, sensitivity, trade_off = allocation_items(allocation)
    assert bits.rows[3] == ["layer3.conv", 2, 8, pytest.approx(0.003)]
    assert bits.rows[2][1:] == [8, 8, 0.0]
    assert sensitivity.columns == ["layer", "W2A8", "W4A4"]
    assert sensitivity.rows[5] == ["layer5.conv", pytest.approx(0.005), pytest.approx(-0.0001)]
    assert trade_off.columns == ["model", "kind", "compression", "predicted loss", "measured loss", "top1"]
    assert trade_off.rows[0] == ["0.1", "mixed", 0.098, 0.5, pytest.approx(0.55), 0.8]
    assert [row[1] for row in trade_off.rows] == ["mixed", "mixed", "uniform", "uniform"]


def test_each_item_has_a_title_of_its_own(allocation):
    titles = [item.title for item in allocation_items(allocation)]
    assert titles == ["Bit-widths chosen", "Sensitivity of each layer", "Trade-off of size and loss"]


def test_candidates_that_leave_a_half_in_float_have_short_names_and_no_bits(allocation):
    weights_only = BitWidths(4, None)
    for losses in allocation.sensitivity.losses.values():
        losses[weights_only] = 0.02
    allocation.chosen.bits["layer0.conv"] = weights_only
    bits, sensitivity, _ = allocation_items(allocation)
    assert bits.rows[0] == ["layer0.conv", 4, None, pytest.approx(0.01)]
    assert sensitivity.columns == ["layer", "W2A8", "W4A4", "W4"]
    figure = bits.draw()
    assert len(figure.axes[0].patches) == 80 and len(figure.axes[0].lines[0].get_xdata()) == 79


def test_there_is_no_trade_off_of_a_single_point(allocation):
    single = Allocation(allocation.chosen, [allocation.chosen], [], allocation.sensitivity)
    assert [item.name for item in allocation_items(single)] == ["allocation", "sensitivity"]


def test_figures_have_labelled_axes_and_every_layer(allocation):
    bits, sensitivity, trade_off = (item.draw() for item in allocation_items(allocation))
    for figure in (bits, sensitivity):
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == list(allocation.chosen.bits)
        assert axes.get_ylabel() and axes.get_xlabel() and figure.get_figwidth() > 16
    assert len(bits.axes[0].patches) == 80
    assert sensitivity.axes[0].images[0].get_array().shape == (2, 80)
    losses, metric = trade_off.axes
    assert metric.get_ylabel() == "top1" and "KL divergence" in losses.get_ylabel() and "size" in metric.get_xlabel()
    assert {text.get_text() for text in losses.texts} == {"W2A8", "W8A8"}


def test_items_are_written_as_csv_and_png(allocation, tmp_path):
    for item in allocation_items(allocation):
        item.save(tmp_path / "out")
        assert (tmp_path / "out" / f"{item.name}.png").stat().st_size > 5000
        assert len(item.text.splitlines()) == 2 + len(item.rows)
    with (tmp_path / "out" / "trade_off.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][0] == "model" and len(rows) == 5
    # The table of sensitivities can be taken again.
    assert read_table(tmp_path / "out" / "sensitivity.csv") == allocation.sensitivity
