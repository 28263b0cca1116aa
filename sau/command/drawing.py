"""matplotlib that draws into files alone; where it is missing, a line that says how to install it, and exit status 2.

Scripts that draw import it before `sau.figures`, which imports matplotlib, too.
"""

import sys

try:
    import matplotlib
except ModuleNotFoundError:
    print("error: drawing needs matplotlib: pip install -e '.[report]'", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["plt"]
