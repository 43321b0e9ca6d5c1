import torch
from torch import nn

from lightning_calibtip import Calibration, Operand, QuantizationModule, register_layer
from lightning_calibtip.quantization.spec import BitWidths
from tests import transformer_models
from tests.networks import as_loader, calibrated_network, calibration_set, logits_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.sigmoid(self.query(x)) * torch.sigmoid(self.key(x)) + self.value(x * 2))


def test_layers_that_read_the_same_tensor_share_one_quantizer():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(32, 4)
    network = calibrated_network(model, calibration_set(model, x))
    query, key, value = (network.layers[name] for name in ("query", "key", "value"))
    assert query.input_quantizers[0] is key.input_quantizers[0] is not value.input_quantizers[0]
    assert query.tensors[0].readers == ["query", "key"] and query.tensors[0].shared
    assert len(network.quantizers) == 5 + 4


def test_a_value_that_two_layers_read_is_observed_once():
    torch.manual_seed(0)
    model, batches = Attention(), torch.randn(4, 16, 4)
    network = calibrated_network(model, calibration_set(model, *batches), "moving_average")
    assert network.layers["key"].tensors[0].observer.update_count == len(batches)


def test_another_bit_width_of_one_reader_leaves_the_others_alone():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(32, 4)
    network = calibrated_network(model, calibration_set(model, x))
    query, key = network.layers["query"], network.layers["key"]
    with torch.no_grad():
        key.input_quantizers[0].scale.mul_(1.5)
    learned = key.input_quantizers[0].scale.clone()
    network.switch("query", BitWidths(4, 8))
    assert query.input_quantizers[0] is not key.input_quantizers[0]
    network.switch("query", BitWidths(3, 4))
    assert query.input_quantizers[0] is key.input_quantizers[0]
    assert torch.equal(key.input_quantizers[0].scale, learned)


def test_a_shared_quantizer_has_one_place_in_the_checkpoint(make_trainer, tmp_path):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(32, 4)
    module = QuantizationModule(model, weight_bits=4)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(x))
    trainer.save_checkpoint(tmp_path / "shared.ckpt")
    keys = torch.load(tmp_path / "shared.ckpt", weights_only=True)["state_dict"]
    assert sum("input_quantizers" in key and key.endswith("scale") for key in keys) == 4
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "shared.ckpt", model=Attention())
    layers = loaded.network.layers
    assert layers["query"].input_quantizers[0] is layers["key"].input_quantizers[0]
    assert torch.equal(logits_of(loaded, x), logits_of(module, x))


def test_a_reader_that_is_left_in_float_leaves_the_others_alone():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(32, 4)
    network = calibrated_network(model, calibration_set(model, x))
    network.leave_float("query", "tried")
    layer = network.layers["key"]
    assert layer.input_quantizers[0].enabled and layer.tensors[0].readers == ["key"]
    seen = []
    layer.module.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(x)
    assert len(seen[0].unique()) <= 16


def test_a_layer_that_reads_one_tensor_twice_can_be_left_in_float():
    class Product(nn.Module):
        def forward(self, left, right):
            return left * right

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.square, self.last = nn.Linear(4, 4), Product(), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.square(x, x))

    register_layer(Product, None, [Operand(), Operand()])
    model, x = Net(), torch.randn(16, 4)
    network = calibrated_network(model, calibration_set(model, x))
    assert network.layers["square"].input_quantizers[0] is network.layers["square"].input_quantizers[1]
    network.leave_float("square", "tried")
    assert network.float_layers == {"square": "tried"}


def test_query_key_and_value_of_a_transformer_share_their_input():
    model, tokens = transformer_models.bert(), transformer_models.padded_tokens()
    calibration = calibration_set(model)
    calibration.forward = lambda batch, index: model(**batch)
    for batch in transformer_models.batches_of(tokens):
        calibration.append(batch)
    network = calibrated_network(model, calibration, weight_bits=8, activation_bits=8)
    place = "bert.encoder.layer.0.attention.self."
    quantizers = {id(network.layers[f"{place}{name}"].input_quantizers[0]) for name in ("query", "key", "value")}
    assert len(quantizers) == 1


def test_both_branches_of_a_residual_block_share_their_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.shortcut = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.relu, self.head = nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.relu(self.stem(x))
            return self.head(self.relu(self.conv(x) + self.shortcut(x)))

    model, x = Block(), torch.randn(4, 1, 6, 6)
    network = calibrated_network(model, calibration_set(model, x))
    assert network.layers["conv"].input_quantizers[0] is network.layers["shortcut"].input_quantizers[0]
