"""The learning rates of configs/digits.yaml: accuracy on a fifth of the training digits, held out, for each rate.

    python -m tests.benchmarks.quickstart_rates

Of the rates whose mean is within one standard error of the highest it names the smallest. The seeds are other ones than
those of the table in README.md beside it.
"""

from statistics import mean, stdev

from jsonargparse import auto_cli

from flow_lightning.__main__ import main

QUIET = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary", "checkpointing")]
RATES, SEEDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02], [11, 12, 13]


def held_out_accuracy(method: str, rate: float, seed: int) -> float:
    settings = [f"--learning_rate={rate}", f"--seed_everything={seed}", "--data.validation_fraction=0.2"]
    validation = ["--trainer.check_val_every_n_epoch=3", "--retention.images=null"]
    try:
        cli = main(["fit", "-c=digits", f"--method={method}", *settings, *validation, *QUIET])
    except FloatingPointError:
        return 0.0
    return float(cli.trainer.callback_metrics["val/top1"])


def choose(rates: list[float] = RATES, seeds: list[int] = SEEDS) -> None:
    """Print the accuracy on held-out digits at each rate, and the rate to take, for each method."""
    for method in ("standard", "flow"):
        found = {rate: [held_out_accuracy(method, rate, seed) for seed in seeds] for rate in rates}
        for rate, values in found.items():
            print(f"{method}, {rate}: {mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        best = max(found.values(), key=mean)
        chosen = min(rate for rate in rates if mean(found[rate]) >= mean(best) - stdev(best) / len(best) ** 0.5)
        print(f"{method}: smallest within one standard error of the highest: {chosen}")


if __name__ == "__main__":
    auto_cli(choose, as_positional=False)
