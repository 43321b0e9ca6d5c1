import json
import math

import pytest

from lightning_calibtip.allocation.table import Conditions, SensitivityFile, SensitivityTable, read_table
from lightning_calibtip.quantization.spec import BitWidths as B

CONDITIONS = Conditions(model="abc", states="def", metric="kl", samples=16, base=B(8, 8))


def first_line(version):
    return f"# {json.dumps({'version': version, **vars(CONDITIONS), 'base': [8, 8]})}\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "table.csv"


def begun(path, *rows):
    with SensitivityFile(path, CONDITIONS) as file:
        file.add_base(0.25)
        for row in rows:
            file.add(*row)


def test_what_is_written_is_read_back(path):
    begun(path, ("conv1", B(2, 8), 0.75), ("conv1", B(4, 8), 1 / 3), ("a,b", B(2, 8), 1e-300))
    table = read_table(path)
    assert table.conditions == CONDITIONS and table.base_loss == 0.25
    assert table.losses == {"conv1": {B(2, 8): 0.75, B(4, 8): 1 / 3}, "a,b": {B(2, 8): 1e-300}}
    assert table.rise("conv1", B(2, 8)) == 0.5 and table.rise("conv1", B(8, 8)) == 0
    copy = path.with_name("copy.csv")
    table.write(copy)
    assert copy.read_bytes() == path.read_bytes()


def test_float_is_an_empty_cell(path):
    begun(path, ("conv1", B(4, None), 0.75), ("conv1", B(None, 8), 0.5))
    assert ",4,,0.75" in path.read_text() and ",,8,0.5" in path.read_text()
    assert read_table(path).losses == {"conv1": {B(4, None): 0.75, B(None, 8): 0.5}}


def test_a_table_of_version_1_is_read(path):
    path.parent.mkdir()
    path.write_text(first_line(1) + "layer,weight_bits,activation_bits,loss,rise\n,8,8,0.25,0.0\nconv1,2,8,0.75,0.5\n")
    table = read_table(path)
    assert table.conditions == CONDITIONS and table.losses == {"conv1": {B(2, 8): 0.75}}


def test_every_measurement_is_on_disk_at_once(path):
    with SensitivityFile(path, CONDITIONS) as file:
        file.add_base(0.25)
        file.add("conv1", B(2, 8), 0.75)
        assert read_table(path).losses == {"conv1": {B(2, 8): 0.75}}


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_broken_off_file_is_gone_on_with(path, cut):
    begun(path, ("conv1", B(2, 8), 0.75), ("conv2", B(2, 8), 0.5))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with SensitivityFile(path, CONDITIONS) as file:
        assert file.table.losses.keys() == ({"conv1", "conv2"} if cut == 0 else {"conv1"})
        if cut:
            file.add("conv2", B(2, 8), 0.5)
    assert path.read_bytes() == whole


def test_a_table_with_other_line_ends_is_gone_on_with(path):
    begun(path, ("conv1", B(2, 8), 0.75))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with SensitivityFile(path, CONDITIONS) as file:
        file.add("conv2", B(2, 8), 0.5)
    assert read_table(path).losses == {"conv1": {B(2, 8): 0.75}, "conv2": {B(2, 8): 0.5}}


def test_a_file_cut_in_its_first_lines_begins_anew(path):
    begun(path)
    first = path.read_bytes()
    for length in (0, 10, first.index(b"\n") + 3):
        path.write_bytes(first[:length])
        with SensitivityFile(path, CONDITIONS) as file:
            assert file.table is None
            file.add_base(0.25)
        assert read_table(path).base_loss == 0.25


def test_a_run_that_an_earlier_release_began_is_refused_with_what_to_do(path):
    path.parent.mkdir()
    path.write_text(first_line(1) + ",8,8,0.25,0.0\n")
    with pytest.raises(
        ValueError, match=r"begun by an earlier release \(version 1 .*: remove the file to measure anew"
    ):
        SensitivityFile(path, CONDITIONS)
    assert path.read_text().endswith(",8,8,0.25,0.0\n")


def test_float_at_the_base_is_null(path):
    conditions = Conditions(**{**vars(CONDITIONS), "base": B(8, None)})
    with SensitivityFile(path, conditions) as file:
        file.add_base(0.25)
    assert '"base": [8, null]' in path.read_text().splitlines()[0]
    assert read_table(path).conditions == conditions
    with SensitivityFile(path, conditions) as file:
        assert file.table.base_loss == 0.25
    with pytest.raises(ValueError, match="was begun with another base"):
        SensitivityFile(path, CONDITIONS)


@pytest.mark.parametrize(
    ("bits", "words"),
    [(B(4, None), "4 bits of weight and float activations"), (B(None, 8), "float weights and 8 of activation")],
)
def test_a_loss_that_is_not_finite_names_what_was_float(path, bits, words):
    with pytest.raises(ValueError, match=f"the loss with conv1 at {words} is nan"):
        begun(path, ("conv1", bits, math.nan))


def test_another_run_s_file_is_refused(path):
    begun(path)
    other = Conditions(**{**vars(CONDITIONS), "states": "other", "samples": 32})
    with pytest.raises(ValueError, match=r"table.csv was begun with another states, samples: repeat that run"):
        SensitivityFile(path, other)
    assert read_table(path).conditions == CONDITIONS


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_layer_and_choice_and_is_not_written(path, loss):
    with pytest.raises(ValueError, match=r"the loss with conv1 at 2 bits of weight and 8 of activation is (nan|inf)"):
        begun(path, ("conv1", B(2, 8), loss))
    assert read_table(path).losses == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layer,bits\nconv1,4\n", "is no sensitivity table: its first line"),
        ("# []\n", "is no sensitivity table"),
        (first_line(9), "has version 9, this release reads versions 1 and 2"),
        (first_line(1), "has no measurement of the base"),
        (first_line(1) + ",8,8,0.5,0\nconv1,2,8,x,0\n", "line 3: expected layer"),
        (first_line(1) + ",8,8,0.5,0\nconv1,2,8,nan,0\n", "line 3: the loss with"),
        (
            first_line(1) + "conv1,2,8,0.5,0\n",
            "line 2: the base .* must come first",
        ),
    ],
)
def test_a_file_that_is_no_table_says_where(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_rise_of_an_unmeasured_choice_is_a_key_error():
    with pytest.raises(KeyError):
        SensitivityTable(CONDITIONS, 0.0).rise("conv1", B(2, 8))


@pytest.mark.parametrize("line, message", [
    ("conv1,2,8,0.5,0.25", r"table.csv, line 5: the loss of conv1 at W2A8 is 0.5, but an earlier line says 0.75"),
    (",8,8,0.5,0.0", r"table.csv, line 5: the loss of the base is 0.5, but an earlier line says 0.25"),
])  # fmt: skip
def test_lines_that_contradict_each_other_are_refused(path, line, message):
    with SensitivityFile(path, CONDITIONS) as file:
        file.add_base(0.25)
        file.add("conv1", B(2, 8), 0.75)
    same = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*same, same[-1]]))
    assert read_table(path).losses == {"conv1": {B(2, 8): 0.75}}
    path.write_text("".join([*same, f"{line}\n"]))
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_names_that_look_like_formulas_come_back(path):
    begun(path, ("=HYPERLINK(1)", B(2, 8), 0.5), ("'-a", B(2, 8), 0.5), ("'b", B(2, 8), 0.5))
    assert list(read_table(path).losses) == ["=HYPERLINK(1)", "'-a", "'b"]
    assert [line[0] for line in path.read_text().splitlines()[3:]] == ["'", "'", "'"]
