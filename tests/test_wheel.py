"""The wheel, in an environment with the core dependencies and nothing of the extras."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections import defaultdict
from email.parser import Parser
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRA_PACKAGES = (
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "safetensors",
    "jsonargparse",
    "matplotlib",
    "transformers",
    "highspy",
)

SCRIPT = """
import importlib.util
import sys

import torch
from torch import nn

import lightning_calibtip
from lightning_calibtip import BitAllocation, QuantizationModule, export_onnx, export_packed, quantize

assert lightning_calibtip.__file__.startswith(sys.prefix), lightning_calibtip.__file__
there = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
assert not there, there

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
images = torch.randn(16, 1, 8, 8)
run = quantize(net, [images], pipeline="calibrate", trainer_options={"accelerator": "cpu"})
run.save("quantized.ckpt")
loaded = QuantizationModule.load_from_checkpoint("quantized.ckpt", model=net)
with torch.no_grad():
    assert torch.equal(loaded(images), run.module(images))
    assert not torch.equal(loaded(images), net(images))
    assert torch.allclose(loaded(images), net(images), atol=0.1)
run.write_report("report", run.record("wheel", "net", None, 0))


def integer():
    import lightning_calibtip.export.integer


def attempt(call, *args, **options):
    try:
        call(*args, **options)
    except (ModuleNotFoundError, ValueError) as error:
        print(error)


attempt(export_onnx, run.module, "model.onnx", images)
attempt(export_packed, run.module, "model.safetensors")
attempt(integer)
attempt(BitAllocation, solver="highs")
"""


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Installed distributions that requirements lead to, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return found


def link_files(wanted: dict[str, Distribution], site_packages: Path) -> None:
    """Link the files of distributions into an environment; folders as a whole where nothing else lies in them."""
    owners = defaultdict(set)
    for other in distributions():
        name = canonicalize_name(other.metadata["Name"])
        for file in other.files or ():
            owners[file.parts[0]].add(name)
    for one in wanted.values():
        for file in one.files or ():
            top = file.parts[0]
            if top in ("..", "__pycache__"):
                continue
            part = Path(top) if owners[top] <= set(wanted) else Path(file)
            target = site_packages / part
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(one.locate_file(part)).resolve())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if importlib.util.find_spec("build") is None:
        pytest.skip("build is not installed: pip install '.[dev]'")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_calibtip", source / "lightning_calibtip", ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Interpreter of an environment with the wheel and its core dependencies, as they are installed here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    where = [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    link_files(closure(metadata.get_all("Requires-Dist")), site_packages)
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    return interpreter


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True)


def test_wheel_holds_the_page_and_the_mark_of_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lightning_calibtip/py.typed", "lightning_calibtip/report/page.html"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_calibtip"}


def test_wheel_quantizes_without_extras_and_names_those_that_are_missing(python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = run(python, tmp_path, "script.py", *EXTRA_PACKAGES)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "report" / "report.html").exists() and not (tmp_path / "model.onnx").exists()
    onnx, packed, integer, highs = ran.stdout.strip().splitlines()[-4:]
    assert 'Exporting needs onnx: pip install "lightning-calibtip[export]"' in onnx
    assert 'needs safetensors: pip install "lightning-calibtip[export]"' in packed
    assert 'needs onnx_ir: pip install "lightning-calibtip[export]"' in integer
    assert 'needs highspy: pip install "lightning-calibtip[highs]"' in highs


def test_command_line_names_the_extra_that_it_needs(python, tmp_path):
    assert "from lightning_calibtip.__main__ import main" in python.with_name("lightning_calibtip").read_text()
    ran = run(python, tmp_path, "-m", "lightning_calibtip", "--help")
    assert ran.returncode == 1
    assert ran.stderr == 'The command line needs jsonargparse: pip install "lightning-calibtip[cli]".\n'
