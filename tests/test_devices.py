"""Several devices for one run: refused where it cannot be, else the same run as on one, cut up and put together."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from toys import QUICK, REPOSITORY, TinyNet, command, environment, quiet, stop_after, tiny_net, toy_images

from sau.attack import ATTACKS, BadNet
from sau.data.augment import Augment
from sau.defense import AT, DEFENSES, FT, SAU
from sau.errors import ConfigError
from sau.machine.devices import place, spread
from sau.machine.team import Team, fabric
from sau.optim import Training
from sau.settings.run import Run

TWO = ("--devices", "2")


@pytest.fixture(autouse=True)
def for_helpers(monkeypatch):
    """The networks of the tests are those of their processes, too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


class Settled(TinyNet):
    """Batch norm keeps its statistics while the rest trains: it is shared among devices on CUDA only."""

    def train(self, mode: bool = True) -> "Settled":
        super().train(mode)
        self.features[1].eval()
        return self


def settled() -> Settled:
    net = Settled().eval()
    net.load_state_dict(tiny_net().state_dict())
    return net


def furthest(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def purified(devices: int, method: SAU | AT, seen: list[dict[str, float]]) -> torch.nn.Module:
    session = quiet()
    session.on_epoch = lambda epoch, losses, state: seen.append(losses) or {}
    return spread(devices, method.purify, settled(), toy_images(149), seed=3, session=session)


def test_sau_on_two_devices_takes_the_steps_of_one():
    """20 steps, the last of each round on the 35 pictures that are left: parts of 17 and 18, each with its weight."""
    method, one, two = SAU(epochs=5, batch_size=38, lr=1e-3, augment=True), list[dict[str, float]](), []
    alone, shared = purified(1, method, one), purified(2, method, two)
    assert furthest(alone, settled()) > 1e-3 and furthest(alone, shared) < 1e-5
    assert len(two) == 5 and not torch.distributed.is_initialized() and "MASTER_PORT" not in os.environ
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5) and mine["train_type1"] == theirs["train_type1"]


class Tight(Settled):
    """The second device has no memory for the gradients of more than ten pictures."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ.get("LOCAL_RANK") == "1" and torch.is_grad_enabled() and len(x) > 10:
            raise torch.OutOfMemoryError("injected")
        return super().forward(x)


def test_memory_that_runs_out_on_one_of_two_devices_leaves_both_in_step():
    """Its parts of 17 to 19 pictures go through in two; the other one's whole, and gradients meet once a batch."""
    found = []
    for devices in (1, 2):
        net = Tight().eval()
        net.load_state_dict(tiny_net().state_dict())
        method = SAU(epochs=2, batch_size=38, lr=1e-3)
        found.append(spread(devices, method.purify, net, toy_images(149), seed=3, session=quiet()))
    assert furthest(found[0], settled()) > 1e-4 and furthest(*found) < 1e-5


@pytest.mark.slow
def test_at_on_two_devices_takes_the_steps_of_one():
    """The last batch has 5 pictures."""
    method, images = AT(epochs=3, batch_size=58, client_optimizer="sgd", lr=0.05), toy_images(121)
    alone, shared = (spread(n, method.purify, settled(), images, seed=3, session=quiet()) for n in (1, 2))
    assert furthest(alone, settled()) > 1e-3 and furthest(alone, shared) < 1e-5


@pytest.mark.slow
def test_an_attack_trains_as_on_one_device():
    """Augmentation, momentum and a schedule that looks at the mean loss of all parts."""
    attack, images = BadNet(pratio=0.2), toy_images(130)
    recipe = Training(epochs=6, batch_size=32, lr=0.05, lr_scheduler="ReduceLROnPlateau")
    more = {"recipe": recipe, "augment": Augment(2, flip=True), "seed": 5}
    poisoned, nets = attack.poison_train(images, 0), (settled(), settled())
    alone, shared = (
        spread(n, attack.fit, net, poisoned, session=quiet(), **more) for n, net in zip((1, 2), nets, strict=True)
    )
    assert shared is nets[1] and not shared.training
    assert furthest(alone, settled()) > 1e-2 and furthest(alone, shared) < 1e-5
    assert not any(module._forward_pre_hooks for module in shared.modules())


def member(rank: int, devices: int, monkeypatch: pytest.MonkeyPatch) -> Team:
    """A member of a team whose others are left out: sums are its own part."""
    monkeypatch.setattr("sau.machine.team._sum", lambda tensor: None)
    team = object.__new__(Team)
    team.rank, team.devices, team.share, team.hooks, team.messages = rank, devices, 0.0, [], 0
    team.fabric = type("Fabric", (), {"device": torch.device("cpu")})()
    return team


@pytest.mark.parametrize("size", [3, 7, 12])
def test_the_parts_of_a_batch_are_the_batch_and_draw_for_themselves(size, monkeypatch):
    seen, draws, after, shares = [], [], [], []

    def step(x, y):
        seen.append(y)
        draws.append(float(torch.rand(())))
        return {"loss": torch.ones(()), "count": torch.tensor(len(y))}

    for rank in range(3):
        torch.manual_seed(7)
        report = member(rank, 3, monkeypatch).split(step, {"model": tiny_net()})(
            torch.rand(size, 1), torch.arange(size)
        )
        shares.append(float(report["loss"]))
        assert int(report["count"]) == len(seen[-1]) and report["count"].dtype == torch.int64
        after.append(torch.get_rng_state())
    assert torch.equal(torch.cat(seen), torch.arange(size)) and sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([len(part) / size for part in seen])
    assert len(set(draws)) == 3 and all(torch.equal(state, after[0]) for state in after)


def test_a_batch_with_fewer_pictures_than_devices(monkeypatch, one_line):
    step = member(0, 3, monkeypatch).split(lambda x, y: {}, {"model": tiny_net()})
    with pytest.raises(ConfigError) as refusal:
        step(torch.rand(2, 1), torch.arange(2))
    assert "2 pictures for 3 devices" in one_line(refusal.value)


def test_batch_norm_in_train_mode_needs_cuda(monkeypatch, one_line):
    net = tiny_net()
    step = member(0, 2, monkeypatch).split(lambda x, y: {"loss": net(x).sum()}, {"model": net})
    step(*toy_images(4).pixels.float().split(4), torch.arange(4))
    net.train()
    with pytest.raises(ConfigError) as refusal:
        step(*toy_images(4).pixels.float().split(4), torch.arange(4))
    assert "batch norm" in one_line(refusal.value)


def test_what_may_not_be_split_is_refused(one_line):
    splits = {"attack": {"prototype", "badnet", "blended", "sig", "lf", "ssba"}, "defense": {"sau", "at"}}
    for kind, methods in (("attack", ATTACKS), ("defense", DEFENSES)):
        assert {name for name, method in methods.items() if method.teamwork} == splits[kind]
        for name in methods.keys() - splits[kind]:
            with pytest.raises(ConfigError) as refusal:
                place(Run(devices=2, device="cpu"), methods[name](), 128)
            assert f"{name} works on one" in one_line(refusal.value)
    assert place(Run(device="cpu"), FT(), 127) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (("auto", 3, 128), "128; allowed is a multiple of 3"),
        (("cuda", 4, 128), "this machine has 3 cuda devices"),
        (("cuda:1", 2, 128), "cuda:1"),
    ],
)
def test_devices_that_cannot_work_together(wish, words, monkeypatch, one_line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device, devices, batch_size = wish
    with pytest.raises(ConfigError) as refusal:
        place(Run(device=device, devices=devices), SAU(), batch_size)
    assert words in one_line(refusal.value)
    assert place(Run(device="auto", devices=2), SAU(), 128) == torch.device("cuda", 0)


def test_without_fabric_one_device_works_and_two_say_what_is_missing(monkeypatch, refused):
    for name in ("lightning", "lightning.fabric", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    images = toy_images(40)
    spread(1, SAU(epochs=1).purify, tiny_net(), images, session=quiet())
    assert "pip install -e '.[multigpu]'" in refused("attack", "badnet", "--dataset", "digits", *TWO, "--device", "cpu")
    assert "devices is 0" in refused("attack", "badnet", "--devices", "0")


@pytest.mark.parametrize("name", ["lightning.fabric", "lightning_fabric"])
def test_fabric_has_two_names(name, monkeypatch):
    for other in ("lightning", "lightning.fabric", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, other, ModuleType(other) if name.startswith(other) else None)
    assert fabric() is sys.modules[name]


def helpers(folder: Path) -> list[int]:
    """The helper processes of commands that were started in a folder, also of those that are gone."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is somebody else's
            is_one = b"import assist; assist(" in (process / "cmdline").read_bytes()
            if is_one and (process / "cwd").readlink() == folder.resolve():
                found.append(int(process.name))
    return found


def gone(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


FEW = ("--ratio", "0.04", "--batch_size", "20", "--adv_steps", "1", "--epochs", "6")  # 57 pictures
SHARED = ("--result_file", "victim", *FEW, *QUICK, *TWO)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_lost_process_ends_the_run_and_the_next_one_resumes(victim, cli, tmp_path):
    straight = cli("defense", "sau", *SHARED, "--save_folder_name", "straight", cwd=tmp_path)
    assert straight.returncode == 0 and straight.stderr == "", straight.stderr
    argv = command("defense", "sau", *SHARED)
    for cut in ("helper", "command"):
        with subprocess.Popen(
            argv, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            rounds = (line for line in process.stdout if line.startswith("round"))
            next(rounds)
            others = helpers(tmp_path)
            assert len(others) == 1
            os.kill(others[0] if cut == "helper" else process.pid, signal.SIGKILL)
            _, err = process.communicate(timeout=240)
        assert gone(others, 30)
        if cut == "helper":
            assert process.returncode == 2 and len(err.splitlines()) == 1
            assert "device 1 was lost" in err and "resume" in err
    done = cli("defense", "sau", *SHARED, cwd=tmp_path)
    assert done.returncode == 0 and "resuming after round" in done.stdout, done.stderr
    folders = [victim / "defense" / name for name in ("straight", "sau")]
    kept = [{file.name for file in folder.iterdir()} for folder in folders]
    assert kept[0] == kept[1]
    one, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == other


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_helper(victim, tmp_path):
    status, err = stop_after("round 1", signal.SIGINT, command("defense", "sau", *SHARED), tmp_path)
    assert status == 130 and "repeat the command" in err
    assert gone(helpers(tmp_path), 30)


@pytest.mark.slow
def test_an_attack_on_cpus_is_refused_for_its_batch_norm(refused):
    flags = ("--dataset", "digits", "--width", "4", *QUICK, *TWO)
    assert "batch norm in train mode" in refused("attack", "badnet", *flags)
    assert not torch.distributed.is_initialized()


def test_two_devices_are_another_cell_and_one_is_the_same_as_ever():
    from sau.grid.plan import cells
    from sau.grid.spec import Block

    def digests(overrides):
        block = Block(dataset="digits", threads=2, attacks=("badnet",), overrides=overrides)
        return [cell.digest for cell in cells([block])]

    assert digests({}) == digests({"attack": {"devices": 1}}) != digests({"attack": {"devices": 2}})


def test_what_a_helper_prints_fills_no_pipe():
    """Nobody reads on after its first line, and NCCL_DEBUG=INFO makes it print."""
    code = """
import os
from sau.machine import devices
def team(*words):
    os.write(1, b"x" * 1_000_000)
    raise SystemExit(7)
devices.Team, devices.fabric = team, lambda: None
devices.assist(os.getppid(), "cpu", 2, 1)
"""
    env = environment(PYTHONPATH=str(REPOSITORY))
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            assert process.wait(60) == 7
        finally:
            process.kill()
