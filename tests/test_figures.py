"""Figures: what they show is what was measured."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from synthetic import attack, defense
from toys import QUICK, rows, tiny_net, toy_images

from sau.data import images as data
from sau.data.images import Images, to_float
from sau.errors import ConfigError, DataError, RecordError
from sau.figures import RISKS, curves, examples, images, last_features, risks, save, types
from sau.record.folder import Record
from sau.risk import Search

pytestmark = pytest.mark.usefixtures("closed_figures")


def lines(panel: plt.Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in panel.get_lines()}


def test_the_command_draws_every_figure_as_png_and_svg(victim, here, script, monkeypatch):
    """Of a defense that is named without the digest that a grid gives it."""
    flags = ("--epochs", "2", "--eval_every", "1", "--track_risk", "true", "--risk_samples", "40", "--risk_steps", "2")
    assert here("defense", "sau", "--result_file", "victim", *flags, *QUICK)[0] == 0
    (victim / "defense" / "sau").rename(victim / "defense" / "sau_c0.1_0123456789")
    really = data.sample
    monkeypatch.setattr(data, "sample", lambda test, bad, most, seed=0: really(test, bad, min(most, 80), seed))
    monkeypatch.setattr("sau.data.images.sample", data.sample)  # the search takes its time
    argv = ["victim", "--defense", "sau", "--map", "pca", "--eps", "0.05", "--threads", "1"]
    argv += ["--record_root", str(victim.parent)]
    status, out, err = script("figures.py", *argv)
    assert (status, err) == (0, "")
    names = {"images", "attack", "sau_c0.1_0123456789", "risks", "types", "examples_sau", "features_sau"}
    assert {file.name for file in (victim / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    assert {Path(line).name for line in out.split()} == {file.name for file in (victim / "figures").iterdir()}
    tracked = Record(victim / "defense" / "sau_c0.1_0123456789")
    rounds = rows(tracked.path)
    before = tracked.summary()["risk"]["before"]
    found = lines(risks([tracked]).axes[0])
    assert set(found) == {label for label, _, _ in RISKS.values()}
    for name in ("r_adv", "r_share", "r_bd"):
        assert found[RISKS[name][0]] == ([0, 1, 2], [before[name], *(row[name] for row in rounds)])
    top = types([tracked]).axes[0].collections[-1].get_datalim(plt.gca().transData).y1
    assert top == pytest.approx(max(sum(row[f"type{i}"] for i in (1, 2, 3)) for row in [before, *rounds]), abs=0.1)
    left, right = curves(tracked).axes
    assert set(lines(left)) == {"loss", "clean loss", "shared loss"}
    asr, summary = lines(right)["ASR"][1], tracked.summary()
    assert (asr[0], asr[-1]) == (summary["before"]["asr"], summary["after"]["asr"])


def test_a_run_without_risks_is_refused_and_one_without_rounds_ends_after_its_start(tmp_path):
    with pytest.raises(RecordError, match="--track_risk"):
        risks([Record(defense(attack(tmp_path)))])
    (path := tmp_path / "badnet_s0" / "defense" / "sau" / "metrics.jsonl").write_text("")
    found = lines(curves(Record(path.parent)).axes[1])
    assert found["ASR"] == ([0, 1], [98.0, 2.0])


def test_a_saved_figure_is_closed_undated_and_replaces_a_link(tmp_path):
    """A downloaded record may have a link to any file of the user."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.png").symlink_to(tmp_path / "precious")
    figure = plt.figure()
    assert save(figure, tmp_path / "x") == [tmp_path / "x.png", tmp_path / "x.svg"]
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    assert not plt.fignum_exists(figure.number) and "<dc:date>" not in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_above_their_triggered_versions(channels):
    test = toy_images(12, channels=channels)
    triggered = replace(test[torch.arange(6, 12)], labels=torch.ones(6, dtype=torch.long))
    triggered.pixels[..., :2, :2] = 255
    axes = images(test, triggered, columns=6).axes
    for column in range(6):
        shown = torch.from_numpy(axes[column].get_images()[0].get_array().data)
        assert torch.equal(shown, to_float(test.pixels[6 + column]).expand(3, -1, -1).permute(1, 2, 0))
        difference = axes[12 + column].get_images()[0].get_array()
        assert difference[:2, :2].max() > 0.1 and (difference[2:] == 0).all() and (difference[:, 2:] == 0).all()
    assert [axis.get_xlabel() for axis in axes[6:9]] == ["class 2, wanted 1", "class 3, wanted 1", "class 0, wanted 1"]


def test_examples_are_what_their_rows_say_of_images_that_both_networks_know():
    model, reference, x = tiny_net(seed=1), tiny_net(seed=10), to_float(toy_images(60).pixels)
    with torch.no_grad():
        test = Images.clean(toy_images(60).pixels, model(x).argmax(1), 4)
    figure = examples(model, reference, test, test, Search(eps=0.3, steps=10), columns=40)
    columns = len(figure.axes) // 6
    for column in range(columns):
        panels = [figure.axes[row * columns + column] for row in (0, 2, 4)]
        shown = [torch.from_numpy(panel.get_images()[0].get_array().data).permute(2, 0, 1) for panel in panels]
        right = int(test.labels[(x - shown[0]).abs().flatten(1).amax(1).argmin()])
        with torch.no_grad():
            said = [[int(net(image[None]).argmax()) for net in (reference, model)] for image in shown]
        assert [panel.get_xlabel() for panel in panels] == ["$h_b$: {}  $h$: {}".format(*both) for both in said]
        assert said[0] == [right] * 2 and said[1][0] == said[1][1] != right and said[2][0] != said[2][1]
    with pytest.raises(DataError, match="none of"):
        examples(model, model, test, test, Search(eps=0.3, steps=2))


def test_features_are_the_input_of_the_linear_layer_that_runs_last():
    model, x = tiny_net(), to_float(toy_images(200).pixels)  # more than a batch
    kept = last_features(model, x)
    torch.testing.assert_close(model.linear(kept), model(x))
    model.another = torch.nn.Linear(2, 2)  # last in the order of modules, but it does not run
    torch.testing.assert_close(last_features(model, x), kept)
    assert not model.linear._forward_hooks
    with pytest.raises(ConfigError, match="no Linear layer"):
        last_features(torch.nn.Conv2d(3, 2, 1), x)
