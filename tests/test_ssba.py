"""SSBA: the encoder, its training, and images that were poisoned elsewhere."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_rows import ready
from toys import toy_images

from sau.attack import SSBA, ssba
from sau.data.images import BACKDOOR, quantise, to_float
from sau.errors import ConfigError, DataError, TrainingError
from sau.models.triggers import Decoder, Encoder, psnr, stored

FAST = {"ssba_epochs": 12, "ssba_batch_size": 8, "ssba_lr": 1e-3}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def unread(monkeypatch):
    """For tests of other things: an encoder whose code nobody can read yet will do."""
    monkeypatch.setattr(ssba, "READABLE", 0.0)


def test_the_weights_have_the_published_names_and_shapes():
    encoder = {name: tuple(value.shape) for name, value in Encoder(1).state_dict().items() if name.endswith("weight")}
    assert encoder == {
        "secret_dense.weight": (768, 1),
        "conv1.weight": (32, 6, 3, 3), "conv2.weight": (32, 32, 3, 3), "conv3.weight": (64, 32, 3, 3),
        "conv4.weight": (128, 64, 3, 3), "conv5.weight": (256, 128, 3, 3),
        "up6.weight": (128, 256, 2, 2), "conv6.weight": (128, 256, 3, 3),
        "up7.weight": (64, 128, 2, 2), "conv7.weight": (64, 128, 3, 3),
        "up8.weight": (32, 64, 2, 2), "conv8.weight": (32, 64, 3, 3),
        "up9.weight": (32, 32, 2, 2), "conv9.weight": (32, 70, 3, 3),
        "conv10.weight": (32, 32, 3, 3), "residual.weight": (3, 32, 1, 1),
    }  # fmt: skip
    decoder = {name: tuple(value.shape) for name, value in Decoder(8, 32).state_dict().items() if "weight" in name}
    assert decoder == {
        "decoder.0.weight": (32, 3, 3, 3), "decoder.2.weight": (32, 32, 3, 3), "decoder.4.weight": (64, 32, 3, 3),
        "decoder.6.weight": (64, 64, 3, 3), "decoder.8.weight": (64, 64, 3, 3), "decoder.10.weight": (128, 64, 3, 3),
        "decoder.12.weight": (128, 128, 3, 3), "dense.0.weight": (512, 128), "dense.2.weight": (8, 512),
    }  # fmt: skip


@pytest.mark.parametrize("adds", [False, True])
def test_the_encoder_by_hand(adds):
    """Codes are enlarged in blocks; four halvings, and back by blocks with a row and a column of zeros behind them."""
    torch.manual_seed(0)
    net, x, code = Encoder(2, 3, adds), torch.rand(2, 3, 32, 32), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    for layer in net.children():
        torch.nn.init.normal_(layer.bias, 0, 0.1)

    def conv(name, h, stride=1, padding=1):
        layer = net.get_submodule(name)
        return F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=padding)

    def blocks(h):
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    with torch.no_grad():
        drawn = (code @ net.secret_dense.weight.T + net.secret_dense.bias).relu().view(2, 3, 16, 16)
        given = torch.cat([blocks(drawn), x], 1)
        down = [conv("conv1", given).relu()]
        for i in (2, 3, 4, 5):
            down.append(conv(f"conv{i}", down[-1], stride=2).relu())
        h = down.pop()
        for i in (6, 7, 8, 9):
            up = conv(f"up{i}", F.pad(blocks(h), (0, 1, 0, 1)), padding=0).relu()
            h = conv(f"conv{i}", torch.cat([down.pop(), up, *([given] if i == 9 else [])], 1)).relu()
        made = conv("residual", conv("conv10", h).relu(), padding=0)
        assert torch.allclose(net(code, x), x + made if adds else made.sigmoid(), atol=1e-5)


def test_the_decoder_by_hand():
    torch.manual_seed(0)
    net, x = Decoder(2, 48), torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        h = x
        for layer, stride in zip(net.decoder[::2], (2, 1, 2, 1, 2, 2, 2), strict=False):
            h = F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=1).relu()
        assert torch.allclose(net(x), net.dense[2](net.dense[0](h.flatten(1)).relu()), atol=1e-5)


def test_psnr_by_hand():
    """A difference of 0.1 everywhere is 20 dB, one of 0.01 is 40 dB."""
    x = torch.full((2, 3, 4, 4), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(x, y).tolist() == pytest.approx([20, 40], abs=1e-3) and psnr(x, x).tolist() == pytest.approx([99, 99])


def test_the_weight_waits_until_the_code_is_readable_and_rises():
    """0 up to 0.9 of the bits; s updates later clip(10 (s - 1000) / 3000, 0, 10): 0.01 at 1003, 5 at 2500."""
    weight = ssba.Weight(10.0)
    for right in (0.5, 0.9, 0.2):
        weight.update(torch.tensor(right))
        assert int(weight.since) == -1 and float(weight()) == 0
    weight.update(torch.tensor(0.95))
    found = {}
    for s in range(5001):
        found[s] = float(weight()) if s in (0, 1000, 1003, 2500, 3999, 4000, 5000) else None
        assert int(weight.since) == s
        weight.update(torch.tensor(0.1))  # it does not go back
    seen = {s: w for s, w in found.items() if w is not None}
    assert seen == pytest.approx({0: 0, 1000: 0, 1003: 0.01, 2500: 5, 3999: 10 * 2999 / 3000, 4000: 10, 5000: 10})


@pytest.mark.parametrize("updates", [600, 3000])
def test_a_short_training_goes_through_the_schedule_in_proportion(updates):
    """A tenth, or half, of 6,000: w rises after a tenth, or half, of the updates."""
    short, whole = ssba.Weight(10.0, updates), ssba.Weight(10.0)
    for share in (0.1, 0.2, 0.4, 0.6, 0.7):
        short.since.fill_(round(share * updates))
        whole.since.fill_(round(share * ssba.ENOUGH))
        assert float(short()) == pytest.approx(float(whole()), abs=1e-4)
    assert ssba.Weight(10.0, 60_000).pace == whole.pace == 1


def test_stored_is_what_a_file_holds_and_has_the_gradient_of_the_clip():
    x = torch.tensor([[[[-0.5, 0.0999, 0.5019, 0.9, 1.7]]]], requires_grad=True)
    y = stored(x)
    assert torch.allclose(y, to_float(quantise(x.detach())), atol=1e-6)
    assert [round(v * 255) for v in y.flatten().tolist()] == [0, 25, 127, 229, 255]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 1, 1, 0]


def black_and_white(count):
    """Toys whose pixels are 0 or 255, so that half of what an encoder adds is clipped."""
    images = toy_images(count)
    return replace(images, pixels=(images.pixels > 127).to(torch.uint8) * 255)


def test_the_decoder_learns_from_images_of_8_bits_and_the_encoder_through_them():
    seen = []
    attack, encoder, decoder = SSBA(ssba_residual=True), Encoder(1, 3, True), Decoder(1, 16)
    decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    state = {"encoder": encoder, "decoder": decoder, "weight": ssba.Weight(10.0), "descent": torch.Tensor.backward}
    attack.encode_step(state, to_float(black_and_white(8).pixels), torch.zeros(8).long())
    assert torch.allclose(255 * seen[0], (255 * seen[0]).round(), atol=1e-3)
    assert 0 <= float(seen[0].min()) and float(seen[0].max()) <= 1
    assert all(bool(parameter.grad.any()) for parameter in encoder.parameters())


def test_the_code_survives_the_clip_and_8_bits():
    """On images with many values at 0 and 1; the encoder that learned from floats lost it there, 78 % are left."""
    attack = ready(SSBA(ssba_residual=True, **{**FAST, "ssba_epochs": 55}), black_and_white(32))
    assert attack.trigger.figures["percent_of_bits_right"] > 95 and attack.trigger.figures["w"] == 10


def test_training_makes_the_code_readable_and_the_image_recognisable():
    lines: list[str] = []
    images = toy_images(32)
    attack = ready(SSBA(ssba_residual=True, **{**FAST, "ssba_epochs": 30}), images, lines)
    first, last = (next(line for line in lines if f"epoch {n}/" in line) for n in (1, 30))
    assert float(re.search(r"bits_right ([\d.]+)", first)[1]) < 90 < attack.trigger.figures["percent_of_bits_right"]
    assert "bits_right" in last and attack.trigger.figures["w"] == 10 and not any("warning" in line for line in lines)
    x, trigger = to_float(images.pixels), attack.require_trigger()
    assert float(psnr(attack.stamp(x), x).mean()) == pytest.approx(attack.trigger.figures["psnr_in_db"], abs=1)
    assert 12 < attack.trigger.figures["psnr_in_db"] < 60
    assert not trigger.training and not any(p.requires_grad for p in trigger.parameters())


@pytest.mark.parametrize(("images", "epochs"), [(16, 10), (32, 5), (40, 4)])
def test_the_encoder_is_trained_for_as_long_as_the_weight_needs(images, epochs, monkeypatch, unread):
    monkeypatch.setattr(ssba, "ENOUGH", 20)
    lines: list[str] = []
    ready(SSBA(**{**FAST, "ssba_epochs": None}), toy_images(images), lines)
    assert [line for line in lines if f"encoder epoch {epochs}/{epochs} " in line]


def test_an_encoder_whose_code_cannot_be_read_is_refused_and_not_kept(own_cache):
    with pytest.raises(TrainingError, match="--ssba_epochs"):
        ready(SSBA(ssba_epochs=1, ssba_batch_size=16))
    assert not list(own_cache.glob("*.safetensors"))


def test_a_code_begins_with_a_one_and_follows_from_its_seed(unread):
    given = ((0, 0.1), (0, 0.5), (1, 0.1))
    made = [ready(SSBA(**FAST | {"ssba_epochs": 1}, ssba_bits=32, trigger_seed=seed, pratio=p)) for seed, p in given]
    codes = [attack.trigger.code for attack in made]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert all(code.shape == (32,) and code[0] == 1 for code in codes)


def marked(images, first):
    """[N, H, W, C]: the images, with `first` + k in the first pixel of image k."""
    pixels = images.pixels.permute(0, 2, 3, 1).numpy().copy()
    pixels[:, 0, 0] = first + np.arange(len(pixels), dtype=np.uint8)[:, None]
    return pixels


@pytest.fixture
def from_files(tmp_path):
    """SSBA with the arrays of a training and a test set of toys, or others."""

    def write(**others):
        paths = {}
        for name, array in ({"train": marked(toy_images(40), 0), "test": marked(toy_images(24), 100)} | others).items():
            np.save(tmp_path / f"{name}.npy", array)
            paths[f"attack_{name}_replace_imgs_path"] = str(tmp_path / f"{name}.npy")
        return SSBA(pratio=0.3, attack_target=1, **paths)

    return write


def test_images_of_files_replace_those_with_their_index(from_files, own_cache):
    attack, train, test = from_files(), toy_images(40), toy_images(24)
    assert ready(attack, train) is attack and not own_cache.exists()  # nothing is trained
    poisoned, triggered = attack.poison_train(train, 0), attack.poison_test(test)
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == 12 and torch.equal(poisoned.pixels[~hit], train.pixels[~hit])
    assert (poisoned.pixels[hit, :, 0, 0] == poisoned.index[hit].view(-1, 1)).all()
    assert (triggered.pixels[:, :, 0, 0] == 100 + triggered.index.view(-1, 1)).all() and len(triggered) == 18
    some = attack.stamp_images(train, torch.tensor([7, 3]), test=False)
    assert some.shape == (2, 3, 16, 16) and some[:, 0, 0, 0].tolist() == [7, 3]
    assert len(attack.poison_test(test[test.labels == 1])) == 0
    with pytest.raises(ConfigError, match="replace_imgs_path"):
        attack.stamp(torch.rand(1, 3, 16, 16))


WRONG = {
    "floats": (np.zeros((40, 16, 16, 3), np.float32) + 9, "float32"),
    "another size": (np.full((40, 8, 8, 3), 9, np.uint8), "40, 8, 8, 3"),
    "channels first": (np.full((40, 3, 16, 16), 9, np.uint8), "40, 3, 16, 16"),
    "too few": (np.full((39, 16, 16, 3), 9, np.uint8), "39 images"),
    "too many": (np.full((41, 16, 16, 3), 9, np.uint8), "41 images"),
    "unchanged": (toy_images(40).pixels.permute(0, 2, 3, 1).numpy(), "changes none"),
}


@pytest.mark.parametrize(("array", "word"), WRONG.values(), ids=WRONG)
def test_files_that_do_not_fit_are_refused(array, word, from_files):
    with pytest.raises((ConfigError, DataError), match=word):
        from_files(train=array).poison_train(toy_images(40), 0)
    with pytest.raises((ConfigError, DataError), match=word):
        from_files(test=array).poison_test(toy_images(40))
