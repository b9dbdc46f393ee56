"""Learn who is in a picture by non-negative factors, and draw the factors: `python examples/08_factors_of_faces.py`.

Cartoon faces, or those of an `olivetti.npz` (x (n, 64, 64), y (n,)): people 0 to 29 to train on, the rest never seen.
A factor is drawn as what one standard deviation of its code adds to a picture (red) or takes away (black), beside the
pictures that have most of it. Shown are the factors that change pictures most.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from piecework import Batch, DeepFacto, data, disentangle, factors, losses
from piecework.models import mlp
from piecework.nn import Standardise


def faces(path: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures (n, 1024) of people to train on, their numbers, pictures of people never seen, and theirs."""
    if path is None:
        found = data.cartoon_faces(seed=0)
        x, who, known, unseen = found.x, found.identity, found.train, found.unseen
    else:
        with np.load(path) as file:
            x, who = file["x"].reshape(-1, 32, 2, 32, 2).mean((2, 4)), file["y"].astype(np.int64)
        known, unseen = np.flatnonzero(who < 30), np.flatnonzero(who >= 30)
    pictures = torch.from_numpy(x.reshape(len(x), -1)).float() / 255
    numbers = torch.from_numpy(np.unique(who[known], return_inverse=True)[1])
    return pictures[known], numbers, pictures[unseen], torch.from_numpy(who[unseen])


def draw(x: Tensor, codes: Tensor, path: str, num: int = 12, tops: int = 5) -> None:
    """Two columns of factors: what each adds to a picture, and the pictures where it is largest."""
    from matplotlib.figure import Figure

    maps = torch.linalg.lstsq(codes - codes.mean(0), x - x.mean(0), driver="gelsd").solution * codes.std(0)[:, None]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(num // 2, 2 * (tops + 1))
    for number, k in enumerate(maps.square().sum(1).argsort(descending=True)[:num].tolist()):
        cells = grid[number % (num // 2), number // (num // 2) * (tops + 1) :]
        size = float(maps[k].abs().max())
        cells[0].imshow(maps[k].view(32, 32).numpy(), cmap="RdGy_r", vmin=-size, vmax=size)
        cells[0].set_title(f"factor {k}", fontsize=8)
        for cell, row in zip(cells[1:], codes[:, k].argsort(descending=True)[:tops].tolist(), strict=False):
            cell.imshow(x[row].view(32, 32).numpy(), cmap="gray", vmin=0, vmax=1)
    for cell in grid.ravel():
        cell.axis("off")
    figure.savefig(path, dpi=90)


def main(words: Sequence[str] | None = None) -> float:
    """Train, draw, and return how well codes tell whether two pictures are of one stranger (AUC)."""
    parser = argparse.ArgumentParser(description="Factors of faces.")
    parser.add_argument("--olivetti", metavar="FILE", help="olivetti.npz; else cartoon faces")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", default="factors.png")
    chosen = parser.parse_args(words)
    x, people, strangers, numbers = faces(chosen.olivetti)
    scaling = Standardise(x.mean(0), x.var(0).mean().sqrt().expand(x.shape[1]))
    model = nn.Sequential(scaling, *mlp(x.shape[1], [256, 64], int(people.max()) + 1, factors=32))
    training = DeepFacto(coupling=10, reconstruction=0.1, decoder=2, sparsity=0.05).bind(model, losses.Softmax())
    generator = torch.Generator().manual_seed(0)
    for _ in range(chosen.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            metrics = training.step(Batch(x[rows], people[rows]))
    print({name: round(float(value), 3) for name, value in metrics.items()})
    draw(x, factors.codes(model.eval(), x), chosen.out)
    by_code = disentangle.pair_auc(factors.codes(model, strangers), numbers)
    by_pixels = disentangle.pair_auc(strangers, numbers)
    print(f"one stranger or two? AUC by their codes {by_code:.3f}, by their pixels {by_pixels:.3f}; see {chosen.out}")
    return by_code


if __name__ == "__main__":
    main()
