"""What an iteration measured, kept and drawn."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Log:
    """Every iteration's figures: printed, as CSV, to TensorBoard if it is installed."""

    columns = (
        "iteration eval reward num_responses num_tokens mean_length p95_length"
        " rollout_s train_s update_s tokens_per_s acceptance_length"
        " logprob_off_mean logprob_off_max ratio_mean clipped gradient_norm"
    ).split()

    def __init__(self, out: Path, first: int) -> None:
        """Begin, or go on with iteration `first` behind what is there."""
        self._path = out / "metrics.csv"
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / "tensorboard")
        except ImportError:
            pass
        earlier = self._rows() if first > 1 else []
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(r for r in earlier if int(r["iteration"]) < first)

    def write(self, row: dict[str, float]) -> None:
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["iteration"])
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)

    def plot(self) -> None:
        """curve.png: reward in training and on held-out problems."""
        from matplotlib.figure import Figure

        rows = self._rows()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, style in (("reward", "-"), ("eval", "o-")):
            points = [(int(r["iteration"]), float(r[name])) for r in rows if r[name]]
            label = "training" if name == "reward" else "held out"
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="iteration", ylabel="mean reward", ylim=(0, 1))
        axes.legend()
        figure.savefig(self._path.with_name("curve.png"), dpi=120)

    def _rows(self) -> list[dict[str, str]]:
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))
