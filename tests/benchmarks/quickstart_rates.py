"""The learning rates of configs/quickstart.yaml: accuracy on a fifth of the training digits, held out, for each rate.

    python tests/benchmarks/quickstart_rates.py

Of the rates whose mean is within one standard error of the highest it names the smallest. The seeds are other ones than
those of the table in README.md beside it.
"""

import argparse
from itertools import product
from statistics import mean, stdev

from flow_lightning.__main__ import main

QUIET = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary", "checkpointing")]


def held_out_accuracy(method: str, rate: float, seed: int) -> float:
    settings = [f"--learning_rate={rate}", f"--seed_everything={seed}", "--data.validation_fraction=0.2"]
    validation = ["--trainer.check_val_every_n_epoch=3", "--retention.images=null"]
    try:
        cli = main(["fit", "-c=quickstart", f"--method={method}", *settings, *validation, *QUIET])
    except FloatingPointError:
        return 0.0
    return float(cli.trainer.callback_metrics["val/top1"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    args = parser.parse_args()
    found: dict[tuple[str, float], list[float]] = {}
    for method, rate, seed in product(("standard", "flow"), args.rates, args.seeds):
        found.setdefault((method, rate), []).append(held_out_accuracy(method, rate, seed))
    for method in ("standard", "flow"):
        best = max((values for (name, _), values in found.items() if name == method), key=mean)
        least = mean(best) - stdev(best) / len(best) ** 0.5
        for rate in args.rates:
            values = found[method, rate]
            print(f"{method}, {rate}: {mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        chosen = min(rate for rate in args.rates if mean(found[method, rate]) >= least)
        print(f"{method}: smallest within one standard error of the highest: {chosen}")
