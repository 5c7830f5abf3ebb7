"""k-means on a CPU: FeatureMaps.fit against scikit-learn's KMeans, in time and in the sum of squared distances.

    python -m bench.feature_maps            some seconds; prints a table
    python -m bench.feature_maps --record   and writes it to bench/training/feature_maps.json

Both get fp32, k-means++, one start for every seed, one thread, and their own default of when to stop. Times are of the
processor, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from tritonshare import __version__
from tritonshare.files import replace
from tritonshare.nn import FeatureMaps
from tritonshare.training import data

SUMMARY = (__doc__ or "").split("\n")[0]
RECORDED = Path(__file__).parent / "training" / "feature_maps.json"
ITERATIONS, SEEDS = 300, 7


def inputs() -> dict[str, torch.Tensor]:
    """Handwritten digits, and normal numbers around 100 centers."""
    digits = torch.from_numpy(data.load("digits").train_images).flatten(1).float()
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(100, 32, generator=generator)
    blobs = centers[torch.arange(20_000) % 100] + torch.randn(20_000, 32, generator=generator)
    return {"digits": digits, "blobs": blobs}


def ours(x: torch.Tensor, features: int, seed: int) -> float:
    return FeatureMaps(features, x.shape[1]).fit(x, ITERATIONS, seed=seed).inertia


def theirs(x: torch.Tensor, features: int, seed: int) -> float:
    return float(KMeans(features, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(x.numpy()).inertia_)


def timed(fit: Any, x: torch.Tensor, features: int) -> dict[str, Any]:
    fit(x, features, 0)  # what is done once
    seconds, inertia = [], []
    for seed in range(SEEDS):
        begin = time.process_time()
        inertia.append(fit(x, features, seed))
        seconds.append(time.process_time() - begin)
    return {"seconds": seconds, "inertia": inertia}


def measured() -> dict[str, Any]:
    rows = []
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for name, x in inputs().items():
            for features in (16, 64):
                of = {"FeatureMaps.fit": timed(ours, x, features), "sklearn KMeans": timed(theirs, x, features)}
                rows.append({"inputs": name, "shape": list(x.shape), "features": features, **of})
    return {
        "about": SUMMARY,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
        "tritonshare": __version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "rows": rows,
    }


def table(document: dict[str, Any]) -> str:
    lines = ["| inputs | features | fit | median processor s (lowest to highest) | best sum of squares | median |"]
    lines.append("|---|---|---|---|---|---|")
    for row in document["rows"]:
        for name in ("FeatureMaps.fit", "sklearn KMeans"):
            s, i = row[name]["seconds"], row[name]["inertia"]
            of = f"{row['inputs']} {row['shape'][0]} x {row['shape'][1]} | {row['features']} | {name}"
            lines.append(f"| {of} | {median(s):.3f} ({min(s):.3f} to {max(s):.3f}) | {min(i):.0f} | {median(i):.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.feature_maps", description=SUMMARY)
    parser.add_argument("--record", action="store_true", help=f"write the results to {RECORDED.name}")
    args = parser.parse_args(argv)
    document = measured()
    print(table(document))
    if args.record:
        replace({RECORDED: (json.dumps(document, indent=1) + "\n").encode()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
