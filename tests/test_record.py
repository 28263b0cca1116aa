"""The result folder: files are written whole or not at all, checked before they are read, and used by one process."""

import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hostile import Call, touch
from torch import nn
from toys import REPOSITORY, environment, refuses

from sau.errors import Finished, LockedError, RecordError
from sau.files import acquire, checksum, existing, in_use, read, release, safe_join, write
from sau.record import folder as module
from sau.record.attack_result import BACKDOORBENCH, load, load_weights
from sau.record.folder import CHECKPOINT, CONFIG, LOG, MANIFEST, METRICS, SCHEMA, SUMMARY, Record, read_config

IDENTITY = {"lr": 0.1, "milestones": (60, 90), "path": None}
EPOCH_1 = {"stage": 0, "place": {"epoch": 1}}


def begun(path: Path, identity=IDENTITY, overwrite: bool = False, **config) -> Record:
    record = Record(path)
    record.begin({"run": {"threads": 1}, **config}, identity, overwrite)
    return record


def made(path: Path) -> Record:
    """A finished folder with every kind of file."""
    record = begun(path)
    record.log("a line")
    record.log_metrics(epoch=1, loss=0.5)
    record.save_tensors("model", {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)})
    record.finish({"acc": 91.3})
    return record


def listing(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_size) or sync(number))
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append(target.name) or replace(self, target))
    write(tmp_path / "a" / "file", b"12345")
    assert events == [5, "file"] and listing(tmp_path) == ["a", "a/file"]


@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace"), (Path, "mkdir")], ids=lambda where: where[1])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where, number):
    write(tmp_path / "file", b"old")

    def full(*args, **more) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*where, full)
    with pytest.raises(RecordError, match=str(tmp_path / "file")) as caught:
        write(tmp_path / "file", b"new and longer")
    assert caught.value.status == 1
    assert (tmp_path / "file").read_bytes() == b"old" and listing(tmp_path) == ["file"]


def test_reading_refuses_what_is_no_small_regular_file(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    assert read(tmp_path / "x", 5) == b"12345" and checksum(tmp_path / "x") == hashlib.sha256(b"12345").hexdigest()
    for path, most in ((tmp_path / "x", 4), (tmp_path / "fifo", 9), (Path("/dev/zero"), 9), (tmp_path, 9)):
        with pytest.raises(OSError):  # noqa: PT011, four kinds
            read(path, most)


def test_a_folder_name_has_up_to_100_plain_characters(tmp_path):
    for name in ("a", "badnet_0.1", "x" * 100, "a..b"):
        assert safe_join(tmp_path, name) == tmp_path / name
    for name in ("", "..", "a/b", "-rf", ".hidden", "a\n", "é", "x" * 101, "a."):
        with pytest.raises(RecordError, match="folder name"):
            safe_join(tmp_path, name)


def test_a_folder_is_given_by_name_or_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    assert existing("record", "a") == existing("record", "a/") == Path("record/a")
    assert existing("record", "elsewhere/a") == Path("elsewhere/a")
    assert existing("record", str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    for name in ("elsewhere/b", "..", "../nothing"):
        with pytest.raises(RecordError, match="folder"):
            existing("record", name)


def test_a_link_that_leads_out_is_refused_and_the_root_may_be_a_link(tmp_path):
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "disk2").mkdir()
    (tmp_path / "record").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "near").symlink_to(tmp_path / "disk2")  # its name begins alike
    (tmp_path / "disk" / "a" / "defense").symlink_to(tmp_path / "disk2")
    for names in (("near",), ("a", "defense", "sau")):
        with pytest.raises(RecordError, match="link"):
            safe_join(tmp_path / "record", *names)
    assert safe_join(tmp_path / "record", "a").name == "a"


def test_facts_come_back(tmp_path):
    record = begun(tmp_path / "a", values=(1, 2), command="first")
    record.update_config(amp=True)
    with pytest.raises(RecordError, match="unfinished"):
        Record(tmp_path / "a").check()
    assert record.load() is None
    for command in ("second", "third"):
        again = begun(tmp_path / "a", command=command, run={"trigger_radius": 0.9})
    assert again.config["amp"] is True and again.config["values"] == [1, 2]
    stored = read_config(tmp_path / "a" / CONFIG)
    assert stored == again.config and stored["run"] == {"trigger_radius": 0.9} and stored["command"] == "third"


@pytest.mark.parametrize(("other", "words"), [
    ({**IDENTITY, "lr": 0.2}, "lr: 0.1 there, 0.2 here"),
    ({**IDENTITY, "milestones": (60,)}, "milestones: [60, 90] there, [60] here"),
    ({**IDENTITY, "new": 1}, "new: None there, 1 here"),
])  # fmt: skip
def test_an_unfinished_run_with_other_settings_is_refused_with_the_difference(tmp_path, other, words):
    begun(tmp_path / "a").log_metrics(epoch=1, loss=0.5)
    before = listing(tmp_path)
    with refuses(RecordError, words, "--overwrite"):
        begun(tmp_path / "a", other)
    assert listing(tmp_path) == before


def test_a_run_that_stopped_before_its_first_epoch_does_not_stand_in_the_way(tmp_path):
    begun(tmp_path / "a", {"layers": "wrong"}).log("error")
    mended = begun(tmp_path / "a", {"layers": "right"})
    assert mended.config["identity"] == {"layers": "right"} and listing(tmp_path / "a") == [CONFIG]


def test_a_finished_folder_is_refused_until_it_is_overwritten(tmp_path):
    made(tmp_path / "a")
    before = listing(tmp_path)
    with pytest.raises(Finished):
        begun(tmp_path / "a")
    with pytest.raises(RecordError, match="--overwrite") as refusal:
        begun(tmp_path / "a", {"lr": 3})
    assert type(refusal.value) is RecordError and listing(tmp_path) == before
    (tmp_path / "a" / METRICS).write_text("{}")  # damaged, so not finished
    with pytest.raises(RecordError, match=METRICS) as refusal:
        begun(tmp_path / "a")
    assert type(refusal.value) is RecordError
    begun(tmp_path / "a", overwrite=True)
    assert listing(tmp_path / "a") == [CONFIG]


@pytest.mark.parametrize("config", [None, "", "a: 1\n", "[1]\n", "a: [\n", "schema: 1\ndigest: x\n", "x: !!int ''\n"])
def test_a_folder_that_is_not_ours_is_refused_and_nothing_in_it_is_touched(tmp_path, config):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    if config is not None:
        (tmp_path / "photos" / CONFIG).write_text(config)
    before = listing(tmp_path / "photos")
    for overwrite in (False, True):
        with pytest.raises(RecordError, match="not a result folder"):
            begun(tmp_path / "photos", overwrite=overwrite)
        with pytest.raises(RecordError, match="is a file"):
            begun(tmp_path / "photos" / "one.jpg", overwrite=overwrite)
    assert [name for name in listing(tmp_path / "photos") if not name.endswith(".lock")] == before


@pytest.mark.parametrize("version", [SCHEMA + 1, 1, "2", None])
def test_a_folder_of_another_version_is_refused(tmp_path, version):
    record = begun(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(yaml.safe_dump({**record.config, "schema": version}))
    with pytest.raises(RecordError, match="schema"):
        begun(tmp_path / "a")


def test_what_a_killed_write_left_is_removed_and_other_hidden_files_stay(tmp_path):
    for name in ("a", "a/defense/ft"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f".{CONFIG}.abcdef_9.partial").write_bytes(b"schema: ")  # of a first write
        begun(tmp_path / name)
    (tmp_path / "a" / ".model.safetensors.x1y2z3_4.partial").write_bytes(b"half a file")
    (tmp_path / "a" / ".x.partial").mkdir()
    (tmp_path / "a" / ".config.yaml.swp").write_text("mine")
    begun(tmp_path / "a").finish({"acc": 1.0})
    hidden = [".config.yaml.swp", ".x.partial"]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [*hidden, CONFIG, "defense", MANIFEST, SUMMARY]
    (tmp_path / "a" / ".config.yaml.swp").unlink()
    assert set(json.loads((tmp_path / "a" / MANIFEST).read_text())["files"]) == {CONFIG, SUMMARY}
    Record(tmp_path / "a").check()


@pytest.mark.parametrize("number", range(6))
def test_a_killed_deletion_goes_on(tmp_path, monkeypatch, number):
    """The configuration, by which a folder is known as ours, is deleted last, and links are not followed."""
    made(tmp_path / "a")
    (tmp_path / "photo").write_text("precious")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "photo")
    gone, unlink = [0], Path.unlink

    def dying(path: Path, **more: bool) -> None:
        gone[0] += 1
        if gone[0] > number:
            raise KeyboardInterrupt
        unlink(path, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", dying)
        begun(tmp_path / "a", overwrite=True)
    assert Record(tmp_path / "a").finished == (number == 0)
    begun(tmp_path / "a", overwrite=True)
    assert listing(tmp_path / "a") == [CONFIG] and (tmp_path / "photo").read_text() == "precious"


def test_a_finished_folder_passes_its_check(tmp_path):
    record = made(tmp_path / "disk" / "a")
    (tmp_path / "linked").symlink_to("disk")
    again = Record(tmp_path / "linked" / "a")
    assert again.finished and again.check() == record.config and again.summary() == {"acc": 91.3}
    assert listing(again.path) == [CONFIG, LOG, MANIFEST, METRICS, "model.safetensors", SUMMARY]
    for name, entry in json.loads((again.path / MANIFEST).read_text())["files"].items():
        content = (again.path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    made(again.path / "defense" / "sau")  # folders inside are no part of the manifest
    again.check()
    tensors = again.load_tensors("model")
    assert torch.equal(tensors["weight"], torch.arange(6.0).view(2, 3)) and int(tensors["count"]) == 7


@pytest.mark.parametrize("name", [CONFIG, LOG, METRICS, SUMMARY, "model.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "longer", "missing", "unnamed", "FIFO", "too large"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    file, manifest = made(tmp_path / "a").path / name, tmp_path / "a" / MANIFEST
    content = file.read_bytes()
    if damage == "unnamed":
        edit_json(manifest, lambda content: content["files"].pop(name))
    file.unlink()
    changed = {"bit": bytes([content[0] ^ 1]) + content[1:], "truncated": content[:-1], "longer": content + b"\0"}
    if damage in changed or damage == "unnamed":
        file.write_bytes(changed.get(damage, content))
    elif damage == "FIFO":
        os.mkfifo(file)
    elif damage == "too large":
        file.touch()
        os.truncate(file, 1 << 40)
    if (name, damage) == (LOG, "unnamed"):
        Record(tmp_path / "a").check()  # nobody reads it
        return
    with pytest.raises(RecordError, match=rf"{name}|no result folder|not a result"):
        Record(tmp_path / "a").check()


@pytest.mark.parametrize("name", ["poisoned.safetensors", "more.pt", BACKDOORBENCH])
def test_a_file_that_a_reader_would_take_must_be_in_the_manifest(tmp_path, name):
    made(tmp_path / "a")
    (tmp_path / "a" / name).touch()
    with pytest.raises(RecordError, match=f"does not name {name}"):
        load(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2, "files": 3}', "\xff", "[" * 200_000])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    manifest = made(tmp_path / "a").path / MANIFEST
    (tmp_path / "secret").write_text("x")
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    edit_json(manifest, lambda content: content["files"].update({"../secret": entry}))
    with pytest.raises(RecordError):
        Record(tmp_path / "a").check()
    manifest.write_text(text, encoding="latin-1")
    with pytest.raises(RecordError, match=MANIFEST):
        Record(tmp_path / "a").check()


def test_a_light_check_compares_the_sizes_of_weights_alone(tmp_path):
    weights = made(tmp_path / "a").path / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    Record(tmp_path / "a").check(light=True)
    weights.write_bytes(raw[:-1])
    with pytest.raises(RecordError, match=r"model\.safetensors"):
        Record(tmp_path / "a").check(light=True)


def test_a_full_disk_at_the_end_costs_only_the_end(tmp_path, monkeypatch):
    """The manifest is written last, and the checkpoint stays until then."""
    record, really = begun(tmp_path / "a"), module.write
    record.save(EPOCH_1)

    def full(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise RecordError("no room")
        really(path, content)

    with monkeypatch.context() as patch, pytest.raises(RecordError):
        patch.setattr(module, "write", full)
        record.finish({"acc": 1.0})
    assert not record.finished and begun(tmp_path / "a").load() == EPOCH_1
    record.finish({"acc": 1.0})
    assert not (tmp_path / "a" / CHECKPOINT).exists() and Record(tmp_path / "a").check()


def test_rows_since_the_last_checkpoint_stay_when_a_later_stage_asks_for_it(tmp_path):
    begun(tmp_path / "a").save(EPOCH_1)
    (record := begun(tmp_path / "a")).load()
    record.log_metrics(epoch=2, loss=0.5)
    assert record.load() == EPOCH_1 and (record.path / "metrics.jsonl").read_text().count("\n") == 1


def test_tensors_in_another_memory_layout_come_back(tmp_path):
    record, weight = begun(tmp_path / "a"), torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    kept = {"weight": weight, "view": weight[:, 1], "one": weight.mean(), "same": weight}
    record.save_tensors("model", kept)
    assert all(torch.equal(value, kept[name]) for name, value in record.load_tensors("model").items())
    record.save_tensors("plain", {"weight": weight}, pickled=True)
    assert torch.equal(torch.load(record.path / "plain.pt", weights_only=True)["weight"], weight)
    (record.path / "model.safetensors").write_bytes(b"not tensors")
    for name in ("model", "missing"):
        with pytest.raises(RecordError, match=name):
            record.load_tensors(name)


@pytest.mark.parametrize("damage", ["sum", "bit", "cut", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    record = begun(tmp_path / "a")
    assert record.load() is None
    record.save({**EPOCH_1, "objects": {"model": {"weight": torch.ones(3)}}})
    loaded = Record(tmp_path / "a").load()
    assert loaded is not None and torch.equal(loaded["objects"]["model"]["weight"], torch.ones(3))
    file = tmp_path / "a" / CHECKPOINT
    raw = bytearray(file.read_bytes())
    raw[0 if damage == "sum" else 100] ^= damage in ("sum", "bit")
    file.write_bytes({"cut": raw[:200], "empty": b""}.get(damage, raw))
    with pytest.raises(RecordError, match=CHECKPOINT):
        record.load()


@pytest.mark.parametrize("kind", ["torch", "pickle", "old torch", "nonsense"])
def test_a_malicious_checkpoint_with_a_right_sum_is_not_executed(tmp_path, kind):
    canary, buffer = tmp_path / "canary", io.BytesIO()
    if kind == "nonsense":
        buffer.write(b"nonsense")
    elif kind == "pickle":
        pickle.dump(Call(os.system, touch(canary)), buffer)
    else:
        torch.save({"place": Call(os.system, touch(canary))}, buffer, _use_new_zipfile_serialization=kind == "torch")
    record, content = begun(tmp_path / "a"), buffer.getvalue()
    (tmp_path / "a" / CHECKPOINT).write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
    with pytest.raises(RecordError, match=CHECKPOINT):
        record.load()
    assert not canary.exists()


@pytest.mark.parametrize("kept", [None, 0, 2])
def test_rows_after_the_checkpoint_are_dropped_on_resuming(tmp_path, kept):
    """Their epochs come again; the file may also end in the middle of a line, or hold what somebody wrote into it."""
    record = begun(tmp_path / "a")
    for epoch in (1, 2, 3):
        if epoch - 1 == kept:
            record.save({"stage": 0, "place": {"epoch": kept}})
        record.log_metrics(epoch=epoch, loss=float(epoch), asr=None)
    assert len((tmp_path / "a" / METRICS).read_text().splitlines()) == 3
    with (tmp_path / "a" / METRICS).open("a") as file:
        file.write('{"epoch": 4, "lo')
    again = begun(tmp_path / "a")
    again.load()
    again.log_metrics(epoch=(kept or 0) + 1, loss=9.0)
    rows = [json.loads(line) for line in (tmp_path / "a" / METRICS).read_text().splitlines()]
    assert rows == again.rows and [row["epoch"] for row in rows] == list(range(1, (kept or 0) + 2))


def test_the_seconds_of_an_interrupted_epoch_count(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    record = begun(tmp_path / "a")
    record.log_metrics(epoch=1, seconds=10.0)
    record.started = -20.0
    record.save(EPOCH_1)
    again = begun(tmp_path / "a")
    again.started = 0.0
    again.load()
    assert again.seconds == 30.0
    again.save(EPOCH_1)
    again.load()  # its own
    assert again.seconds == 30.0


@pytest.mark.parametrize("name", [LOG, METRICS])
def test_a_link_in_place_of_a_log_is_not_followed(tmp_path, name):
    record = begun(tmp_path / "a")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(RecordError, match=name):
        record.log("one") if name == LOG else record.log_metrics(epoch=1)
    assert (tmp_path / "precious").read_text() == "mine"


def test_weights_are_loaded_from_a_whole_folder(tmp_path):
    record, net = begun(tmp_path / "a"), nn.Linear(2, 3)
    record.save_tensors("model", nn.Linear(2, 3).state_dict())
    with pytest.raises(RecordError, match="unfinished"):
        load_weights(net, tmp_path / "a")
    record.finish({})
    load_weights(net, tmp_path / "a")
    assert torch.equal(net.weight, record.load_tensors("model")["weight"])
    with pytest.raises(RecordError, match="weight has"):
        load_weights(nn.Linear(2, 4), tmp_path / "a")
    record.save_tensors("model", nn.Linear(2, 3).state_dict())
    with pytest.raises(RecordError, match="damaged"):
        load_weights(net, tmp_path / "a")


NETWORK = {"name": "n", "classes": 10, "width": 64, "shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize("bad", [{"classes": 0}, {"classes": "10"}, {"width": -1}, {"shape": [3, 32]}, {"shape": None}])
def test_a_configuration_without_a_possible_network_is_refused(tmp_path, bad):
    record = begun(tmp_path / "a", run={"dataset_path": ".", "recipe": None}, data={"dataset": "digits"})
    record.update_config(model={**NETWORK, **bad})
    record.finish({})
    with pytest.raises(RecordError, match="make the folder again"):
        load(tmp_path / "a")


# The lock

HOLD = """
import sys, time
from pathlib import Path
from sau.files import acquire
acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    folder, env = tmp_path / "deep" / "x", environment(PYTHONPATH=str(REPOSITORY))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=env, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() and in_use(folder)
            with pytest.raises(LockedError) as caught:
                begun(folder)
            assert caught.value.status == 1 and not folder.exists()
        finally:
            process.kill()
    assert not in_use(folder)
    acquire(folder)
    assert in_use(folder)
    release(folder)
    assert not in_use(folder)


def test_a_folder_is_one_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sau.files._locks", {})
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    acquire(tmp_path / "disk" / "a")
    acquire(tmp_path / "link" / "a")
    release(tmp_path / "link" / "a")
    assert not in_use(tmp_path / "disk" / "a")


def test_links_in_place_of_a_lock_are_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.lock").symlink_to(tmp_path / "precious")
    for name, action in (("x", acquire), ("x", in_use), ("precious/x", acquire)):
        with pytest.raises(RecordError, match="lock"):
            action(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_running_defense_protects_its_attack(tmp_path):
    made(tmp_path / "a")
    acquire(tmp_path / "a" / "defense" / "sau")
    with pytest.raises(LockedError, match="sau is in use"):
        begun(tmp_path / "a", overwrite=True)
    release(tmp_path / "a" / "defense" / "sau")
    begun(tmp_path / "a", overwrite=True)
    assert in_use(tmp_path / "a")
