"""Operators that ONNX Runtime makes of whole networks, with random weights."""

import pytest
import torch
import transformers
from torch import nn

from lightning_calibtip import export_onnx
from tests.export.exporting import Residual, outputs, quantized

torchvision = pytest.importorskip("torchvision", reason="needs the networks of torchvision")


def exported(model, batch, path, **options):
    torch.manual_seed(0)
    module = quantized(model.eval(), batch, **options)
    return module, export_onnx(module, path, batch)


def test_every_layer_of_resnet20_runs_as_integers(tmp_path):
    from recipes.resnet_cifar10.model import CifarClassifier

    _, report = exported(CifarClassifier("resnet20"), torch.randn(8, 3, 32, 32), tmp_path / "net.onnx")
    assert report.counts == {"QLinearConv": 19, "QLinearAdd": 9, "QLinearAveragePool": 1, "QGemm": 1}
    assert report.size_ratio < 0.30


def test_every_convolution_of_efficientnet_lite0_runs_as_integers(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs pip install efficientnet-lite-pytorch")
    from recipes.resnet_imagenet.model import ImageNetClassifier

    model = ImageNetClassifier("efficientnet_lite0", "random")
    _, report = exported(model, torch.randn(2, 3, 64, 64), tmp_path / "net.onnx")
    assert report.counts["QLinearConv"] == 49 and report.counts["QLinearAdd"] == 9


def test_every_product_of_bert_runs_as_integers(tmp_path):
    batch = {
        "input_ids": torch.randint(0, 50, (4, 12)),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
        "token_type_ids": torch.zeros(4, 12, dtype=torch.long),
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)
    _, report = exported(transformers.BertForQuestionAnswering(config), batch, tmp_path / "bert.onnx")
    products = {name: count for name, count in report.counts.items() if name != "Gather"}
    assert sum(products.values()) == 49 and not report.float_layers
    assert set(products) <= {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
    # Any number of tokens.
    tokens = torch.randint(0, 50, (2, 7))
    start, _ = outputs(tmp_path / "bert.onnx", tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
    assert start.shape == (2, 7)


@pytest.mark.parametrize("name, layers", [
    ("mobilenet_v2", 53), ("resnet18", 21), ("resnet50", 54), ("regnet_y_400mf", 86), ("densenet121", 121),
    ("convnext_tiny", 59), ("vit_b_16", 18),
])  # fmt: skip
def test_convolutions_and_products_of_torchvisions_networks_run_as_integers(name, layers, tmp_path):
    """``layers`` are all that there are, as counted in the papers' tables."""
    size = 224 if name == "vit_b_16" else 64
    options = {"num_layers": 2, "hidden_dim": 32, "mlp_dim": 64, "num_heads": 2} if name == "vit_b_16" else {}
    if options:
        from torchvision.models.vision_transformer import VisionTransformer

        model = VisionTransformer(image_size=size, patch_size=16, **options)
        torch.nn.init.normal_(model.heads.head.weight)
    else:
        model = getattr(torchvision.models, name)(weights=None)
    module, report = exported(model, torch.randn(2, 3, size, size), tmp_path / "net.onnx")
    products = [line for line in report.operators if ".addition_" not in line.layer and "_pool_" not in line.layer]
    products = [line for line in products if not line.layer.startswith(("addition_", "average_pool_"))]
    assert len(products) == layers
    assert sum(line.integer for line in products) >= 0.95 * layers, report.float_layers
    assert not module.network.plan.float_matmuls and not module.network.plan.float_layers


class Translator(nn.Module):
    """PyTorch's encoder and decoder around token ids, 0 for padding."""

    def __init__(self) -> None:
        super().__init__()
        options = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 1)

    def forward(self, tokens):
        x, padding = self.embedding(tokens), tokens == 0
        memory = self.encoder(x, src_key_padding_mask=padding)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        decoded = self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)
        return self.head(decoded)


def test_every_product_of_pytorchs_transformer_runs_as_integers(tmp_path):
    tokens = torch.randint(1, 20, (8, 10))
    tokens[::2, 6:] = 0
    module, report = exported(Translator(), tokens, tmp_path / "net.onnx")
    # Four projections and two products for each of three attentions, two linear layers twice, and the head.
    assert sum(count for name, count in report.counts.items() if "MatMul" in name or "Gemm" in name) == 3 * 6 + 4 + 1
    assert not report.float_layers and report.agreement > 0.95
    # Another number of samples and of tokens.
    others = torch.randint(1, 20, (3, 7))
    (logits,) = outputs(tmp_path / "net.onnx", others)
    wanted = module.model(others)
    # Sums that are rounded to the other side of a step of 8 bits, see test_onnx_file.
    assert (logits - wanted).abs().max() < 6 / 255 * wanted.abs().max()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(16, 3)

    def forward(self, embeddings, padding):
        return self.head(self.encoder(embeddings, src_key_padding_mask=padding))


def test_embeddings_beside_a_mask_may_have_any_number_of_tokens(tmp_path):
    batch = {"embeddings": torch.randn(8, 10, 16), "padding": torch.zeros(8, 10, dtype=torch.bool)}
    module, _ = exported(Masked(), batch, tmp_path / "net.onnx")
    others = torch.randn(3, 7, 16), torch.arange(7).expand(3, 7) >= 5
    (logits,) = outputs(tmp_path / "net.onnx", *others)
    wanted = module.model(*others)
    # Sums that are rounded to the other side of a step of 8 bits, see test_onnx_file.
    assert (logits - wanted).abs().max() < 6 / 255 * wanted.abs().max()


def test_openvino_runs_the_same_file(tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    images = torch.randn(16, 3, 12, 12)
    module, report = exported(Residual(), images, tmp_path / "net.onnx", target="openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(report.path)), "CPU")
    given = torch.from_numpy(compiled([images.numpy()])[compiled.output(0)])
    wanted = module.model(images)
    # Integer sums are rounded to the grid as in any engine, see test_onnx_file.
    assert (given - wanted).abs().max() < 6 / 255 * wanted.abs().max()
