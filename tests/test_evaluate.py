"""Every number in every table: shares, intervals, ACC, ASR, R-ACC and DER."""

import pytest
import torch
from torch import Tensor, nn
from toys import Shaped, refuses, tiny_net, toy_images

from sau.attack import Blended
from sau.config import at_most
from sau.data.images import Images, to_float
from sau.errors import DataError, TrainingError
from sau.evaluate import Proportion, Score, conclusion, der, predict, proportions, score, table
from sau.loop import duration, short

# Proportions


def test_shares_and_scores_print_themselves():
    share = Proportion(81, 263)
    assert str(share) == "30.80 % [25.53, 36.62]"
    assert [Proportion(n, 3).percent for n in range(4)] == [0, 33.33, 66.67, 100]
    assert str(Score(share, Proportion(15, 148), Proportion(10, 10))) == (
        "ACC 30.80 % [25.53, 36.62]  ASR 10.14 % [6.24, 16.05]  R-ACC 100.00 % [72.25, 100.00]"
    )
    assert str(Score(share)) == "ACC 30.80 % [25.53, 36.62]"


@pytest.mark.parametrize(("hits", "total", "interval"), [
    (0, 10, (0.0, 27.75)),  # as R gives it: prop.test(0, 10, correct = FALSE)
    (1, 10, (1.79, 40.42)), (5, 10, (23.66, 76.34)), (10, 10, (72.25, 100.0)),
    (81, 263, (25.53, 36.62)),  # 0.2553 to 0.3662 in table I of Newcombe 1998
    (15, 148, (6.24, 16.05)),  # the same table: 0.0624 to 0.1605
    (1, 29, (0.61, 17.18)),  # the same table: 0.0061 to 0.1718
])  # fmt: skip
def test_wilsons_interval(hits, total, interval):
    assert Proportion(hits, total).interval == interval


# Scores

IMAGES = toy_images(6)
FLOATS = to_float(IMAGES.pixels)


class Answers(nn.Module):
    """A network that reads its answer, of four, off the first pixel: its grey level is the class."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), 4).float()


def saying(answers: list[int]) -> Tensor:
    """Images to which `Answers` gives these classes."""
    return torch.tensor(answers, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_counts_by_hand():
    """Four clean images, three right. Five triggered ones: two go to the target 0, two to their class, one astray."""
    clean = (saying([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]))
    triggered = (saying([0, 0, 1, 2, 3]), torch.zeros(5, dtype=torch.long), torch.tensor([1, 2, 1, 2, 2]))
    result = score(Answers(), clean, triggered)
    assert (result.acc, result.asr, result.racc) == (Proportion(3, 4), Proportion(2, 5), Proportion(2, 5))
    summary = result.summary()
    assert (summary["acc"], summary["asr"], summary["racc"]) == (75.0, 40.0, 40.0)
    assert summary["acc_count"] == [3, 4] and summary["racc_count"] == [2, 5]
    assert summary["asr_interval"] == list(Proportion(2, 5).interval)
    for nothing in (None, IMAGES[IMAGES.labels[:0]]):  # without triggers there is no ASR
        result = score(Answers(), clean, nothing)
        assert result == Score(Proportion(3, 4), None, None)
        found = {"acc": 75.0, "acc_interval": list(result.acc.interval), "acc_count": [3, 4]}
        assert result.summary() == {**found, "asr": None, "racc": None}


def test_images_and_tensors_are_the_same_to_it():
    test = toy_images(30)
    triggered = Blended().poison_test(test)
    net = tiny_net()
    as_tensors = ((test.pixels, test.labels), (triggered.pixels, triggered.labels, triggered.true_labels))
    assert score(net, test, triggered) == score(net, *as_tensors)


def test_predictions_do_not_depend_on_the_batches():
    net, pixels = tiny_net(), toy_images(23).pixels
    at_once = net(pixels.float() / 255).argmax(1)
    for size in (1, 7, 23, 500):
        assert torch.equal(predict(net, pixels, size), at_once)


NO_MEMORY = [
    torch.OutOfMemoryError("injected"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("refusal", NO_MEMORY, ids=["CUDA", "CPU"])
def test_blocks_that_memory_does_not_hold_are_halved(refusal):
    """From there on, so that each image is answered once; a single one that is too much is an error."""
    net, pixels, sizes = tiny_net(), toy_images(23).pixels, []

    def most(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 6:
            raise refusal
        sizes.append(len(inputs[0]))

    wanted = predict(net, pixels)
    hook = net.register_forward_pre_hook(most)
    assert torch.equal(predict(net, pixels, 20), wanted) and sizes == [5, 5, 5, 5, 3]
    hook.remove()
    net.register_forward_pre_hook(lambda module, inputs: most(module, (torch.zeros(7),)))
    with pytest.raises(type(refusal)):
        predict(net, pixels)


def test_scoring_leaves_the_network_as_it_was():
    """In eval mode while it answers, afterwards in the modes of before, also where these are mixed."""
    seen = []
    net = tiny_net()
    net.train()
    net.features[1].eval()
    before = [module.training for module in net.modules()]
    statistics = net.features[1].running_mean.clone()
    net.features[0].register_forward_hook(lambda module, inputs, output: seen.append(net.features[0].training))
    score(net, toy_images(8), None)
    assert not any(seen) and seen and torch.equal(net.features[1].running_mean, statistics)
    assert [module.training for module in net.modules()] == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_network_with_logits_that_are_not_finite_has_no_accuracy(value):
    sometimes = Shaped(lambda z: torch.where(torch.arange(len(z))[:, None] == 3, value, z))
    with refuses(TrainingError, "NaN"):
        score(sometimes, toy_images(8), None)
    with pytest.raises(TrainingError):
        predict(sometimes, toy_images(20).pixels, batch_size=5)


def scored(acc: float, asr: float | None) -> Score:
    """A score with these percentages, out of 10,000 pictures."""
    triggered = None if asr is None else Proportion(round(100 * asr), 10_000)
    return Score(Proportion(round(100 * acc), 10_000), triggered, triggered)


@pytest.mark.parametrize(("before", "after", "rating"), [
    ((90, 100), (90, 0), 100.0),  # all of an ASR of 100, at no cost
    ((90, 100), (90, 100), 50.0),  # nothing changed
    ((90, 100), (80, 0), 95.0),  # ten points of ACC cost five
    ((90, 50), (90, 0), 75.0),  # only what was there can fall
    ((90, 10), (95, 10), 50.0),  # a rise of ACC is no gain
    ((90, 10), (90, 60), 50.0),  # a rise of ASR is no loss
    ((90, 10), (0, 60), 5.0), ((100, 0), (0, 0), 0.0),
    ((90, 10.03), (90, 10), 50.02),  # 50.015, of which two decimals are kept
])  # fmt: skip
def test_der_by_cases(before, after, rating):
    assert der(scored(*before), scored(*after)) == rating


def test_every_row_of_the_table_is_rated_against_the_first():
    rows = {"none": scored(90, 100), "fine_tuning": scored(80, 50), "c": scored(90, 0)}
    head, first, *others = table(rows).splitlines()
    assert head.split() == ["ACC", "%", "ASR", "%", "R-ACC", "%", "DER", "%"]
    assert first.split()[:3] == ["none", "90.00", "[89.40,"] and "100.00 [99.96, 100.00]" in first
    assert [line.split()[-1] for line in (first, *others)] == ["-", "70.00", "100.00"]
    assert len({len(line) for line in (head, first, *others)}) == 1


def test_der_is_rounded_once():
    """The drops are 1/3 and 2/3 points; of rounded percentages DER would be 49.84. Without an ASR there is none."""
    before, after = Score(Proportion(300, 300), Proportion(200, 300)), Score(Proportion(298, 300), Proportion(199, 300))
    assert der(before, after) == round((100 / 300 - 200 / 300 + 100) / 2, 2) == 49.83
    assert der(scored(90, None), scored(80, 3)) is None and der(scored(90, 3), scored(80, None)) is None


def test_durations_and_bounds_are_written_short_and_bounds_never_too_high():
    seconds = {45.4: "45 s", 99.4: "99 s", 100.0: "2 min", 5_969.0: "99 min", 6_000.0: "1 h 40 min"}
    assert {value: duration(value) for value in seconds} == seconds
    numbers = {3.0: "3", -120.0: "-120", 0.0: "0", 1.5: "1.5", 0.12344: "0.1234", 123456.0: "123456"}
    assert {value: short(value) for value in numbers} == numbers
    for bound in (0.0123456, 0.99996, 1.00004, 9.9999, 12.345, 12.348, 72.0, 1234.56):
        assert bound * (1 - 1e-3) < float(at_most(bound)) <= bound


@pytest.mark.parametrize(("shape", "got"), [
    (lambda z: z[..., None, None], "(6, 4, 1, 1)"),  # against six labels that would be 36 comparisons
    (lambda z: {"logits": z}, "dict"),
    (lambda z: z[:, 0], "(6,)"),
    (lambda z: z[1:], "(5, 4)"),
])  # fmt: skip
def test_an_output_that_is_no_logits_has_no_accuracy(shape, got):
    net, images = Shaped(shape), toy_images(6)
    for measured in (lambda: predict(net, images.pixels), lambda: score(net, images, None)):
        with refuses(DataError, got):
            measured()


@pytest.mark.parametrize(("pixels", "labels", "word"), [
    (255 * FLOATS, IMAGES.labels, "by 255"),
    (4 * FLOATS - 2, IMAGES.labels, "sau.models.Normalized(model, mean, std)"),
    (FLOATS, torch.zeros(6, 1).long(), "[6, 1]"),  # against six predictions that would be 36 comparisons
    (FLOATS, torch.zeros(5).long(), "[5]"),
    (FLOATS, torch.zeros(6), "float32"),
    (FLOATS, torch.zeros(0).long(), "[0]"),
    (FLOATS, IMAGES.labels + 1, "4 classes"),
    (FLOATS, IMAGES.labels - 1, "-1"),
])  # fmt: skip
def test_images_and_labels_that_do_not_fit_have_no_accuracy(pixels, labels, word):
    net = tiny_net()
    for measured in (
        lambda: score(net, (pixels, labels), None),
        lambda: score(net, IMAGES, (pixels, IMAGES.labels, labels)),
        lambda: proportions(net, pixels, labels),
        lambda: proportions(net, pixels, IMAGES.labels, labels),
    ):
        with refuses(DataError, word):
            measured()


def test_triggered_images_of_the_target_class_are_refused_and_other_arrays_are_taken() -> None:
    net, arrays = tiny_net(), (IMAGES.pixels.numpy(), IMAGES.labels.tolist())
    with refuses(DataError, "2 triggered images"):
        score(net, IMAGES, (FLOATS, torch.zeros(6).long(), IMAGES.labels))
    for wrong in (((FLOATS, IMAGES.labels, IMAGES.labels), None), (IMAGES, (FLOATS, IMAGES.labels))):
        with refuses(DataError, "a tuple; allowed are Images or"):
            score(net, *wrong)
    assert score(net, arrays) == score(net, Images.clean(*arrays, 4), None) == score(net, IMAGES, None)


@pytest.mark.parametrize(("after", "words"), [
    ((95.0, 10.0, 70.0), ("The backdoor is gone: ", "It cost 5.00 points", "true label again", "Next: other")),
    ((94.99, 10.0, 70.0), ("The backdoor is gone: ", "It cost 5.01 points", "(--ratio) or milder settings")),
    ((99.0, 10.0, 69.99), ("The backdoor is gone: ", "still leads to wrong labels: ", "milder settings")),
    ((100.0, 10.01, 70.0), ("weaker, but not gone: ", "It cost no accuracy: ", "or another defense;")),
    ((100.0, 45.0, 70.0), ("weaker, but not gone: ", "R-ACC 5.00 -> 70.00 %")),
    ((100.0, 45.01, 50.0), ("still there: ", "ASR 90.00 -> 45.01 %", "chosen by the test set")),
])  # fmt: skip
def test_the_conclusion_at_its_bounds(after, words):
    scores = [Score(*(Proportion(round(100 * v), 10_000) for v in values)) for values in ((100.0, 90.0, 5.0), after)]
    found = conclusion(*scores)
    assert len(found.splitlines()) == 4 and all(text in found for text in words), found
    assert "--ratio" not in conclusion(*scores, images=False)
    assert conclusion(*scores, took=False).startswith("The attack did not take")
    assert conclusion(scored(90, 10), scored(89, 0)).startswith("The attack did not take")
    assert conclusion(scored(90, None), scored(91, None)).startswith("There was no backdoor to remove.\nIt cost no")
