"""How a run uses its machine: precision and torch.compile, chosen once, printed and recorded."""

import torch

from sau.config import Method
from sau.errors import ConfigError
from sau.machine import cores
from sau.machine import device as machine
from sau.models import Normalized
from sau.record.folder import Record
from sau.settings.run import Run


def tune(record: Record, run: Run, model: Normalized, method: Method, where: torch.device) -> None:
    """Set the precision of `model` and whether it is compiled: as asked, or as an interrupted run began.

    Args:
        record: of the run; keeps both choices.
        run: what was asked. Without `amp` the precision is bf16 where the device has bf16 arithmetic, else fp32.
        model: the network.
        method: whether its networks may be compiled.
        where: the device.

    Raises ConfigError if the run began in another precision than is asked now.
    """
    before: bool | None = record.config.get("amp")
    if before is not None and run.amp not in (None, before):
        raise ConfigError(f"amp is {run.amp}, but this run began with {before}; leave it out, or say --overwrite true")
    chosen = machine.has_bf16(where) if run.amp is None else run.amp
    model.amp = chosen if before is None else before
    record.update_config(amp=model.amp, device=where.type)
    threads = torch.get_num_threads()
    record.log(f"precision {'bf16' if model.amp else 'fp32'} on {where}, {threads} threads")
    busy = cores.crowded(threads) if where.type == "cpu" else None
    if busy:
        record.log(f"warning: {busy}")
    model.compiled = _compiled(record, run, method)


def _compiled(record: Record, run: Run, method: Method) -> bool:
    if run.compile and not method.compiles:
        record.log(f"note: the networks of {method.name} cannot be compiled, so --compile has no effect")
    chosen = run.compile and method.compiles
    compiled = bool(record.config.get("compile", chosen))
    if compiled != chosen:
        record.log(f"note: this run goes on as it began, {'' if compiled else 'not '}compiled; --compile has no effect")
    if compiled:
        record.log("compiling the network (torch.compile), which takes up to a minute")
    record.update_config(compile=compiled)
    return compiled
