"""The result folder: everything or nothing is written, and what was written is checked before it is used."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import REPOSITORY, environment, toy_images

from sau.command.watch import Watch
from sau.compat.backdoorbench import RESULT
from sau.errors import Finished, LockedError, RecordError
from sau.files import checksum, read, safe_join, write
from sau.record import folder as module
from sau.record import schema
from sau.record.attack_result import load, load_weights
from sau.record.folder import CHECKPOINT, CONFIG, LOG, MANIFEST, METRICS, SUMMARY, Record
from sau.record.lock import acquire, in_use, release
from sau.settings.run import AttackRun

IDENTITY = {"lr": 0.1, "milestones": (60, 90), "path": None}


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


# Writing


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path):
    write(tmp_path / "a" / "b" / "file.bin", b"one")
    write(tmp_path / "a" / "b" / "file.bin", b"two")
    assert (tmp_path / "a" / "b" / "file.bin").read_bytes() == b"two"
    assert listing(tmp_path) == ["a", "a/b", "a/b/file.bin"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace

    def fsync(number: int) -> None:
        events.append(("fsync", os.fstat(number).st_size))
        sync(number)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write(tmp_path / "file", b"12345")
    assert events == [("fsync", 5), ("rename", "file")]


@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, one_line, when, number):
    write(tmp_path / "file", b"old")

    def full(*args) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "fsync", full) if when == "fsync" else (Path, "replace", full)))
    with pytest.raises(RecordError) as refusal:
        write(tmp_path / "file", b"new and longer")
    text = one_line(refusal.value)
    assert str(tmp_path / "file") in text and (("no room" in text and "14 bytes" in text) or number == errno.EIO)
    assert (tmp_path / "file").read_bytes() == b"old" and listing(tmp_path) == ["file"]


def test_an_interruption_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", b"new")
    assert listing(tmp_path) == []


def test_a_limit_on_file_sizes_is_said_in_one_line(tmp_path):
    """A real limit of the operating system, in a process of its own: 4,096 bytes a file."""
    code = """
import resource, sys
from pathlib import Path
from sau.errors import RecordError
from sau.files import write
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file = Path(sys.argv[1]) / "file"
write(file, b"small")
try:
    write(file, b"x" * 10_000)
except RecordError as error:
    print(error)
"""
    argv, env = [sys.executable, "-c", code, str(tmp_path)], environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no room" in done.stdout and "10,000 bytes" in done.stdout and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "file").read_bytes() == b"small" and listing(tmp_path) == ["file"]


@pytest.mark.parametrize("root", ["a file", "/proc/nowhere"])
def test_a_place_that_cannot_hold_files_is_said_in_one_line(tmp_path, monkeypatch, root, one_line):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("in the way")
    with pytest.raises(RecordError) as refusal:
        begun(safe_join(root, "name"))
    assert root in one_line(refusal.value)


# Names


@pytest.mark.parametrize("name", ["a", "A1", "badnet_0.1", "2024-01-01", "x" * 100, "0", "a..b"])
def test_names_that_are_allowed(tmp_path, name):
    assert safe_join(tmp_path, name) == tmp_path / name
    assert safe_join(str(tmp_path), name).name == name


ESCAPES = [
    "", ".", "..", "../x", "x/../../y", "/etc", "/", "a/b", "a\\b", "~", "~root", "$HOME", "a\0b", "a\nb", "a\n",
    " a", "a ", "-rf", ".hidden", "é", "а", "x" * 300, "x" * 101, "a.", "C:x", "a;b", "a*b", "\u202ea",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name)[:20])
def test_names_that_could_lead_elsewhere_are_refused(tmp_path, name, one_line):
    with pytest.raises(RecordError) as refusal:
        safe_join(tmp_path, name)
    assert len(one_line(refusal.value)) < 400 and listing(tmp_path) == []


def test_a_link_that_leads_elsewhere_is_refused(tmp_path, one_line):
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root" / "near").symlink_to(tmp_path / "root2")  # its name begins alike
    (tmp_path / "root" / "a").mkdir()
    (tmp_path / "root" / "a" / "inside").symlink_to(tmp_path / "root")
    for names in (("link",), ("near",), ("a", "inside", "x")):
        with pytest.raises(RecordError) as refusal:
            safe_join(tmp_path / "root", *names)
        assert "is a link that leads out" in one_line(refusal.value)


def test_the_root_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "record").symlink_to(tmp_path / "disk")
    assert safe_join(tmp_path / "record", "a") == tmp_path / "record" / "a"


def test_a_link_below_the_root_is_refused(tmp_path, one_line):
    """A downloaded record may have one where a defense or an audit would go."""
    (tmp_path / "record" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "record" / "a" / "defense").symlink_to(tmp_path / "outside")
    (tmp_path / "record" / "a" / "audit").symlink_to("audit")
    with pytest.raises(RecordError) as refusal:
        safe_join(tmp_path / "record" / "a", "defense", "sau")
    assert "link" in one_line(refusal.value)
    with pytest.raises(RecordError):
        write(safe_join(tmp_path / "record" / "a", "audit", "pieces") / "x", b"")  # a link to itself
    (tmp_path / "linked").symlink_to(tmp_path / "record")
    assert safe_join(tmp_path / "linked" / "a", "figures", "b").name == "b"


# Beginning


def test_facts_come_back(tmp_path):
    record = begun(tmp_path / "a", dataset="digits", values=(1, 2))
    record.update_config(amp=False, mean=(0.5, 0.5))
    assert record.config["values"] == [1, 2] and record.config["mean"] == [0.5, 0.5]
    again = begun(tmp_path / "a")  # the same run goes on
    assert again.config == record.config and again.config["amp"] is False
    assert not again.finished and listing(tmp_path / "a") == [CONFIG]


def test_the_identity_decides_not_the_rest(tmp_path):
    first = begun(tmp_path / "a", {"lr": 0.1, "milestones": [60, 90], "path": None}, command="one")
    assert begun(tmp_path / "a", command="another").config["digest"] == first.config["digest"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**IDENTITY, "lr": 0.2}, ["lr: 0.1 there, 0.2 here"]),
        ({**IDENTITY, "milestones": (60,)}, ["milestones: [60, 90] there, [60] here"]),
        ({**IDENTITY, "new": 1}, ["new: None there, 1 here"]),
        ({"lr": 0.3, "path": "x"}, ["lr", "milestones", "path: None there, 'x' here"]),
    ],
)
def test_an_unfinished_run_with_other_settings_is_refused_with_the_difference(tmp_path, other, words, one_line):
    record = begun(tmp_path / "a")
    record.log("kept")
    record.log_metrics(epoch=1, loss=0.5)
    before = listing(tmp_path)
    with pytest.raises(RecordError) as refusal:
        begun(tmp_path / "a", other)
    assert all(word in one_line(refusal.value) for word in [*words, "--overwrite"])
    assert listing(tmp_path) == before and (tmp_path / "a" / LOG).read_text() == "kept\n"


def test_a_finished_folder_is_refused_until_it_is_overwritten(tmp_path, one_line):
    made(tmp_path / "a")
    before = listing(tmp_path)
    for identity in (IDENTITY, {"lr": 3}):
        with pytest.raises(RecordError) as refusal:
            begun(tmp_path / "a", identity)
        assert "finished" in one_line(refusal.value) and "--overwrite" in str(refusal.value)
    assert listing(tmp_path) == before
    begun(tmp_path / "a", overwrite=True)
    assert listing(tmp_path / "a") == [CONFIG]


@pytest.mark.parametrize("early", [False, True])
def test_the_same_run_is_finished_and_a_run_that_was_asked_otherwise_is_refused(tmp_path, early):
    """Also where --max_minutes ended it, which stands in its identity."""
    asked, identity = {"run": {"max_minutes": 1.0, "overwrite": True}}, {"a": 1}
    record = Record(tmp_path / "a")
    record.begin(asked, identity, False)
    if early:
        record.update_config(
            identity={**identity, "ended_early": "epoch 2"},
            digest=schema.digest({**identity, "ended_early": "epoch 2"}),
        )
    record.finish({})
    with pytest.raises(Finished):
        Record(tmp_path / "a").begin({"run": {"max_minutes": 1.0, "overwrite": False}}, identity, False)
    for run, other in (({"max_minutes": 2.0}, identity), (asked["run"], {"a": 2})):
        with pytest.raises(RecordError) as refusal:
            Record(tmp_path / "a").begin({"run": run}, other, False)
        assert type(refusal.value) is RecordError and "--overwrite" in str(refusal.value)


def test_going_on_keeps_what_is_asked_now_and_both_commands(tmp_path):
    """The summary will be of these settings; what was chosen for the run, like its precision, stays."""
    asked = {"run": {"trigger_radius": 0.2}, "command": "first"}
    first = Record(tmp_path / "a")
    first.begin(asked, {"a": 1}, False)
    first.update_config(amp=True)
    first.save({"stage": 0, "place": {"epoch": 1}})
    for number in (2, 3):
        Record(tmp_path / "a").begin({"run": {"trigger_radius": 0.9}, "command": f"go on {number}"}, {"a": 1}, False)
    found = schema.configuration(tmp_path / "a" / CONFIG)
    assert found["run"] == {"trigger_radius": 0.9} and found["amp"] is True
    assert found["command"] == "go on 3" and found["earlier_commands"] == ["first", "go on 2"]


def test_a_run_that_was_killed_while_its_early_end_was_written_goes_on(tmp_path):
    identity = {"a": 1}
    early = {**identity, "ended_early": "epoch 2"}
    first = begun(tmp_path / "a", identity)
    first.save({"stage": 0, "place": {"epoch": 1}})
    first.update_config(identity=early, digest=schema.digest(early), notes=["ended early, epoch 2"])
    begun(tmp_path / "a", identity)
    found = schema.configuration(tmp_path / "a" / CONFIG)
    assert found["identity"] == identity and found["digest"] == schema.digest(identity)
    with pytest.raises(RecordError, match="unfinished run with other settings"):
        begun(tmp_path / "a", {"a": 2})


def test_the_seconds_of_an_interrupted_epoch_count(tmp_path, monkeypatch):
    """Those up to the last checkpoint: what came after it is made again."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    first = begun(tmp_path / "a")
    first.log_metrics(epoch=1, seconds=10.0)
    first.clock = lambda: 25.0
    first.save({"stage": 0, "place": {"epoch": 1}})
    second = begun(tmp_path / "a")
    watch = Watch(second, AttackRun(), 3, toy_images(4), lambda: None, 0.0, 0.0)
    second.load()
    assert watch.seconds == 30.0
    second.save({"stage": 0, "place": {"epoch": 1}})
    third = begun(tmp_path / "a")
    third.load()
    assert third.seconds == 30.0


@pytest.mark.parametrize("config", [None, "", "a: 1\n", "[1]\n", "a: [\n", "schema: 1\ndigest: x\n"])
def test_a_foreign_folder_is_refused_and_nothing_in_it_is_touched(tmp_path, config, one_line):
    """Also with --overwrite: what `sau` did not make it does not delete."""
    foreign = tmp_path / "photos"
    (foreign / "deep").mkdir(parents=True)
    (foreign / "deep" / "one.jpg").write_text("precious")
    if config is not None:
        (foreign / CONFIG).write_text(config)
    before = listing(foreign)
    for overwrite in (False, True):
        with pytest.raises(RecordError) as refusal:
            begun(foreign, overwrite=overwrite)
        assert str(foreign) in one_line(refusal.value) and listing(foreign) == before
    assert (foreign / "deep" / "one.jpg").read_text() == "precious"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    assert begun(tmp_path / "a").config["identity"]["lr"] == 0.1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, one_line):
    (tmp_path / "a").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RecordError) as refusal:
            begun(tmp_path / "a", overwrite=overwrite)
        assert str(tmp_path / "a") in one_line(refusal.value)
    assert (tmp_path / "a").read_text() == "precious"


BOMBS = {
    "many nodes": "x: [" + "1," * 400_000 + "1]\n",
    "a number of nothing": "x: !!int ''\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\n",
    "a cycle": "a: &a [*a]\n",
    "a merge": "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
    "a million levels": "a: " + "[" * 10**6 + "\n",
    "levels of blocks": "a:\n" + "- " * 60 + "1\n",
    "a date": "a: 2020-01-01\n",
    "a number for a key": "1: 2\n",
    "a number too long to print": "a: 0x" + "f" * 5000 + "\n",
    "an identity that is none": "identity: []\n",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_configuration_that_is_a_bomb_is_refused(tmp_path, what, one_line):
    begun(tmp_path / "a")
    file = tmp_path / "a" / CONFIG
    file.write_text(file.read_text() + BOMBS[what])
    with pytest.raises(RecordError) as refusal:
        Record(tmp_path / "a").check()
    assert "not a result folder" in one_line(refusal.value)


@pytest.mark.parametrize("name", [CONFIG, MANIFEST, SUMMARY])
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "too large", "too deep"])
def test_what_is_no_small_plain_file_is_refused_at_once(tmp_path, name, kind, one_line):
    """In place of one: a FIFO would be waited for, /dev/zero read until memory ends."""
    record = made(tmp_path / "a")
    file = tmp_path / "a" / name
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "too large":
        file.touch()
        os.truncate(file, 1 << 40)
    else:
        file.write_text("[" * 200_000)
    for look in (record.check, record.summary) if name == SUMMARY else (record.check,):
        with pytest.raises(RecordError) as refusal:
            look()
        one_line(refusal.value)


def test_a_record_that_is_reached_through_a_link_works(tmp_path):
    made(tmp_path / "disk" / "a")
    (tmp_path / "record").symlink_to("disk")
    (tmp_path / "b").symlink_to(tmp_path / "disk" / "a")
    for path in (tmp_path / "record" / "a", tmp_path / "b"):
        Record(path).check()
        assert Record(path).summary() == {"acc": 91.3}


# The manifest


def test_a_finished_folder_passes_its_check(tmp_path):
    record = made(tmp_path / "a")
    assert listing(tmp_path / "a") == sorted([CONFIG, LOG, MANIFEST, METRICS, SUMMARY, "model.safetensors"])
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    for name, seal in manifest["files"].items():
        content = (tmp_path / "a" / name).read_bytes()
        assert seal == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert set(manifest["files"]) == set(listing(tmp_path / "a")) - {MANIFEST}
    again = Record(tmp_path / "a")
    assert again.finished and again.check() == record.config == again.config
    assert json.loads((tmp_path / "a" / SUMMARY).read_text()) == {"acc": 91.3}


@pytest.mark.parametrize("name", [CONFIG, SUMMARY, METRICS, "model.safetensors", "poisoned.safetensors", "more.pt"])
def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path, name, one_line):
    """A file that a reader would take, but nobody vouches for."""
    made(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    content = json.loads(file.read_text())
    content["files"].pop(name, None)
    file.write_text(json.dumps(content))
    (tmp_path / "a" / name).touch()
    with pytest.raises(RecordError) as refusal:
        Record(tmp_path / "a").check()
    assert f"does not name {name}" in one_line(refusal.value)


def test_folders_inside_are_no_part_of_the_manifest(tmp_path):
    """A defense's folder lies in the attack's, and is made after it."""
    made(tmp_path / "a")
    made(tmp_path / "a" / "defense" / "sau")
    Record(tmp_path / "a").check()
    Record(tmp_path / "a" / "defense" / "sau").check()


FILES = [CONFIG, LOG, METRICS, SUMMARY, "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["first bit", "middle bit", "last bit", "truncated", "longer", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, damage, one_line):
    made(tmp_path / "a")
    file = tmp_path / "a" / name
    content = bytearray(file.read_bytes())
    if damage.endswith("bit"):
        content[{"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[damage.split()[0]]] ^= 1
    file.write_bytes({"truncated": content[:-1], "longer": content + b"\0", "empty": b""}.get(damage, bytes(content)))
    if damage == "missing":
        file.unlink()
    with pytest.raises(RecordError) as refusal:
        Record(tmp_path / "a").check()
    assert name in one_line(refusal.value) or (name == CONFIG and str(tmp_path / "a") in str(refusal.value))


def test_a_manifest_with_any_bit_flipped_is_refused(tmp_path, one_line):
    made(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                Record(tmp_path / "a").check()
            except RecordError as refusal:
                assert str(tmp_path / "a") in one_line(refusal)
            else:  # only white space may differ without a difference in meaning
                assert json.loads(damaged) == json.loads(content), (place, bit)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"schema": 1}', '{"schema": 1, "files": 3}', "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text, one_line):
    made(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(RecordError) as refusal:
        Record(tmp_path / "a").check()
    assert MANIFEST in one_line(refusal.value)


def test_a_manifest_of_another_version_is_refused(tmp_path, one_line):
    made(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    file.write_text(file.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(RecordError) as refusal:
        Record(tmp_path / "a").check()
    assert "schema 3" in one_line(refusal.value)


def test_a_manifest_reads_nothing_outside_its_folder(tmp_path):
    """A name with a path in it can neither be opened nor vouched for."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    made(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"]["../secret"] = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    file.write_text(json.dumps(manifest))
    with pytest.raises(RecordError):
        Record(tmp_path / "a").check()


def test_missing_unfinished_and_foreign_folders_are_refused(tmp_path, one_line):
    begun(tmp_path / "unfinished")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / MANIFEST).write_text("{}")
    (tmp_path / "file").write_text("")
    for name, word in (("missing", "no folder"), ("unfinished", "unfinished"), ("foreign", "not a result folder"),
                       ("file", "no folder")):  # fmt: skip
        with pytest.raises(RecordError) as refusal:
            Record(tmp_path / name).check()
        assert word in one_line(refusal.value) and str(tmp_path / name) in str(refusal.value)


def test_the_manifest_is_written_last_and_the_checkpoint_kept_until_then(tmp_path, monkeypatch):
    """A disk that is full at the very end costs nothing but the end: the run can go on from its checkpoint."""
    record = begun(tmp_path / "a")
    record.save({"stage": 0, "place": {"epoch": 1}})
    really = module.write

    def full_for_the_manifest(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise RecordError("no room")
        really(path, content)

    monkeypatch.setattr(module, "write", full_for_the_manifest)
    with pytest.raises(RecordError):
        record.finish({"acc": 1.0})
    assert not record.finished and begun(tmp_path / "a").load() == {"stage": 0, "place": {"epoch": 1}}
    monkeypatch.setattr(module, "write", really)
    record.finish({"acc": 1.0})
    assert record.finished and not (tmp_path / "a" / CHECKPOINT).exists()
    Record(tmp_path / "a").check()


# Tensors


def test_tensors_come_back(tmp_path):
    made(tmp_path / "a")
    tensors = Record(tmp_path / "a").load_tensors("model")
    assert torch.equal(tensors["weight"], torch.arange(6.0).view(2, 3)) and int(tensors["count"]) == 7


def test_what_a_killed_write_left_is_swept(tmp_path):
    """`kill -9` in the middle of a write leaves its temporary file; the resumed run takes it away."""
    begun(tmp_path / "a")
    (tmp_path / "a" / ".model.safetensors.x1y2z3_4").write_bytes(b"half a file")
    record = begun(tmp_path / "a")
    record.finish({"acc": 1.0})
    assert listing(tmp_path / "a") == sorted([CONFIG, MANIFEST, SUMMARY])
    assert set(json.loads((tmp_path / "a" / MANIFEST).read_text())["files"]) == {CONFIG, SUMMARY}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_first_write_left_when_it_was_killed_is_no_run(tmp_path, overwrite):
    for name in ("a", "a/defense/ft"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / f".{CONFIG}.abcdef_9").write_bytes(b"schema: ")
        begun(tmp_path / name, overwrite=overwrite)
        assert listing(tmp_path / name) == [CONFIG]


@pytest.mark.parametrize("number", range(8))
def test_overwriting_that_was_killed_goes_on(tmp_path, monkeypatch, number):
    """The configuration, by which a folder is known as ours, is the last thing to go."""
    made(tmp_path / "a")
    made(tmp_path / "a" / "defense" / "sau")
    gone, unlink, rmtree = [0], Path.unlink, shutil.rmtree

    def dying(really):
        def call(path: Path, **more: bool) -> None:
            gone[0] += 1
            if gone[0] > number:
                raise KeyboardInterrupt
            really(path, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying(unlink))
        patch.setattr(shutil, "rmtree", dying(rmtree))
        with pytest.raises(KeyboardInterrupt):
            begun(tmp_path / "a", overwrite=True)
    assert number == 0 or not Record(tmp_path / "a").finished
    again = begun(tmp_path / "a", overwrite=True)
    assert listing(tmp_path / "a") == [CONFIG] and again.load() is None


def test_hidden_files_of_the_users_are_left_alone(tmp_path):
    begun(tmp_path / "a")
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
    for name in (".notes", ".config.yaml.swp", ".x.json.backup-1"):
        (tmp_path / "a" / name).write_text("mine")
    before = listing(tmp_path / "a")
    begun(tmp_path / "a")
    assert listing(tmp_path / "a") == before


def test_tensors_in_another_memory_layout_come_back(tmp_path):
    record = begun(tmp_path / "a")
    weight = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    record.save_tensors("model", {"weight": weight, "view": weight[:, 1].requires_grad_(False)})
    again = record.load_tensors("model")
    assert torch.equal(again["weight"], weight) and torch.equal(again["view"], weight[:, 1])


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"not tensors", b"\xff" * 100])
def test_a_file_without_tensors_is_refused(tmp_path, content, one_line):
    (tmp_path / "model.safetensors").write_bytes(content)
    for name in ("model", "missing"):
        with pytest.raises(RecordError) as refusal:
            Record(tmp_path).load_tensors(name)
        assert f"{name}.safetensors" in one_line(refusal.value)


# Checkpoints


PLACE = {"stage": 0, "place": {"epoch": 2, "batch": 0}, "objects": {"model": {"weight": torch.ones(3)}}}


def test_a_checkpoint_comes_back(tmp_path):
    record = begun(tmp_path / "a")
    assert record.load() is None
    record.save({"stage": 0, "place": {"epoch": 1}})
    record.save(PLACE)
    place = Record(tmp_path / "a").load()
    assert place is not None and place["place"] == PLACE["place"]
    assert torch.equal(place["objects"]["model"]["weight"], torch.ones(3))
    assert listing(tmp_path / "a") == [CHECKPOINT, CONFIG]


@pytest.mark.parametrize("place", [0, 63, 64, 100, -1])
def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path, place, one_line):
    record = begun(tmp_path / "a")
    record.save(PLACE)
    file = tmp_path / "a" / CHECKPOINT
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError) as refusal:
        record.load()
    assert str(file) in one_line(refusal.value)


@pytest.mark.parametrize("length", [0, 10, 64, 200])
def test_a_truncated_checkpoint_is_refused(tmp_path, length, one_line):
    record = begun(tmp_path / "a")
    record.save(PLACE)
    file = tmp_path / "a" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(RecordError) as refusal:
        record.load()
    assert str(file) in one_line(refusal.value)


class Canary:
    """Unpickling it writes a file: what a malicious pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", ["torch", "pickle", "old torch", "nonsense"])
def test_a_malicious_checkpoint_with_a_right_sum_is_refused_and_not_executed(tmp_path, kind, one_line):
    canary, buffer = tmp_path / "canary", io.BytesIO()
    if kind == "nonsense":
        buffer.write(b"nonsense")
    elif kind == "pickle":
        pickle.dump(Canary(canary), buffer)
    else:
        torch.save({"place": Canary(canary)}, buffer, _use_new_zipfile_serialization=kind == "torch")
    record = begun(tmp_path / "a")
    content = buffer.getvalue()
    (tmp_path / "a" / CHECKPOINT).write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
    with pytest.raises(RecordError) as refusal:
        record.load()
    assert CHECKPOINT in one_line(refusal.value) and not canary.exists()


# Rows and the log


def test_rows_are_a_line_each(tmp_path):
    record = begun(tmp_path / "a")
    record.log_metrics(epoch=1, loss=0.5, asr=None)
    record.log_metrics(epoch=2, loss=0.25)
    lines = (tmp_path / "a" / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "loss": 0.5, "asr": None}, {"epoch": 2, "loss": 0.25}]


def test_a_plain_state_dict_is_written_for_those_who_want_one(tmp_path):
    record, tensors = begun(tmp_path / "a"), {"weight": torch.arange(6.0)}
    record.save_tensors("model", tensors, pickled=True)
    assert torch.equal(torch.load(record.path / "model.pt", weights_only=True)["weight"], tensors["weight"])
    assert not (record.path / "model.safetensors").exists()


def test_the_files_of_a_folder_have_the_names_that_others_rely_on():
    names = {CONFIG, METRICS, SUMMARY, MANIFEST, LOG}
    assert names == {"config.yaml", "metrics.jsonl", "summary.json", "manifest.json", "log.txt"}


def test_a_light_check_compares_the_sizes_of_weights_alone_and_spares_the_long_list(tmp_path):
    record = begun(tmp_path / "a")
    record.update_config(clean_index=[3, 1, 4], notes=["a note"])
    record.save_tensors("model", {"weight": torch.arange(6.0)})
    record.finish({"acc": 91.3})
    full, light = Record(record.path).check(), Record(record.path).check(light=True)
    assert full["clean_index"] == [3, 1, 4] and "clean_index" not in light and light["notes"] == ["a note"]
    weights = record.path / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert Record(record.path).check(light=True) == light
    with pytest.raises(RecordError, match=r"model\.safetensors"):
        Record(record.path).check()
    weights.write_bytes(raw[:-1])
    with pytest.raises(RecordError, match=r"model\.safetensors"):
        Record(record.path).check(light=True)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_rows_after_the_checkpoint_are_dropped_on_resuming(tmp_path, kept):
    """A cut between the row and the checkpoint of an epoch would otherwise leave the epoch twice."""
    first = begun(tmp_path / "a")
    for epoch in (1, 2, 3):
        first.log_metrics(epoch=epoch, loss=float(epoch))
    first.save({"stage": 0, "place": {"epoch": kept}})
    second = begun(tmp_path / "a")
    second.load()
    assert [row["epoch"] for row in second.rows] == list(range(1, kept + 1))
    second.log_metrics(epoch=kept + 1, loss=9.0)
    rows = [json.loads(line) for line in (tmp_path / "a" / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, kept + 2)) and rows[-1]["loss"] == 9.0


def test_rows_of_an_earlier_stage_stay_on_resuming(tmp_path):
    first = begun(tmp_path / "a")
    for row in ({"epoch": 1}, {"epoch": 2}, {"stage": 1.0, "epoch": 1}, {"stage": 1.0, "epoch": 2}):
        first.log_metrics(**row, loss=1.0)
    first.save({"stage": 1, "place": {"epoch": 1}})
    second = begun(tmp_path / "a")
    second.load()
    assert [(row.get("stage", 0), row["epoch"]) for row in second.rows] == [(0, 1), (0, 2), (1, 1)]


def test_a_checkpoint_without_its_rows_is_refused(tmp_path, one_line):
    record, content = begun(tmp_path / "a"), io.BytesIO()
    torch.save({"stage": 0, "place": {"epoch": 1}}, content)
    sealed = hashlib.sha256(content.getvalue()).hexdigest().encode() + content.getvalue()
    (record.path / CHECKPOINT).write_bytes(sealed)
    with pytest.raises(RecordError) as refusal:
        begun(tmp_path / "a").load()
    assert f"{CHECKPOINT} is damaged ('rows')" in one_line(refusal.value)


def test_what_is_said_is_printed_and_kept(tmp_path, capsys):
    record = begun(tmp_path / "a")
    record.log("one")
    record.log("two\nthree")
    assert capsys.readouterr().out == "one\ntwo\nthree\n" == (tmp_path / "a" / LOG).read_text()


def test_a_log_that_cannot_be_written_is_said_in_one_line(tmp_path, one_line):
    record = begun(tmp_path / "a")
    (tmp_path / "a" / LOG).mkdir()
    with pytest.raises(RecordError) as refusal:
        record.log("one")
    assert LOG in one_line(refusal.value)


def test_a_log_that_is_a_link_is_not_followed(tmp_path, one_line):
    """An unfinished folder that was downloaded may have a link to any file of the user in its place."""
    record = begun(tmp_path / "a")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a" / LOG).symlink_to(tmp_path / "precious")
    with pytest.raises(RecordError) as refusal:
        record.log("one")
    assert LOG in one_line(refusal.value) and (tmp_path / "precious").read_text() == "mine"


# What others do in the folder meanwhile


def test_what_an_editor_has_there_for_a_while_is_not_sealed(tmp_path):
    record = begun(tmp_path / "a")
    (tmp_path / "a" / ".log.txt.swp").write_text("half a line")
    record.finish({"acc": 1.0})
    (tmp_path / "a" / ".log.txt.swp").unlink()
    Record(tmp_path / "a").check()


def test_what_a_file_server_adds_to_a_finished_folder_is_left_alone(tmp_path):
    """macOS writes one beside every file on a disk that is not its own."""
    made(tmp_path / "a")
    (tmp_path / "a" / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    Record(tmp_path / "a").check()


def test_more_clean_pictures_than_a_reader_takes_are_refused(one_line, monkeypatch):
    monkeypatch.setattr(schema, "CLEAN", 3)
    schema.listable(3)
    with pytest.raises(RecordError) as refusal:
        schema.listable(4)
    assert "4 clean pictures, allowed in a record are 3; give a smaller --ratio" in one_line(refusal.value)
    monkeypatch.undo()
    assert schema._tree("clean_index:\n" + "- 7\n" * schema.CLEAN) == {"clean_index": [7] * schema.CLEAN}


def test_an_attack_is_not_made_again_while_a_defense_in_it_is_at_work(tmp_path, one_line):
    made(tmp_path / "a")
    acquire(tmp_path / "a" / "defense" / "sau")
    with pytest.raises(LockedError) as refusal:
        begun(tmp_path / "a", overwrite=True)
    assert f"{Path('a', 'defense', 'sau')} is in use" in one_line(refusal.value)
    assert (tmp_path / "a" / MANIFEST).is_file()
    release(tmp_path / "a" / "defense" / "sau")
    begun(tmp_path / "a", overwrite=True)


def test_bytes_of_a_path_that_are_no_text_do_not_spoil_the_folder(tmp_path):
    """`$'caf\\xe9'` on a command line becomes a surrogate, which YAML can write and not read."""
    record = begun(tmp_path / "a", {"patch": "caf\udce9"}, command="attack.py --dataset_path caf\udce9")
    record.log("from caf\udce9")
    record.finish({"acc": 1.0})
    config = Record(tmp_path / "a").check()
    assert config["command"] == "attack.py --dataset_path caf?"
    assert schema.digest(config["identity"]) == config["digest"]
    assert (tmp_path / "a" / LOG).read_text() == "from caf\\udce9\n"


def test_a_manifest_that_names_one_file_many_times_is_refused(tmp_path):
    record = made(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    manifest["files"] |= {f"{n}/{CONFIG}": manifest["files"][CONFIG] for n in range(3)}
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match="missing or damaged"):
        record.check()


def test_a_full_disk_is_one_line_where_not_even_a_folder_can_be_made(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RecordError, match="no room for"):
        write(tmp_path / "new" / "deep" / "x", b"content")


def test_a_run_that_was_refused_at_once_does_not_stand_in_the_way(tmp_path):
    """Its folder has nothing but settings and a log; one with a row or a checkpoint is kept from other settings."""
    refused = begun(tmp_path / "a", {"layers": "wrong"})
    refused.log("error")
    release(tmp_path / "a")
    mended = begun(tmp_path / "a", {"layers": "right"})
    assert mended.config["identity"] == {"layers": "right"} and not (tmp_path / "a" / LOG).exists()
    mended.log_metrics(epoch=1, loss=0.5)
    with pytest.raises(RecordError, match="unfinished run with other settings"):
        begun(tmp_path / "a", {"layers": "others"})


# What is read


def test_a_file_of_just_so_many_bytes_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, allowed are 4"):
        read(tmp_path / "x", 4)


def test_a_sum_is_of_the_whole_file(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "x").write_bytes(content)
    assert checksum(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_what_was_compared_is_what_counts(tmp_path, monkeypatch):
    """Also where somebody writes the configuration anew, with its sums, while the folder is looked at."""
    record, really = made(tmp_path / "a"), schema.unbroken

    def changed(place: Path, *more: object) -> list[str]:
        config = schema.configuration(tmp_path / "a" / CONFIG)
        (tmp_path / "a" / CONFIG).write_bytes(schema.written({**config, "amp": True}))
        others = [file for file in (tmp_path / "a").iterdir() if file.name != MANIFEST]
        place.write_bytes(schema.manifest(others))
        return really(place, *more)

    monkeypatch.setattr(schema, "unbroken", changed)
    assert record.check()["amp"] is True and record.config["amp"] is True


def test_an_unfinished_folder_whose_configuration_was_changed_does_not_go_on(tmp_path, one_line):
    """No manifest vouches for it yet."""
    begun(tmp_path / "a")
    file = tmp_path / "a" / CONFIG
    file.write_text(file.read_text().replace("threads: 1", "threads: 2"))
    with pytest.raises(RecordError) as refusal:
        begun(tmp_path / "a")
    assert f"{file} is damaged (its seal differs)" in one_line(refusal.value)


def test_a_finished_run_that_is_damaged_is_not_called_done(tmp_path):
    made(tmp_path / "a")
    with pytest.raises(Finished):
        begun(tmp_path / "a")
    (tmp_path / "a" / METRICS).write_text("{}")
    with pytest.raises(RecordError) as refusal:
        begun(tmp_path / "a")
    assert type(refusal.value) is RecordError and METRICS in str(refusal.value)


def test_a_digest_does_not_depend_on_the_order_of_what_it_is_of():
    assert schema.digest({"a": 1, "b": (2,)}) == schema.digest({"b": [2], "a": 1}) != schema.digest({"a": 1, "b": [3]})


def test_a_defense_is_of_another_attack_where_both_are_known():
    there = {"attacked": "x"}
    assert schema.belongs_to_other_attack(there, "y") and schema.of_another({"a": 1}, "x")
    assert not any(schema.belongs_to_other_attack(*known) for known in ((there, "x"), (there, None), ({}, "x")))


ATTACKED = {
    "model": {"name": "n", "classes": 10, "width": 64, "shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3},
    "data": {"dataset": "digits", "train": "", "test": ""},
    "run": {"dataset_path": ".", "recipe": None},
    "method": {"pratio": 0.1},
}


@pytest.mark.parametrize(
    ("part", "name", "wrong"),
    [
        ("model", "classes", (0, 100_001, 10.0, True, "10")),
        ("model", "width", (0, 1025, 64.0)),
        ("model", "shape", ([3, 0, 32], [3, 32, 1025], [3, 32], [3, 32, 32, 1], [3.0, 32, 32], None)),
        ("model", "mean", ([0.5] * 2, [0.5, 0.5, float("nan")], [1e7] * 3, "0.5", 0.5)),
        ("model", "std", ([0.2] * 2, [0.2, 0.2, 0], [0.2, 0.2, -0.2], [float("inf")] * 3)),
        ("data", "train", (None, 1)),
        ("run", "recipe", (1, [])),
        ("method", "pratio", (-0.1, 1.1, "0.1", float("nan"))),
    ],
)
def test_what_is_read_of_an_attack_has_bounds(part, name, wrong, one_line):
    schema.typed(ATTACKED, Path("a"))
    for value in wrong:
        with pytest.raises(RecordError) as refusal:
            schema.typed({**ATTACKED, part: {**ATTACKED[part], name: value}}, Path("a"))
        assert name in one_line(refusal.value)


def test_a_foreign_file_in_a_folder_of_ours_is_not_taken_for_it(tmp_path, one_line):
    made(tmp_path / "a")
    (tmp_path / "a" / RESULT).write_bytes(b"x")
    with pytest.raises(RecordError) as refusal:
        load(tmp_path / "a")
    assert f"does not name {RESULT}; take that file away" in one_line(refusal.value)


def test_weights_are_loaded_from_a_folder_that_is_whole(tmp_path, one_line):
    record, net = begun(tmp_path / "a"), torch.nn.Linear(2, 3)
    record.save_tensors("model", torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(RecordError) as refusal:
        load_weights(net, tmp_path / "a")
    assert "unfinished" in one_line(refusal.value)
    record.finish({})
    load_weights(net, tmp_path / "a")
    assert torch.equal(net.weight, record.load_tensors("model")["weight"])
    record.save_tensors("model", torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(RecordError) as refusal:
        load_weights(net, tmp_path / "a")
    assert "damaged" in one_line(refusal.value)


# Who has a folder


def test_a_folder_that_was_refused_is_free_for_others_and_one_that_is_had_stays(tmp_path):
    made(tmp_path / "a")
    with pytest.raises(RecordError):
        begun(tmp_path / "a", {"lr": 3})
    assert not in_use(tmp_path / "a")
    begun(tmp_path / "b").log_metrics(epoch=1, loss=0.5)
    with pytest.raises(RecordError):
        begun(tmp_path / "b", {"lr": 3})
    assert in_use(tmp_path / "b")
    release(tmp_path / "b")


def test_what_links_lead_to_outlives_overwriting(tmp_path):
    made(tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_text("precious")
    for name in ("mine", "mine/photo"):
        (tmp_path / "a" / name.replace("/", "_")).symlink_to(tmp_path / name)
    begun(tmp_path / "a", overwrite=True)
    assert listing(tmp_path / "a") == [CONFIG] and (tmp_path / "mine" / "photo").read_text() == "precious"


def test_a_folder_with_the_name_of_half_a_file_is_left_alone(tmp_path):
    begun(tmp_path / "a")
    (tmp_path / "a" / ".x.json.abcdefgh").mkdir()
    begun(tmp_path / "a")
    assert listing(tmp_path / "a") == [".x.json.abcdefgh", CONFIG]
