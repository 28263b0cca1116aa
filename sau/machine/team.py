"""The processes of one run, each with a device: how they share a batch and stay the same.

All of them walk through the same batches, each takes its part of every one, and gradients and figures are added up,
weighted by how many pictures they come from, so that all hold the same weights after every step. One of them, the
command, evaluates, prints and writes; the others wait meanwhile. The group of processes is Lightning Fabric's.
"""

import importlib
import logging
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau.data.augment import sent
from sau.errors import ConfigError
from sau.optim.descent import Descent
from sau.seeds import seeded
from sau.session import Checkpoint, Session, Step

PATIENCE = timedelta(days=1)  # for the others while the command evaluates
_NAMES = ("lightning.fabric", "lightning_fabric")  # the same under two names, by what was installed


def fabric() -> Any:
    """The module Lightning Fabric; ConfigError if it is not installed."""
    for name in _NAMES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigError("several devices need Lightning Fabric, which is not installed; pip install -e '.[multigpu]'")


def leave() -> None:
    """Belong to no team any more; what it still waits for is given up."""
    group = torch.distributed.group.WORLD
    if group is not None:
        group.abort()  # without it, cards would wait here for those of a lost process
        torch.distributed.destroy_process_group()


class Team:
    """The processes of a run as one of them sees them, which finds its place among them in the environment.

    Args:
        kind: of the devices, cpu or cuda.
        devices: how many there are.
    """

    def __init__(self, kind: str, devices: int) -> None:
        module = fabric()
        logging.getLogger(module.__name__).setLevel(logging.WARNING)
        strategies = importlib.import_module(f"{module.__name__}.strategies")
        environments = importlib.import_module(f"{module.__name__}.plugins.environments")
        self.fabric = module.Fabric(
            accelerator=kind,
            devices=devices,
            strategy=strategies.DDPStrategy(timeout=PATIENCE),
            plugins=[environments.LightningEnvironment()],  # not what a cluster has set for its own jobs
        )
        self.fabric.launch()
        self.rank, self.devices = self.fabric.global_rank, devices
        self.share = 0.0  # of the pictures of a batch that are this process's
        self.hooks: list[Any] = []
        self.messages = 0  # sums that this process has taken part in

    def session(self, session: Session) -> Session:
        """The session of a run that the team shares: all go on from the checkpoint of the command."""
        return replace(session, checkpoint=_Shared(self.fabric, session.checkpoint), team=self)

    def close(self) -> None:
        """Leave together."""
        for hook in self.hooks:
            hook.remove()
        self.fabric.barrier()
        leave()

    def split(self, step: Step, state: dict[str, Any]) -> Step:
        """`step` on this process's part of a batch, reporting of all parts; the weights move by all gradients.

        What is drawn inside differs between the processes; outside, their generators stay the same.
        """
        if self.fabric.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(state["model"])
        else:
            norms = [module for module in state["model"].modules() if isinstance(module, _BatchNorm)]
            self.hooks += [norm.register_forward_pre_hook(_frozen) for norm in norms]
        descents = [thing for thing in state.values() if isinstance(thing, Descent)]
        self.hooks += [descent.optimizer.register_step_pre_hook(self._add_up) for descent in descents]

        def part(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            if len(y) < self.devices:
                raise ConfigError(
                    f"a batch has {len(y)} pictures for {self.devices} devices; change batch_size or devices"
                )
            first, end = (len(y) * rank // self.devices for rank in (self.rank, self.rank + 1))
            self.share = (end - first) / len(y)
            with seeded(int(torch.randint(2**62, ())) + self.rank):
                report = step(x[first:end], y[first:end])
            return self._joined(report)

        return part

    def _add_up(self, optimizer: torch.optim.Optimizer, *ignored: Any) -> None:
        """Put the gradient of the whole batch in the place of that of this part, in one message."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.share * torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._sum(flat)
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view(gradient.shape))

    def _joined(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the parts report as the whole batch would: means of floats, sums of counts."""
        weights = [self.share if value.is_floating_point() else 1.0 for value in report.values()]
        figures = torch.stack([value.detach().double() for value in report.values()])
        figures *= sent(torch.tensor(weights, dtype=torch.float64), figures.device)
        self._sum(figures)
        return {name: whole.to(value.dtype) for (name, value), whole in zip(report.items(), figures, strict=True)}

    def _sum(self, tensor: Tensor) -> None:
        self.messages += 1
        _sum(tensor)


def _sum(tensor: Tensor) -> None:
    """The sum over the team in the place of each one's tensor; Fabric's own would also stop the devices before it."""
    message = torch.distributed.all_reduce(tensor, async_op=True)
    while tensor.device.type == "cpu" and not message.is_completed():
        time.sleep(0.001)  # while it waits elsewhere, Python does not hear Ctrl-C
    message.wait()


class _Shared:
    """The checkpoint of the command as all see it; the others have none, and what they would save is the same."""

    def __init__(self, fabric: Any, own: Checkpoint | None) -> None:
        self.fabric, self.own = fabric, own

    def load(self) -> dict[str, Any] | None:
        place: dict[str, Any] | None = self.fabric.broadcast(self.own.load() if self.own is not None else None)
        return place

    def save(self, place: dict[str, Any]) -> None:
        if self.own is not None:
            self.own.save(place)


def _frozen(norm: nn.Module, inputs: Any) -> None:
    if norm.training:
        raise ConfigError(
            "devices: batch norm in train mode needs the statistics of the whole batch, which torch shares on cuda only"
        )
