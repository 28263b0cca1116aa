"""How a run uses its machine: precision, torch.compile, CUDA graphs and threads, each chosen once and said."""

from collections.abc import Callable, Sequence

import torch

from sau.errors import ConfigError, first_line
from sau.machine import captured, cores
from sau.machine import device as machine
from sau.method import Method
from sau.models import Normalized
from sau.record.folder import Record
from sau.settings.run import Run
from sau.wording import duration

# What torch.compile is assumed to save on CUDA: of the card's own time, and of that of updates which Python launches,
# where the compiler's CUDA graphs spare it more; and the seconds until everything is compiled. An H200 needs 16 to 18
# for the first update of docs/performance.md and saves 11 % of a captured training step, 27 % of one of SAU.
SAVED, SAVED_LAUNCHED = 0.15, 0.4
COSTS = 25.0

GAIN = 0.1  # of the time that bf16 has to save, or the noise of the clock would choose between two that are as fast


def tune(
    record: Record, run: Run, model: Normalized, method: Method, shape: Sequence[int], batch_size: int,
    pictures: int, where: torch.device,
) -> None:  # fmt: skip
    """Set the precision of `model` and whether it is compiled: as asked, or as before an interruption, or what suits.

    Args:
        record: of the run; keeps the choices.
        run: what was asked.
        model: the network, which goes on as it is otherwise.
        method: whose updates they are.
        shape: of a picture, [C, H, W].
        batch_size: of an update.
        pictures: that all updates see together, in whole ones.
        where: the device.
    """
    before: bool | None = record.config.get("amp")
    if before is not None and run.amp not in (None, before):
        raise ConfigError(f"amp is {run.amp}, but this run began with {before}; leave it out, or say --overwrite true")
    amp, seconds, said = run.amp if before is None else before, dict[bool, float](), ""
    whole = _whole(run, method, where)
    model.captured = run.compile != "off"
    if amp is None:
        seconds = machine.step_seconds(model, shape, batch_size, where, captured=whole)
        amp = seconds[True] < (1 - GAIN) * seconds[False]
        fp32, bf16 = 1000 * seconds[False], 1000 * seconds[True]
        record.note(step_ms={"fp32": fp32, "bf16": bf16})
        said = f"; a training step takes {fp32:.3g} ms a picture in fp32, {bf16:.3g} in bf16"
    model.amp = bool(amp)
    record.note(amp=amp, device=where.type)
    threads = torch.get_num_threads()
    record.say(f"precision {'bf16' if amp else 'fp32'} on {where}, {threads} threads{said}")
    busy = cores.crowded(threads) if where.type == "cpu" else None
    if busy:
        record.say(f"warning: {busy}")

    def pays() -> bool:
        if run.devices > 1:  # statistics that devices exchange break a graph into parts
            return False
        if where.type == "cpu":  # convolutions take most of a step
            return False
        found = seconds or machine.step_seconds(model, shape, batch_size, where, [model.amp], captured=whole)
        return _pays(method, pictures, found[model.amp], whole)

    model.compiled = _compiled(record, run, method, where, whole, pays)


def _whole(run: Run, method: Method, where: torch.device) -> bool:
    """Whether CUDA is to repeat captured updates."""
    return captured.capable(where) and run.compile != "off" and run.devices == 1 and method.repeats()


def _compiled(
    record: Record, run: Run, method: Method, where: torch.device, whole: bool, pays: Callable[[], bool]
) -> str | None:
    if run.compile == "graphs" and not whole:
        record.say(f"note: the updates of {method.name} are not captured here, so --compile graphs has no effect")
    if not method.passes():
        if run.compile == "on":
            record.say(f"note: {method.name} runs its networks as they stand, so --compile on has no effect")
        return None
    # Where whole updates are not captured, the compiler's own graphs spare Python the launches of each pass.
    graphed = captured.capable(where) and not whole and run.devices == 1
    modes = {"on": "reduce-overhead" if graphed else "default", "graphs": None, "off": None}
    if "compile" in record.config:
        before: str | None = record.config["compile"]
        if modes.get(run.compile, before) != before:
            record.say(f"note: this run goes on as it began, {before or 'not compiled'}; --compile has no effect")
        return before
    chosen = run.compile
    if chosen == "auto":
        chosen = "on" if pays() else "off"
    mode = modes[chosen]
    absent = no_compiler(where) if mode else None
    if absent:
        record.say(f"note: no compiler works here, so the network runs as it stands: {absent}")
    elif mode:
        takes = duration(COSTS)
        record.say(f"compiling the network (torch.compile, {mode} mode), which takes about {takes}")
    record.note(compile=None if absent else mode)
    return None if absent else mode


def _pays(method: Method, pictures: int, seconds: float, whole: bool) -> bool:
    """Whether compiling saves more of a run than it costs; `seconds` are a picture's in a training step of 3 passes,
    `whole` is whether updates are captured."""
    saved = SAVED if whole else SAVED_LAUNCHED
    return saved * method.passes() / 3 * pictures * seconds > COSTS


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for `device`, in a line; None if a small function could be."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler raises, or its absence; the caller says it
        return first_line(error)[:200]
    return None
