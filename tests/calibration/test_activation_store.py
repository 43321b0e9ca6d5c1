import shutil

import pytest
import torch

from lightning_calibtip.calibration.activation_store import ActivationStore, parse_bytes, parse_precision
from lightning_calibtip.calibration.options import StorageOptions
from lightning_calibtip.calibration.recording import Recording, UnitCall


@pytest.fixture
def batches(generator):
    return [torch.randn(n, 3, 4, 5, generator=generator) for n in (8, 8, 8, 3)]


@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_was_appended_comes_back_by_position_and_by_rows(batches, budget, channels_last, tmp_path):
    with ActivationStore(budget, folder=tmp_path) as store:
        series = store.series(4, channels_last)
        for batch in batches:
            series.append(batch)
        for position, batch in enumerate(batches):
            assert torch.equal(series[position], batch) and series[position].is_contiguous()
        index = torch.tensor([26, 0, 9, 9])
        rows = series.rows(index)
        assert torch.equal(rows, torch.cat(batches)[index])
        assert rows.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert bool(list(tmp_path.iterdir())) == (budget == 0)


def test_what_comes_back_is_a_copy(batches):
    series = ActivationStore().series(4)
    for batch in batches:
        series.append(batch)
    series[0].zero_()
    series.rows(torch.tensor([0])).zero_()
    assert torch.equal(series[0], batches[0])


@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
def test_later_tensors_may_be_longer_or_of_another_shape(budget, tmp_path):
    tensors = [torch.rand(2, 3), torch.rand(50, 3), torch.rand(4, 4)]
    with ActivationStore(budget, folder=tmp_path) as store:
        series = store.series(3)
        for tensor in tensors[:2]:
            series.append(tensor)
        assert series.aligned
        assert torch.equal(series.rows(torch.tensor([51])), tensors[1][49:])
        series.append(tensors[2])
        assert not series.aligned
        assert all(torch.equal(series[i], tensor) for i, tensor in enumerate(tensors))


def test_memory_is_used_up_to_the_budget_and_given_back(batches, tmp_path):
    one = 4 * batches[0].nbytes
    with ActivationStore(int(2.5 * one), folder=tmp_path) as store:
        several = [store.series(4) for _ in range(3)]
        for series in several:
            for batch in batches:
                series.append(batch)
        assert (store.in_memory, store.on_disk, store.most_held) == (2 * one, one, 3 * one)
        for series in several:
            series.free()
        assert (store.in_memory, store.on_disk) == (0, 0)
        (scratch,) = tmp_path.iterdir()
        assert not list(scratch.glob("*.bin"))
    assert not list(tmp_path.iterdir())


def test_the_scratch_folder_goes_also_after_an_error(batches, tmp_path):
    with pytest.raises(ZeroDivisionError), ActivationStore(0, folder=tmp_path / "new") as store:
        series = store.series(1)
        series.append(batches[0])
        assert len(list((tmp_path / "new").iterdir())) == 1
        1 / 0  # noqa: B018
    assert not list((tmp_path / "new").iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(batches, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("."))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with ActivationStore(0, folder=tmp_path) as store:
        series = store.series(4)
        with pytest.raises(OSError, match=r"need 1,920 bytes in .*, which has 1,000 free: raise activation_budget"):
            series.append(batches[0])
        (scratch,) = tmp_path.iterdir()
        assert not list(scratch.glob("*.bin"))


def test_bfloat16_takes_half_of_the_space_and_leaves_integers_alone(batches):
    store = ActivationStore(precision=torch.bfloat16)
    series, whole = store.series(2), store.series(2)
    for batch in batches[:2]:
        series.append(batch)
    assert store.in_memory == batches[0].nbytes
    assert series[1].dtype == torch.float32
    torch.testing.assert_close(series[1], batches[1], rtol=2**-8, atol=0)
    for number in (123456789, 1):
        whole.append(torch.tensor([number]))
    assert whole[0].tolist() == [123456789]


def test_equal_tensors_are_kept_once():
    store, mask = ActivationStore(), torch.rand(4, 6)
    series = store.series(3)
    for _ in range(3):
        series.append(mask.clone())
    assert series.constant and store.in_memory == mask.nbytes
    assert torch.equal(series[2], mask) and torch.equal(series.rows(torch.tensor([5])), mask[1:2])
    series.append(mask + 1)
    assert not series.constant
    assert torch.equal(series[2], mask) and torch.equal(series[3], mask + 1)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1])
def test_tensors_that_begin_alike_are_not_taken_for_equal(precision, budget):
    first = torch.randn(4, 6).bfloat16().float()
    second = first.clone()
    second[3, 5] = 2.0
    with ActivationStore(budget, precision) as store:
        series = store.series(2)
        series.append(first)
        series.append(second)
        assert not series.constant and torch.equal(series[0], first) and torch.equal(series[1], second)
        assert torch.equal(series.view(1), second) and series.view(1).dtype == torch.float32


def test_views_of_a_recording_are_not_copies():
    recording = Recording(ActivationStore(), 2)
    values = [{"x": torch.rand(2, 3), "flag": True} for _ in range(2)]
    for value in values:
        recording.append(value)
    for _ in range(2):
        for view, value in zip(recording.views(), values, strict=True):
            assert view["flag"] and torch.equal(view["x"], value["x"])
            view["x"].add_(1)
            value["x"].add_(1)


def test_a_recording_keeps_nested_values_and_gives_zeros_for_what_is_forgotten():
    store = ActivationStore()
    recording = Recording(store, 2)
    values = [UnitCall((torch.rand(2, 3), "flag"), {"mask": torch.rand(2)}) for _ in range(2)]
    for value in values:
        recording.append(value)
    assert recording.nested_alike and len(recording) == 2
    (x, flag), kwargs = recording[1]
    assert (
        isinstance(recording[1], UnitCall)
        and torch.equal(x, values[1][0][0])
        and flag == "flag"
        and torch.equal(kwargs["mask"], values[1][1]["mask"])
    )
    recording.forget()
    assert store.in_memory == 0
    (x, flag), _ = recording[1]
    assert torch.equal(x, torch.zeros(2, 3)) and flag == "flag"


def test_values_that_do_not_agree_have_no_columns():
    recording = Recording(ActivationStore(), 2)
    recording.append([torch.zeros(1), 1])
    recording.append([torch.zeros(1), 2])
    assert recording.nested_alike and recording.columns() is None


@pytest.mark.parametrize(
    "text,wanted",
    [(5, 5), ("7", 7), ("2GB", 2 * 10**9), ("1.5 kb", 1500), ("3MiB", 3 * 2**20), ("1g", 10**9), (None, None)],
)
def test_sizes_are_numbers_or_strings(text, wanted):
    assert parse_bytes(text, "activation_budget") == wanted


@pytest.mark.parametrize("text", ["2 apples", "", "-1GB", 0, -5, True, float("nan"), "1e9", [1]])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="activation_budget must be a positive number of bytes or a string such as"):
        parse_bytes(text, "activation_budget")


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'int8'"):
        parse_precision("int8", "precision")


@pytest.mark.parametrize(
    "options,message",
    [({"activation_budget": "much"}, "activation_budget must be"), ({"precision": "int8"}, "precision must be one of")],
)
def test_storage_options_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        StorageOptions(**options)


def test_storage_options_open_a_store(tmp_path):
    with StorageOptions("1KB", "bfloat16", tmp_path).open() as store:
        assert (store.budget, store.precision, store.folder) == (1000, torch.bfloat16, tmp_path)
