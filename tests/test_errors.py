"""What every command says and returns when the machine or the user does not give it what it needs."""

import subprocess
import sys

from toys import REPOSITORY

from sau.errors import FULL, told


def test_the_errors_of_linux_alone_are_not_needed():
    """macOS has no EREMOTEIO."""
    code = "import errno; vars(errno).pop('EREMOTEIO', None); import sau.errors"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_want_of_memory_in_any_words_is_one_line(capsys):
    def greedy() -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    assert told(greedy) == FULL
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory (Unable to allocate 9 GiB)") and err.count("\n") == 1
