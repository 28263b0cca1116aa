"""The re-activation audit: its attacks do what they claim on networks with a backdoor, and not on those without."""

import copy
import json
import math
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_rows import each_poison
from synthetic import note
from test_risk import Line
from toys import QUICK, quiet, the_error, tiny_net, toy_images, train_victim

from sau.attack import BadNet, Prototype, WaNet, attack_from_config
from sau.audit import AuditConfig, Case, measure, open_case, read, run_audit, tables
from sau.audit.measure import STEPS, bec, cka, connected, layers, mixture, relearn, similarity, universal
from sau.audit.tables import curves
from sau.data.images import BACKDOOR, Augment, Images, to_float
from sau.data.sources import clean_subset
from sau.defense import FT
from sau.defense.npd import insert_polarizer
from sau.errors import ConfigError, RecordError
from sau.evaluate import reestimate_statistics, score
from sau.models import Normalized
from sau.record import attack_result as stored
from sau.record.folder import as_json

TRAIN, TEST = toy_images(400, seed=1), toy_images(200, seed=2)
BAD = BadNet().poison_test(TEST)
pytestmark = pytest.mark.usefixtures("closed_figures")


def poisons():
    made = BadNet().poison(TRAIN, torch.arange(len(TRAIN)))
    return made[(made.labels != made.true_labels).nonzero()[:, 0]]


@pytest.fixture(scope="module")
def nets():
    """A network with BadNets' backdoor, the same lightly fine-tuned, and one that was never poisoned; frozen."""
    torch.set_num_threads(1)
    attacked, clean = train_victim(BadNet(), TRAIN), train_victim(Prototype(), TRAIN)
    few = toy_images(200, seed=3)
    tuned = FT(lr=0.05, epochs=20, batch_size=25, augment=False).purify(attacked, few, session=quiet())
    return {"none": attacked, "ft": tuned, "control": clean}


def asr(model, delta=None):
    pixels = to_float(BAD.pixels) if delta is None else (to_float(BAD.pixels) + delta).clamp(0, 1)
    return score(model, TEST, (pixels, BAD.labels, BAD.true_labels)).asr.percent


def test_what_a_clean_network_would_answer_is_taken_off(tmp_path, script):
    def audit(attack, asr, floor):
        rows = [
            {"part": part, "curve": curve, "network": network, "x": x, "seed": 0, "acc": 80.0, **found}
            for network, found in (("sau", {"asr": asr, "racc": 50.0}), ("control", {"asr": floor, "racc": 60.0}))
            for part, curve, x in (("before", "", 0), ("statistics", "", 0), ("relearn", "released", 5))
        ]
        networks = {"sau": "", "control": ""}
        return {"rows": rows, "networks": networks, "attack": attack, "asked": {}, "about": {}}

    for name, one in (("a", audit("lf", 9.0, 4.0)), ("b", audit("lf", 7.0, 4.0)), ("c", audit("sig", 1.0, 0.0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audit.json").write_text(json.dumps(one))
    status, out, _ = script("tables.py", "clean", *(str(tmp_path / name) for name in "abc"))
    # Seeds of an attack first, then attacks: (8 + 1) / 2, and (4 + 1) / 2 above the control.
    assert status == 0 and "| sau | 2 | 80.0 | 4.5 | 2.5 | 50.0 | 10.0 | 4.5 | 4.5 | +4.0 (lf) |" in out
    for name, key, value in (("b", "asked", {"epochs": 1}), ("a", "networks", {"sau": ""})):
        (tmp_path / name / "audit.json").write_text(json.dumps({**audit("lf", 9.0, 4.0), key: value}))
        wrong = {"asked": "settings", "networks": "control"}[key]
        assert wrong in the_error(script("tables.py", "clean", *(str(tmp_path / one) for one in "ab"))[2])


def test_the_attackers_images_are_nested_and_drawn_apart_from_the_defenders():
    bad, step = poisons(), Augment(2)
    draws = {k: mixture(TRAIN, bad, k, share=0.25, seed=3, augment=step) for k in (0, 2, 5)}
    for k, drawn in draws.items():
        assert len(drawn) == 100 and int((drawn.role == BACKDOOR).sum()) == k and bool((drawn.labels[:k] == 0).all())
        assert torch.equal(drawn.pixels[k:], draws[0].pixels[k:])  # the first k clean ones make room
    assert torch.equal(draws[2].pixels[:2], draws[5].pixels[:2])
    chosen = draws[5].index[:5]
    at = [(bad.index == place).nonzero()[0, 0] for place in chosen]
    assert torch.equal(draws[5].pixels[:5], bad.pixels[torch.stack(at)])  # poisons are not augmented
    assert not torch.equal(draws[0].pixels, TRAIN.pixels[draws[0].index])
    plain_draw = mixture(TRAIN, bad, 0, share=0.25, seed=3)
    assert torch.equal(plain_draw.pixels, TRAIN.pixels[draws[0].index])
    both = set(plain_draw.index.tolist()) & set(clean_subset(TRAIN, 0.25, 3).index.tolist())
    assert 10 < len(both) < 40  # 25 is what two independent draws share
    assert set(plain_draw.index.tolist()) != set(mixture(TRAIN, bad, 0, share=0.25, seed=4).index.tolist())
    with pytest.raises(ConfigError) as refusal:
        mixture(TRAIN, bad, 0, share=0.0002, seed=0)
    assert refusal.value.param == "share"


def test_five_poisons_bring_back_a_backdoor_and_plant_none(nets):
    after = {
        (name, k): asr(relearn(nets[name], mixture(TRAIN, poisons(), k, share=0.25, seed=0), epochs=20))
        for name in ("ft", "control")
        for k in (0, 5)
    }
    assert asr(nets["none"]) > 30 and asr(nets["ft"]) < 15 and asr(nets["control"]) < 5 and after["ft", 0] < 15
    assert after["ft", 5] - after["ft", 0] > after["control", 5] - after["control", 0] + 25


def test_relearning_is_what_the_protocol_says(nets, monkeypatch):
    """SGD 0.01 with momentum 0.9 and nothing else, batches of 128, by hand for one epoch of two batches."""
    monkeypatch.setattr("sau.defense.checks.verdict_of", None)  # the verdict of a defense takes long
    images = mixture(TRAIN, poisons(), 3, share=0.5, seed=1)
    again = relearn(nets["ft"], images, epochs=1, seed=1)
    by_hand = copy.deepcopy(nets["ft"]).requires_grad_()
    weights = list(by_hand.train().parameters())
    speed = [torch.zeros_like(weight) for weight in weights]
    for x, y, *_ in images.batches(128, seed=1):
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(by_hand(x), y), weights)
        speed = [0.9 * v + gradient for v, gradient in zip(speed, gradients, strict=True)]
        with torch.no_grad():
            for weight, v in zip(weights, speed, strict=True):
                weight -= 0.01 * v
    for weight, got in zip(weights, again.parameters(), strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.features[1].running_mean, by_hand.features[1].running_mean)


def test_a_perturbation_raises_the_asr_and_never_leaves_its_ball(nets):
    budgets = (0.01, 0.05, 0.1)
    found = dict(universal(nets["ft"].requires_grad_(False), poisons(), budgets, steps=20))
    again = dict(universal(nets["ft"], poisons(), budgets, steps=20))
    assert list(found) == list(budgets)
    for eps, delta in found.items():
        assert delta.shape == (1, 3, 16, 16) and float(delta.abs().max()) <= torch.tensor(eps)
        assert torch.equal(delta, again[eps])
    assert asr(nets["ft"], found[0.1]) > asr(nets["ft"], found[0.01]) + 30 > asr(nets["ft"]) + 30
    other = dict(universal(nets["ft"], poisons(), budgets, steps=20, seed=1))
    assert not torch.equal(other[0.1], found[0.1])


def test_the_perturbation_of_a_linear_network_is_the_exact_one():
    """The largest rise of w . D in the ball is at eps sign(w)."""
    w = torch.randn(48, generator=torch.Generator().manual_seed(0))
    w = 3 * w.sign() * (0.2 + w.abs())
    ones, grey = torch.ones(200, dtype=torch.long), torch.full((200, 3, 4, 4), 128, dtype=torch.uint8)
    images = Images(grey, ones, 1 - ones, ones.byte(), ones, 2)
    ((_, delta),) = universal(Line(w).requires_grad_(False), images, [0.01], steps=20)
    assert torch.equal(delta.flatten(), torch.tensor(0.01) * w.sign())


@each_poison
def test_an_attack_is_recalled_from_its_record(attack):
    settings = as_json({"attack": attack.name, **attack.params(), "epochs": 3})
    trigger = attack.trigger.state_dict() if attack.trigger is not None else None
    again = attack_from_config(settings, trigger)
    assert again == attack and type(again) is type(attack)
    if isinstance(attack, WaNet):
        x = to_float(toy_images(2).pixels)
        assert torch.equal(again.stamp(x), attack.stamp(x))
    with pytest.raises(RecordError, match="'mine'"):
        attack_from_config({"attack": "mine"}, None)


def test_cka_by_hand():
    """Of one feature each it is the squared correlation: (-1, 0, 1) with (-1, 1, 0) 1/4, with (1, -2, 1) 0. With two
    features, X X' of the rows (1, 0), (0, 1), (-1, -1) is centred already: [[1, 0, -1], [0, 1, -1], [-1, -1, 2]], of
    length sqrt(10); that of y = (-1, 0, 1) is [[1, 0, -1], [0, 0, 0], [-1, 0, 1]], of length 2; their product 5."""
    line = torch.tensor([[-1.0], [0.0], [1.0]])
    assert cka(line, torch.tensor([[-1.0], [1.0], [0.0]])) == pytest.approx(0.25, abs=1e-12)
    assert cka(line, torch.tensor([[1.0], [-2.0], [1.0]])) == pytest.approx(0, abs=1e-12)
    assert cka(line, 3 - 2 * line) == pytest.approx(1, abs=1e-12)
    plane = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert cka(plane, line) == pytest.approx(5 / (2 * math.sqrt(10)), abs=1e-12)
    assert cka(plane, torch.ones(3, 4)) == 0.0


def test_the_coefficient_is_1_for_the_attacked_network_and_0_for_the_clean_one(nets):
    chosen = measure.top_tac_channels(nets["none"], TEST[BAD.index], BAD)
    assert layers(nets["none"]) == ["features.3"] and {n: len(c) for n, c in chosen.items()} == {"features.3": 1}
    alike = {}
    for name, model in nets.items():
        by_layer = similarity(nets["none"], model, BAD, chosen)
        alike[name] = sum(by_layer.values()) / len(by_layer)
    left = {name: bec(s, alike["control"]) for name, s in alike.items()}
    assert left["none"] == pytest.approx(1, abs=1e-9) and left["control"] == 0 and left["none"] > left["ft"]
    model = tiny_net()
    model.load_state_dict(nets["none"].state_dict())
    insert_polarizer(model.eval(), "features.3")  # the layer behind it answers under its old name
    assert similarity(nets["none"], model, BAD, chosen)["features.3"] == pytest.approx(1, abs=1e-6)
    assert bec(1.0, 1.0) is None


def test_the_channels_that_change_with_the_trigger_are_chosen():
    """Channel 7 of 20 alone sees the corner; a second one is chosen, for a tenth of 20 is two. The first convolution
    and those beside the main path do not count."""
    first, second = torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.Conv2d(3, 20, 3, padding=1)
    with torch.no_grad():
        first.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        second.weight.mul_(1e-3)
        second.weight[7] = 1.0
    layers = {"first": first, "shortcut": torch.nn.Conv2d(3, 3, 1), "second": second}
    net = torch.nn.Sequential(OrderedDict(layers))
    chosen = measure.top_tac_channels(net, TEST[BAD.index], BAD)
    assert list(chosen) == ["second"] and len(chosen["second"]) == 2 and 7 in chosen["second"].tolist()
    assert not second._forward_hooks


def case(nets, names=("none", "ft", "control")):
    networks = {name: Normalized(nets[name]).eval().requires_grad_(False) for name in names}
    return Case("toy", networks, TRAIN, poisons(), TEST, BAD, Augment(2), (), {"attack": "badnet"})


SMALL = {"shots": (2,), "epochs": 1, "share": 0.25, "eps": (0.05, 0.1), "steps": 2}


def test_an_audit_has_every_part_for_every_network(nets, monkeypatch):
    said = []
    found = run_audit(case(nets), AuditConfig(**SMALL), said.append)
    lines = curves([found])
    names = {"none", "ft", "control"}
    steps = {("before", ""): [0], ("statistics", ""): [0], ("white", "trigger + noise"): [0.05, 0.1]}
    steps |= {("relearn", curve): [0, 2] for curve in ("released", "fresh")}
    steps |= {("white", curve): [0.0, 0.05, 0.1] for curve in ("trigger + D", "D alone")}
    for key, wanted in steps.items():
        assert set(lines[key]) == names and all(list(line) == wanted for line in lines[key].values()), key
    assert set(lines["white", "same D on control"]) == {"none", "ft"}
    for curve in ("statistics between", "statistics anew"):
        assert list(lines["path", curve]) == ["ft"] and list(lines["path", curve]["ft"]) == list(STEPS)
    as_it_is = {name: score(model, TEST, BAD).asr.percent for name, model in nets.items()}
    for key, start in ((("before", ""), 0), (("white", "trigger + D"), 0.0)):
        assert {name: line[start].mean for name, line in lines[key].items()} == as_it_is
    anew = copy.deepcopy(case(nets).networks["none"])
    reestimate_statistics(anew, mixture(TRAIN, poisons(), 0, share=0.25, seed=0), Augment(2))
    assert lines["statistics", ""]["none"][0].mean == score(anew, TEST, BAD).asr.percent != as_it_is["none"]
    way = lines["path", "statistics between"]["ft"]
    assert [way[0.0].mean, way[1.0].mean] == [as_it_is["none"], as_it_is["ft"]]
    left = {row["network"]: row for row in found["rows"] if row["part"] == "bec"}
    assert left["none"]["bec"] == pytest.approx(1) and left["control"]["bec"] == 0
    with pytest.raises(ConfigError, match="bec"):
        run_audit(case(nets, ("none", "ft")), AuditConfig(**{**SMALL, "parts": ("bec",)}))
    monkeypatch.setattr("sau.audit.measure.layers", lambda model: [])  # as of a transformer
    short = run_audit(case(nets), AuditConfig(**{**SMALL, "parts": ("bec",)}))
    assert short["notes"][-1].startswith("no bec") and {row["part"] for row in short["rows"]} == {"before"}
    assert len(said) == len(found["rows"]) and list(found["seconds"]) == ["before", *AuditConfig().parts]
    text = tables([found])
    assert all(part in text for part in ("| ft | ", "k = 2", "|---|---|", "| network | s | BEC |"))


def test_settled_statistics_are_those_of_the_images():
    torch.manual_seed(0)
    norm, dropped = torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)
    images = TRAIN[torch.arange(300)]
    model = torch.nn.Sequential(dropped, norm).eval()
    reestimate_statistics(model, images)
    batches = [x for x, *_ in images.batches(256, seed=0)]
    assert len(batches) == 2 and not model.training and not norm.training
    for found, wanted in ((norm.running_mean, torch.mean), (norm.running_var, torch.var)):
        torch.testing.assert_close(found, torch.stack([wanted(x, (0, 2, 3)) for x in batches]).mean(0))


def test_no_path_leads_to_a_network_with_other_layers(nets):
    some, other, said = case(nets), tiny_net(), []
    insert_polarizer(other, "features.3")
    some.networks["npd"] = Normalized(other).eval()
    assert not connected(some.networks["none"], some.networks["npd"])
    found = run_audit(some, AuditConfig(**{**SMALL, "parts": ("path",)}), said.append)
    assert {row["network"] for row in found["rows"] if row["part"] == "path"} == {"ft"}
    assert len(found["notes"]) == 1 and said[0] == f"note: {found['notes'][0]}" and "npd" in said[0]


def test_shots_are_no_more_than_the_attacker_can_have(nets):
    few = replace(case(nets, ("none",)), poisons=poisons()[torch.arange(3)])
    found = run_audit(few, AuditConfig(**{**SMALL, "parts": ("relearn",), "shots": (2, 5, 9)}), lambda text: None)
    assert {row["x"] for row in found["rows"] if row["part"] == "relearn"} == {0, 2, 3} and "3" in found["notes"][0]


def test_a_grids_defense_is_found_by_its_name_and_one_of_another_attack_refused(victim, here):
    """Another attack: as its folder leaves them when it was emptied by hand and filled anew."""
    flags = ("--result_file", "victim", "--epochs", "1", *QUICK)
    assert here("defense", "ft", *flags, "--save_folder_name", "ft_c0.05_0123456789")[0] == 0
    assert list(open_case(victim, ["ft"], samples=30).networks) == ["none", "ft"]
    first, second = (victim / "defense" / name for name in ("ft_c0.05_0123456789", "ft_c0.1_abcdef0123"))
    shutil.copytree(first, second)
    with pytest.raises(RecordError, match=second.name):
        open_case(victim, ["ft"], samples=30)
    assert list(open_case(victim, [second.name], samples=30).networks) == ["none", second.name]
    note(first, attacked="0" * 64)
    with pytest.raises(RecordError, match="another attack"):
        open_case(victim, [first.name], samples=30)


def test_a_defense_that_test_data_chose_for_is_marked(victim, here):
    flags = ("--result_file", "victim", *QUICK, "--select", "oracle", "--u_num", "2", "--save_folder_name", "ep")
    assert here("defense", "ep", *flags)[0] == 0
    assert list(open_case(victim, ["ep"], samples=30).networks) == ["none", "ep (oracle)"]


@pytest.fixture
def clean(victim, here):
    """A record of a clean network beside `victim`."""
    flags = ("--dataset", "digits", "--width", "4", "--epochs", "2", *QUICK)
    assert here("attack", "prototype", "--save_folder_name", "clean", *flags)[0] == 0
    return victim.parent / "clean"


@pytest.mark.parametrize("attack", ["sig", "lc"])
def test_clean_label_poisons_are_stamped_anew(attack, victim, here):
    flags = ("--dataset", "digits", "--width", "4", "--epochs", "1", "--pratio", "0.05", *QUICK)
    assert here("attack", attack, "--save_folder_name", "kept", *flags)[0] == 0
    opened = open_case(victim.parent / "kept", samples=50)
    train, _, _ = stored.load(victim.parent / "kept").images("./data")
    assert len(opened.poisons) == int((train.labels != 0).sum()) and bool((opened.poisons.labels == 0).all())


def test_records_that_cannot_be_audited_are_refused(victim, clean):
    for wrong, word in (
        ({"place": clean}, "clean network"),
        ({"place": victim, "defenses": ["nobody"]}, "nobody"),
        ({"place": victim, "control": victim}, "attacked network"),
    ):
        with pytest.raises(RecordError, match=word):
            open_case(**wrong)
    control = open_case(victim, control=clean).networks["control"]
    assert not control.training and not any(p.requires_grad for p in control.parameters())
    note(clean, data={"dataset": "digits", "train": "0" * 64, "test": ""})
    with pytest.raises(RecordError, match="other digits images"):
        open_case(victim, control=clean)
    (clean / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RecordError, match="differs"):
        open_case(victim, control=clean)


BRIEF = ("--shots", "2", "--epochs", "1", "--eps", "0.05", "--steps", "2", "--samples",
         "60", "--threads", "1", "--device", "cpu")  # fmt: skip


def test_the_script_audits_a_grids_records_and_their_audits_are_compared(victim, clean, here, script):
    """Two attacks of seeds 0 and 1 with their controls, named without ratio and digest."""
    root = victim.parent
    victim.rename(root / "badnet_r0.1_0123456789_s0")
    assert here("defense", "ft", "--result_file", "badnet_s0", "--epochs", "1", *QUICK)[0] == 0
    shutil.copytree(root / "badnet_r0.1_0123456789_s0", root / "badnet_r0.1_0123456789_s1")
    for seed in "01":
        shutil.copytree(clean, root / f"prototype_0123456789_s{seed}")
    names = ("--result_file", "badnet_s0", "badnet_s1", "--control", "prototype_s0", "prototype_s1")
    assert script("audit.py", *names, "--defense", "ft", *BRIEF)[0] == 0
    assert script("audit.py", *names[:5], "--defense", "ft", *BRIEF)[1].count("finished") == 2  # a control for both
    audits = [root / f"badnet_r0.1_0123456789_s{seed}" for seed in "01"]
    assert {file.name for file in (audits[0] / "audit").iterdir()} == {"audit.json", "audit.png", "audit.svg"}
    found = [read(place) for place in audits]
    assert found[0]["rows"] == found[1]["rows"]
    assert "| ft | 1 |" in script("tables.py", "clean", *map(str, audits))[1]
    both = ("audits.py", *map(str, audits), "--out", "both/badnet")
    assert "same network" in the_error(script(*both)[2])
    other, file = {**found[1]["networks"], "none": "another seed's"}, audits[1] / "audit" / "audit.json"
    for asked, status in (({**found[1]["asked"], "epochs": 99}, 2), (found[1]["asked"], 0)):
        file.write_text(json.dumps({**found[1], "networks": other, "asked": asked}))
        assert script(*both)[0] == status
    assert {file.name for file in Path("both").iterdir()} == {"badnet.md", "badnet.png", "badnet.svg"}


def test_the_script_does_without_a_control_what_can_be_done(victim, script):
    flags = ("--result_file", "victim", *BRIEF)
    status, out, _ = script("audit.py", *flags, "--out", "elsewhere")
    assert status == 0 and out.startswith("note: --control is missing") and "existence" not in out
    assert Path("elsewhere/audit.png").stat().st_size > 0
    status, out, _ = script("audit.py", *flags, "--out", "elsewhere")
    assert status == 0 and "is this audit, finished" in out and "ASR" not in out
    there = ("--out", "elsewhere", "--samples", "50"), "is another audit"
    several = ("--result_file", "a", "b", "--out", "x"), "--out is for one"
    for wrong, key in ((("--parts", "bec"), "bec"), (("--control", "a", "b"), "control"), there, several):
        status, _, err = script("audit.py", *flags, *wrong)
        assert status == 2 and key in the_error(err)


def test_draws_of_an_attacker_are_one_network_among_several():
    def audit_of(*asrs: float) -> dict[str, Any]:
        common = {"part": "white", "curve": "c", "network": "ft", "x": 0}
        return {"rows": [{**common, "seed": seed, "asr": asr} for seed, asr in enumerate(asrs)]}

    def values(*audits: dict[str, Any]) -> tuple[float, ...]:
        return curves(audits)["white", "c"]["ft"][0].values

    assert values(audit_of(10.0, 20.0)) == (10.0, 20.0)
    assert values(audit_of(10.0, 20.0), audit_of(40.0, 60.0)) == (15.0, 50.0)
