"""``report.html``, as text and as a browser sees it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from lightning_calibtip import QuantizationScheme, quantize
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.report.item import ReportItem
from lightning_calibtip.report.layers import draw_bit_widths
from lightning_calibtip.report.numbers import signed
from lightning_calibtip.report.page import Section, render_page
from lightning_calibtip.report.reconstruction import reconstruction_item
from lightning_calibtip.report.record import StageRecord, run_record, write_record
from lightning_calibtip.report.settings import Setting
from tests.networks import as_loader

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    batches = list(torch.randn(32, 8).split(8))
    options = {"adaquant": {"iterations": 2, "granularity": "layer"}, "bias_tuning": {"seed": 7}}
    validation = as_loader(*batches)

    def step(module, batch, index):
        outputs = module(batch)
        right = (outputs.argmax(1) == torch.arange(len(batch)) % 3).float()
        values = {"<i>accuracy</i>": right.mean(), "score": outputs.mean(), "my_loss": outputs.square().mean()}
        module.log_dict(values)

    return quantize(net, batches, validation, "sequential", options, weight_bits=3, validation_step=step)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run.save(folder / "quantized.ckpt")
    run.write_report(folder, run.record("test", "<b>forty</b> layers", "score", 0))
    return folder / "report.html"


def test_the_page_holds_summary_figures_table_and_configuration_and_needs_no_network(page, run):
    text = page.read_text()
    titles = ("Equalization of inputs", "Error of each unit before and after AdaQuant")
    for title in ("Stages", "Layers", *titles, "Configuration"):
        assert f"<h2>{title}</h2>" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in text
    assert "&lt;b&gt;forty&lt;/b&gt; layers" in text and "<b>forty</b>" not in text
    assert text.count("<td>quantized</td>") == 41
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "activation_bits" in text and f"{run.float_metrics['score']:.4g}" in text
    names = {path.name for path in page.parent.iterdir()}
    assert {"layers.csv", "layers.png", "histograms.png", "reconstruction.png", "result.json"} <= names


def test_every_metric_is_shown_with_its_change_from_float(page, run):
    text = page.read_text()
    record = json.loads((page.parent / "result.json").read_text())
    assert list(record["metrics"]) == ["<i>accuracy</i>", "score", "my_loss"]
    head = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<th.*?</th>", text)]
    shown = ["stage", "score", "to float", "&lt;i&gt;accuracy&lt;/i&gt; (higher is better)", "to float"]
    assert head[:7] == [*shown, "my_loss (lower is better)", "to float"] and "<i>" not in text
    for stage in run.stages:
        change = stage.metrics["my_loss"] - run.float_metrics["my_loss"]
        assert f">{signed(change)} {'worse' if change > 0 else 'better'}<" in text
        assert f">{signed(stage.metrics['score'] - run.float_metrics['score'])}<" in text, "nobody knows what is better"
    assert record["metrics"]["<i>accuracy</i>"]["validation_samples"] == 32
    share = run.metrics["<i>accuracy</i>"]
    assert record["metrics"]["<i>accuracy</i>"]["higher_is_better"] and 0 < share < 1


def test_the_page_says_what_became_of_each_stage_what_it_costs_and_where_it_is(page, run):
    text = page.read_text()
    assert all(html.escape(stage.outcome) in text.replace("&#39;", "&#x27;") for stage in run.stages)
    assert [bool(stage.outcome) for stage in run.stages] == [True] * 5
    assert f"{run.stages[3].figures['units']:.0f} units were kept" in text
    operations = 40 * 64 + 24
    assert f">{32 * 32 * operations:,}<" in text and "bit operations for one sample" in text
    path = str(page.with_name("quantized.ckpt"))
    assert f"load_from_checkpoint(&#34;{path}&#34;, model=model)" in text
    assert "relative to the mean square" in text and f"torch {torch.__version__}" in text


def test_only_options_that_had_a_part_are_shown_and_defaults_apart(page):
    text = page.read_text()
    given, defaults = text.split("<h2>Configuration</h2>")[1].split("As by default")
    assert "<td>BiasTuning</td><td>seed</td><td><code>7</code></td>" in given
    assert "<td>AdaQuant</td><td>iterations</td><td><code>2</code></td>" in given and "weight_bits" in given
    assert "<td>BiasTuning</td><td>epochs</td>" in defaults and "activation_bits" in defaults
    assert "<td>storage</td><td>precision</td>" in defaults
    for absent in ("candidates", "compression", "preparation", "BitAllocation", "joint_search"):
        assert absent not in given + defaults


class Balanced(HTMLParser):
    """Collects tags that are not closed where they should be, and ids."""

    EMPTY = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def test_the_page_is_well_formed_and_its_figures_have_the_colours_of_either_scheme(page):
    text = page.read_text()
    parser = Balanced()
    parser.feed(text)
    assert (parser.open, parser.wrong) == ([], []) and len(parser.ids) == len(set(parser.ids)) > 4
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) > 6 and not re.search(r"#[0-9a-fA-F]{3,6}\b|rgb\(|(fill|stroke)=", "".join(figures))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    light, dark = style.split("prefers-color-scheme: dark")
    assert "fill: currentColor" in style and "nan" not in "".join(figures)
    for name in ("--c0", "--c5", "--good", "--bad"):
        assert f"{name}: #" in light and f"{name}: #" in dark.split("* {")[0]


def in_chromium(page, script, *options):
    """The page's DOM after a script, and what the console said."""
    copy = page.with_name("scripted.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    done = subprocess.run([CHROMIUM, *flags, *options, copy.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_sorts_the_table_without_errors_and_takes_a_picture(page):
    script = """
    const table = document.getElementById("layers"), head = table.tHead.rows[0].cells;
    const column = [...head].findIndex(cell => cell.textContent === "error after");
    const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
    const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent).join();
    const before = names();
    head[column].firstElementChild.click();
    const up = values();
    head[column].firstElementChild.click();
    const down = values();
    head[column].firstElementChild.click();
    const stages = document.getElementById("stages");
    const seconds = [...stages.tHead.rows[0].cells].at(-1).firstElementChild;
    const last = [0, 1].map(() => (seconds.click(), [...stages.tBodies[0].rows].at(-1).cells[0].textContent));
    document.title = JSON.stringify({ last, up, down, back: names() === before, sort: head[column].ariaSort,
      wide: document.documentElement.scrollWidth <= window.innerWidth });
    """
    dom, console = in_chromium(page, script, "--dump-dom", "--window-size=400,900")
    assert console == []
    title = re.search("<title>(.*?)</title>", dom)[1].replace("&quot;", '"')
    found = json.loads(title)
    numbers = [float(value) for value in found["up"] if value != "-"]
    assert found["last"] == ["float", "float"], "what is missing comes last, up or down"
    assert len(numbers) == 41 and numbers == sorted(numbers) and numbers[0] < numbers[-1]
    assert [float(value) for value in found["down"] if value != "-"] == numbers[::-1]
    assert found["back"] and found["sort"] == "none" and found["wide"], "the page itself does not scroll sideways"
    picture = page.with_name("shot.png")
    in_chromium(page, "", f"--screenshot={picture}", "--window-size=900,1200")
    assert picture.stat().st_size > 20_000


def test_missing_values_and_text_of_any_kind_are_rendered():
    rows = [["<script>", None], ["b", float("inf")], ["c", 12345]]
    item = ReportItem("odd", "Odd <values>", ["name", "value"], rows, no_matplotlib)
    network = QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())
    record = run_record(network, "r", "m", "no metric", None, 1, None, [StageRecord("Own", 1.0, None, {"found": 3.5})])
    text = render_page(record, [Section(item)], [Setting("", "path", "<page>")])
    assert "&lt;script&gt;" in text and "<td>inf" not in text and ">inf<" in text and ">12,345<" in text
    assert "<h2>Odd &lt;values&gt;</h2>" in text and "<code>&lt;page&gt;</code>" in text
    assert "<dd>found 3.5</dd>" in text and "None had been written" in text


def no_matplotlib():
    raise ModuleNotFoundError("No module named 'matplotlib'")


def test_units_that_could_not_be_optimised_are_left_out_of_the_figure(run):
    results = next(stage for stage in run.stages if stage.name == "AdaQuant").items[0]
    assert results.columns[2:4] == ["error before", "error after"] and len(results.rows) == 41
    empty = reconstruction_item([])
    assert empty.rows == [] and empty.draw() is not None


def test_a_candidates_item_is_named_by_its_bit_widths():
    named = [reconstruction_item([], bits) for bits in (None, BitWidths(4, 8), BitWidths(4, None))]
    assert [item.name for item in named] == ["reconstruction", "reconstruction_w4a8", "reconstruction_w4"]
    title = "Error of each unit before and after AdaQuant"
    assert [item.title for item in named] == [title, f"{title} at W4A8", f"{title} at W4"]


def test_names_that_matplotlib_would_take_for_formulas_and_failing_figures_end_no_run(tmp_path, caplog):
    product = "bert.encoder.layer.0.attention.self.query_key_product" * 2
    figure = draw_bit_widths({"a$x_1^$": BitWidths(4, 8), product: BitWidths(None, 8)})
    ReportItem("odd", "Odd", ["layer"], [["a"]], lambda: figure).save(tmp_path)
    assert (tmp_path / "odd.png").stat().st_size > 5_000 and not caplog.records
    assert figure.axes[0].get_position().height > 0.2

    def fails():
        raise ValueError("no picture today")

    failing = ReportItem("failing", "Failing", ["layer"], [["a"]], fails, charts=fails)
    assert failing.png is None and failing.drawn_charts == []
    assert caplog.text.count("failing cannot be drawn (ValueError: no picture today)") == 2


def test_a_second_run_removes_what_the_first_one_wrote_and_nothing_else(run, tmp_path):
    mine = ("mine.csv", "trade_off.csv", "layers.txt", "reconstruction_w2a2.png")
    for name in (*mine, "histograms_of_yesterday.csv", "histograms_of_yesterday.png"):
        (tmp_path / name).touch()
    write_record(tmp_path / "result.json", {"report_items": ["histograms_of_yesterday", "layers"]})
    run.write_report(tmp_path, {**run.record("test", "m", "score", 0), "odd": float("nan")})
    names = {path.name for path in tmp_path.iterdir()}
    assert set(mine) <= names and not any("yesterday" in name for name in names)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["odd"] is None
    written = {path.stem for path in tmp_path.glob("*.csv")} - {"mine", "trade_off"}
    assert set(record["report_items"]) == written
