"""Figures: what they show is what was measured."""

import json
from pathlib import Path

import matplotlib
import pytest
import torch
from synthetic import attack, defense
from toys import QUICK, the_error, tiny_net, toy_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import sau.data.images
from sau.data.images import Images, to_float
from sau.errors import ConfigError, DataError, RecordError
from sau.figures import curves, examples, features, pictures, risks, save, types
from sau.figures.curves import RISKS
from sau.figures.features import last_features
from sau.record.folder import Record
from sau.witness import Search


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def tracked(victim, here) -> Path:
    flags = ("--epochs", "2", "--eval_every", "1", "--track_risk", "true", "--risk_samples", "40", "--risk_steps", "2")
    assert here("defense", "sau", "--result_file", "victim", *flags, *QUICK)[0] == 0
    return victim / "defense" / "sau"


def test_the_script_draws_every_figure_as_png_and_svg(tracked, script, monkeypatch):
    folder, really = tracked.parents[1], sau.data.images.sample

    def fewer(test, bad, most, seed=0):
        return really(test, bad, min(most, 80), seed)

    monkeypatch.setattr("sau.command.figures.sample", fewer)  # the search takes its time
    argv = ["victim", "--defense", "sau", "--map", "pca", "--eps", "0.05", "--threads", "1"]
    argv += ["--record_root", str(folder.parent)]
    status, out, err = script("figures.py", *argv)
    assert (status, err) == (0, "")
    names = {"pictures", "attack", "sau", "risks", "types", "examples_sau", "features_sau"}
    assert {file.name for file in (folder / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    assert {Path(line).name for line in out.split()} == {file.name for file in (folder / "figures").iterdir()}
    status, _, err = script("figures.py", "nobody", *argv[1:])
    assert status == 2 and "nobody" in the_error(err)
    risks_are_those_of_the_rows_and_of_the_network_before(tracked)
    curves_start_at_the_network_before(tracked)


def risks_are_those_of_the_rows_and_of_the_network_before(tracked):
    record = Record(tracked)
    rows = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    before = json.loads((tracked / "summary.json").read_text())["risk"]["before"]
    (panel,) = risks([record]).axes
    assert panel.get_title().startswith(f"{tracked.name} (") and "oracle" not in panel.get_title()
    said = {**record.summary(), "selection": "oracle"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "summary", lambda self: said)
        assert risks([record]).axes[0].get_title().startswith(f"{tracked.name} (oracle) (")
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert set(lines) == {label for label, _, _ in RISKS.values()}
    for name in ("r_adv", "r_share", "r_bd"):
        line = lines[RISKS[name][0]]
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata().tolist() == [before[name], *(row[name] for row in rows)]
    assert panel.get_xlabel() == "round" and "%" in panel.get_ylabel()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(lines)
    (panel,) = types([record]).axes
    top = panel.collections[-1].get_datalim(panel.transData).y1
    assert top == pytest.approx(max(sum(row[f"type{i}"] for i in (1, 2, 3)) for row in [before, *rows]), abs=0.1)


def curves_start_at_the_network_before(tracked):
    left, right = curves(Record(tracked)).axes
    assert {line.get_label() for line in left.get_lines()} == {"loss", "clean loss", "shared loss"}
    asr = next(line for line in right.get_lines() if line.get_label() == "ASR")
    summary = json.loads((tracked / "summary.json").read_text())
    assert asr.get_ydata()[0] == summary["before"]["asr"] and asr.get_ydata()[-1] == summary["after"]["asr"]


def test_a_run_without_risks_is_refused(victim):
    with pytest.raises(RecordError, match="--track_risk"):
        risks([Record(victim)])


def test_pictures_show_what_was_changed(tmp_path):
    test = toy_images(6)
    pixels = test.pixels.clone()
    pixels[:, :, 0, 0] = 255 - pixels[:, :, 0, 0] // 2
    triggered = Images(pixels, test.labels, test.labels, test.role, test.index, test.num_classes)
    figure = pictures(test, triggered, columns=3)
    difference = figure.axes[6].get_images()[0].get_array()
    assert (difference[1:] == 0).all() and difference[0, 0].max() > 0.1
    assert [path.suffix for path in save(figure, tmp_path / "deep" / "p")] == [".png", ".svg"]
    assert (tmp_path / "deep" / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "deep" / "p.svg").read_text()


def test_examples_are_what_their_rows_say():
    test, model, reference = toy_images(40), tiny_net(seed=1), tiny_net(seed=10)
    with torch.no_grad():
        answers = [net(to_float(test.pixels)).argmax(1) for net in (model, reference)]
    both_right = Images.clean(test.pixels, answers[0], 4)[(answers[0] == answers[1]).nonzero()[:, 0]]
    triggered = Images(both_right.pixels, both_right.labels, both_right.labels, both_right.role,
                       torch.arange(len(both_right)), 4)  # fmt: skip
    figure = examples(model, reference, both_right, triggered, Search(eps=0.3, steps=10), columns=2)
    columns = len(figure.axes) // 6
    answers = [axis.get_xlabel().replace("$h_b$: ", "").replace("$h$: ", "").split() for axis in figure.axes]
    for column in range(columns):
        clean, shared, other = (answers[row * columns + column] for row in (0, 2, 4))
        assert clean[0] == clean[1]  # both are right
        assert shared[0] == shared[1] != clean[0]
        assert other[0] != other[1] != clean[0]
    with pytest.raises(DataError, match="none of"):
        examples(model, model, both_right, triggered, Search(eps=0.3, steps=2))


def test_features_are_the_input_of_the_last_layer():
    model, x = tiny_net(), to_float(toy_images(10).pixels)
    kept = last_features(model, x, batch_size=4)
    torch.testing.assert_close(model.linear(kept), model(x))
    model.another = torch.nn.Linear(2, 2)  # last in the order of modules, but it does not run
    torch.testing.assert_close(last_features(model, x), kept)
    assert not model.linear._forward_hooks
    with pytest.raises(ConfigError, match="no linear layer"):
        last_features(torch.nn.Conv2d(3, 2, 1), x)


def test_the_map_shows_clean_and_triggered_pictures():
    test = toy_images(40)
    triggered = Images(test.pixels, torch.ones_like(test.labels), test.labels, test.role, test.index, 4)
    left, right = features(tiny_net(), tiny_net(seed=1), test, triggered, "pca", count=24).axes
    for panel in (left, right):
        others, wanted, crosses = (len(points.get_offsets()) for points in panel.collections)
        assert others + wanted == 24 and crosses == 6 and wanted > 0
    assert (left.get_title(), right.get_title()) == ("backdoored", "purified")


def test_a_link_in_place_of_a_figure_is_replaced_and_not_followed(tmp_path):
    """A downloaded record may have one, to any file of the user."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.png").symlink_to(tmp_path / "precious")
    assert save(plt.figure(), tmp_path / "x") == [tmp_path / "x.png", tmp_path / "x.svg"]
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def pairs(count: int, shift: int) -> tuple[Images, Images]:
    """Test pictures and triggered ones that are made from those after the first `shift`, towards class 1."""
    test = toy_images(count)
    places = torch.arange(shift, count)
    made = test[places]
    pixels = made.pixels.clone()
    pixels[..., :2, :2] = 255
    return test, Images(pixels, torch.ones_like(made.labels), made.labels, made.role, places, test.num_classes)


def test_pictures_stand_below_those_that_they_are_made_from():
    test, triggered = pairs(12, 6)
    axes = pictures(test, triggered, columns=6).axes
    for column in range(6):
        shown = axes[column].get_images()[0].get_array()
        assert (shown == to_float(test.pixels[6 + column]).permute(1, 2, 0).numpy()).all()
    assert [axis.get_xlabel() for axis in axes[6:9]] == ["class 2, wanted 1", "class 3, wanted 1", "class 0, wanted 1"]


def test_grey_pictures_are_drawn_grey():
    test = toy_images(4, channels=1)
    triggered = Images(255 - test.pixels, test.labels, test.labels, test.role, test.index, 4)
    assert {axis.get_images()[0].get_array().shape for axis in pictures(test, triggered).axes} == {(16, 16, 3)}


class Blinded(torch.nn.Module):
    """Answers 0 where the first pixel is white."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + 100 * torch.tensor([1, 0, 0, 0]) * (x[:, :1, 0, 0] == 1)


def test_examples_are_of_pictures_that_both_networks_know_and_name_the_backdoored_one_first():
    pixels = toy_images(60).pixels.clone()
    pixels[:, :, 0, 0] = 255 * (torch.arange(60) % 2)[:, None]
    model, reference = tiny_net(seed=1), Blinded(tiny_net(seed=10))
    with torch.no_grad():
        labels = model(to_float(pixels)).argmax(1)
    test, places = Images.clean(pixels, labels, 4), torch.arange(20, 60)
    triggered = Images(pixels[places], labels[places], labels[places], test.role[places], places, 4)
    figure = examples(model, reference, test, triggered, Search(eps=0.3, steps=10), columns=40)
    columns = len(figure.axes) // 6
    assert len(examples(model, reference, test, triggered, Search(eps=0.3, steps=10), columns=2).axes) == 12

    def shown(at: int) -> torch.Tensor:
        return torch.from_numpy(figure.axes[at].get_images()[0].get_array().data).permute(2, 0, 1)

    for column in range(columns):
        place = int((to_float(pixels) - shown(column)).abs().flatten(1).amax(1).argmin())
        right = int(labels[place])
        assert place >= 20 and place % 2 == 0 and right != 0
        assert figure.axes[column].get_xlabel() == f"$h_b$: {right}  $h$: {right}"
        with torch.no_grad():
            answers = [int(net(shown(4 * columns + column)[None]).argmax()) for net in (reference, model)]
        assert figure.axes[4 * columns + column].get_xlabel() == "$h_b$: {}  $h$: {}".format(*answers)


def test_the_map_names_the_class_that_is_wanted_and_leaves_batch_norm_alone():
    test, triggered = pairs(40, 8)
    net = tiny_net().train()
    before = net.features[1].running_mean.clone()
    panel = features(net, tiny_net(seed=1), test, triggered, "pca", count=24).axes[0]
    names = [points.get_label() for points in panel.collections]
    assert names == ["clean, other classes", "clean, class 1 (target)", "triggered"]
    assert len(panel.collections[1].get_offsets()) == 6
    assert torch.equal(net.features[1].running_mean, before)


def test_a_saved_figure_is_closed_and_its_vectors_are_undated(tmp_path):
    figure = plt.figure()
    save(figure, tmp_path / "x")
    assert not plt.fignum_exists(figure.number) and "<dc:date>" not in (tmp_path / "x.svg").read_text()


def test_types_and_balls_have_their_own_names(tmp_path):
    path = defense(attack(tmp_path), rows=2, risks=True)
    record = Record(path)
    said = record.summary()
    for norm, name in (("L_inf", r"$L_\infty$"), ("L2", "$L_2$"), ("L1", "$L_1$")):
        said["risk"]["search"] = {"norm": norm, "eps": 0.2, "steps": 5}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Record, "summary", lambda self: said)
            assert risks([record]).axes[0].get_title() == f"sau ({name} radius 0.2, 5 steps)"
    first, second, third = types([record]).axes[0].collections
    tops = [band.get_datalim(band.axes.transData).y1 for band in (first, second, third)]
    assert [band.get_label()[:3] for band in (first, second, third)] == ["I: ", "II:", "III"]
    assert tops == pytest.approx([50, 70, 80])


def test_of_a_method_with_stages_the_last_is_drawn(tmp_path):
    path = defense(attack(tmp_path), rows=1)
    rows = [{"epoch": 1, "loss": 9.0}, {"epoch": 2, "loss": 8.0}, {"stage": 1, "epoch": 1, "loss": 1.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = curves(Record(path)).axes[0].get_lines()
    assert line.get_xdata().tolist() == [1] and line.get_ydata().tolist() == [1.0]


def test_one_legend_has_the_lines_of_every_panel(tmp_path):
    first, second = (defense(attack(tmp_path, name), rows=1, risks=True) for name in ("badnet", "lf"))
    for path in (first, second):
        said = json.loads((path / "summary.json").read_text())
        said["risk"]["search"] = {"norm": "L2", "eps": 0.5, "steps": 5}
        (path / "summary.json").write_text(json.dumps(said))
    (second / "metrics.jsonl").write_text('{"epoch": 1, "acc": 88, "r_adv": 9, "r_share_sau": 8}\n')
    records = [Record(first), Record(second)]
    (legend,) = risks(records).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert set(labels) == {label for label, _, _ in RISKS.values()} and len(labels) == len(RISKS)


def test_an_attack_has_epochs_and_a_defense_rounds(tmp_path):
    path = attack(tmp_path)
    assert {panel.get_xlabel() for panel in curves(Record(path)).axes} == {"epoch"}
    assert {panel.get_xlabel() for panel in curves(Record(defense(path))).axes} == {"round"}


def test_a_loss_that_begins_later_is_drawn_from_there(tmp_path):
    path = defense(attack(tmp_path), rows=1)
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "shared_loss": 0.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {line.get_label(): line.get_xdata().tolist() for line in curves(Record(path)).axes[0].get_lines()}
    assert lines == {"loss": [1, 2], "shared loss": [2]}
