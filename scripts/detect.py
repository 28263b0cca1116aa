"""Which training images of an attack look poisoned: three well-known detectors.

    python scripts/detect.py badnet_demo [--expected 0.1] [--out suspicious.csv]

f are the logits of the attacked network, h(x) its last features, the images of one label x_1 ... x_n:

    spectral    score <h(x_i) - mean h, v>^2, v the first principal direction of the h(x_i); flagged are the 1.5 e n
                largest, e what --expected says (Tran, Li, Madry, NeurIPS 2018)
    clustering  2-means of the first 10 independent components of the h(x_i); score 1 - the share of the cluster that
                x_i is in; a cluster with less than 35 % of the images is flagged (Chen et al., SafeAI 2019)
    scaling     score: the share of n in 3, 5, 7, 9, 11 for which f answers clamp(n x) like x; flagged above 0.5
                (SCALE-UP, Guo et al., ICLR 2023, without clean images)

They see images and labels alone. What is known of the poison measures them: TPR and FPR are the shares of the poisoned
and of the other images that are flagged, AUROC is of the scores.
"""

import csv
import io
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from sau.data.images import BACKDOOR, Images
from sau.errors import RecordError, require, run_command
from sau.evaluate import last_features, predict
from sau.files import write
from sau.grid.store import find
from sau.record import attack_result
from sau.report.tables import markdown
from sau.tools import Parser, add_device, use_device
from sau.types import Bytes

COMPONENTS, SMALLEST = 10, 0.35  # of activation clustering
FACTORS, AGREE = (3, 5, 7, 9, 11), 0.5  # of SCALE-UP
Found = tuple[Tensor, Tensor]  # scores [N], the higher the more suspicious, and flags [N]


def detections(model: nn.Module, images: Images, expected: float) -> Iterator[tuple[str, Found]]:
    """Name and findings of each detector; the features are computed with the first."""
    features, labels = last_features(model, images.pixels), images.labels.cpu()
    for name, detector in {"spectral": partial(spectral, expected=expected), "clustering": clustering}.items():
        scores, flags = torch.zeros(len(labels)), torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            at = labels == label
            scores[at], flags[at] = detector(features[at])
        yield name, (scores, flags)
    yield "scaling", scaling(model, images.pixels)


def spectral(h: Tensor, expected: float) -> Found:
    """Spectral signatures, of the features [n, F] of one label."""
    h = h - h.mean(0)
    scores = (h @ torch.linalg.svd(h, full_matrices=False)[2][0]).square()
    flags = torch.zeros(len(h), dtype=torch.bool)
    flags[scores.topk(min(len(h), round(1.5 * expected * len(h)))).indices] = True
    return scores, flags


def clustering(h: Tensor) -> Found:
    """Activation clustering, of the same."""
    if len(h) <= COMPONENTS:
        return torch.zeros(len(h)), torch.zeros(len(h), dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its components are used all the same
        parts = FastICA(min(COMPONENTS, h.shape[1]), random_state=0, max_iter=1000).fit_transform(h.numpy())
    cluster = torch.from_numpy(KMeans(2, n_init=10, random_state=0).fit_predict(parts)).long()
    shares = cluster.bincount(minlength=2) / len(h)
    return 1 - shares[cluster], shares[cluster] < SMALLEST


def scaling(model: nn.Module, pixels: Bytes) -> Found:
    """SCALE-UP."""
    answers = predict(model, pixels)
    same = [predict(model, (pixels.int() * n).clamp(max=255).byte()) == answers for n in FACTORS]
    scores = torch.stack(same).float().mean(0).cpu()
    return scores, scores > AGREE


def main() -> None:
    """Score the training images of one record: print the table, and write the scores."""
    parser = Parser(__doc__)
    parser.add_argument("name", help="folder of the attack, a name below the record root or a path")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [where the attack found them]")
    about = "share of poisoned images that may be in a class; spectral flags 1.5 times as many [0.1]"
    parser.add_argument("--expected", type=float, default=0.1, help=about)
    parser.add_argument("--out", type=Path, help="CSV file for the scores of every image")
    add_device(parser)
    asked = parser.parse_args()
    require("--expected", asked.expected, 0 < asked.expected <= 2 / 3, "above 0 and up to 2/3")
    device, attacked = use_device(asked), attack_result.load(find(asked.record_root, asked.name))
    train, kind = attacked.training_images(attacked.images(asked.dataset_path)[0], "poisoned")
    if kind != "poisoned":
        raise RecordError(f"{attacked.path} is a clean network; name an attack")
    model, bad, body = attacked.model().to(device), train.role == BACKDOOR, []
    model.amp = bool(attacked.amp)
    columns = {"index": train.index.tolist(), "label": train.labels.tolist()}
    started = time.monotonic()
    for name, (scores, flags) in detections(model, train, asked.expected):
        columns[name], columns[f"{name}_flagged"] = scores.tolist(), flags.int().tolist()
        most = train.labels[flags].mode().values.item() if flags.any() else "-"
        rates = [f"{100 * flags[part].float().mean():.1f}" for part in (bad, ~bad)]
        area = f"{100 * roc_auc_score(bad, scores):.1f}"
        body.append([name, f"{int(flags.sum()):,}", str(most), *rates, area, f"{time.monotonic() - started:.0f}"])
        started = time.monotonic()
    for doubt in attacked.doubts:
        print(f"warning: {doubt}")
    print(f"{len(train):,} training images, {int(bad.sum()):,} of them poisoned\n")
    print(markdown(["detector", "flagged", "most in class", "TPR %", "FPR %", "AUROC %", "seconds"], body), end="")
    if asked.out is not None:
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))
        write(asked.out, text.getvalue().encode())


if __name__ == "__main__":
    sys.exit(run_command(main))
