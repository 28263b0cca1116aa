#!/usr/bin/env bash
# A network of timm with a backdoor as a folder, purified, and both scored: the figures of docs/own_network.md, in a few
# minutes. Run it in an empty folder, for it writes record/, net/ and images/ there; needs pip install -e '.[models]'.
#     bash REPOSITORY/docs/commands/timm_folder.sh
set -eu
here="$(cd "$(dirname "$0")/../.." && pwd)"
export PYTHONPATH="$here"
how="--device cpu --threads 1 --amp false"
python "$here/attack/badnet.py" --dataset digits --model timm:test_resnet --save_folder_name victim $how
python - <<'END'
from pathlib import Path

import timm
from torchvision.transforms.functional import to_pil_image

from sau.data.sources import clean_subset, load, source
from sau.record.attack_result import load_weights

names = "zero one two three four five six seven eight nine".split()
net, digits = timm.create_model("test_resnet", num_classes=10), source("digits")
load_weights(net, "record/victim")
said = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": digits.mean, "std": digits.std}
about = {"label_names": names, "pretrained_cfg": said}
timm.models.save_for_hf(net, "net", model_config=about, safe_serialization=True)
clean = clean_subset(load("digits")[0], 0.35, 0)
for i, (pixels, label) in enumerate(zip(clean.pixels, clean.labels)):
    (folder := Path("images") / names[label]).mkdir(parents=True, exist_ok=True)
    to_pil_image(pixels).save(folder / f"{i}.png")
END
python "$here/defense/sau.py" --model_file net --clean_dir images $how
python -m sau inspect net | tail -5
python -m sau report record/net_sau --out page.html
python - <<'END'
from pathlib import Path

import timm

from sau.evaluate import score
from sau.models import Normalized
from sau.record import attack_result

attack = attack_result.load(Path("record/victim"))
for place in ("net", "record/net_sau"):
    net = timm.create_model(f"local-dir:{place}", pretrained=True)
    mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    print(place, score(Normalized(net, mean, std).eval(), attack.images(None)[1], attack.triggered))
END
