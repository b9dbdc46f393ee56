"""Non-negative matrix factorisation as a layer: the output is the code of the input on a dictionary.

    s(a) = argmin over s >= 0 of (1/2) ||a - M s||^2 + (ridge/2) ||s||^2         a (d,) >= 0, M (d, r) >= 0, s (r,)

Where F = {k: s_k > 0} does not change, s_F = (M_F^T M_F + ridge I)^-1 M_F^T a, so that a gradient g of the codes
becomes u M^T of the input, with u_F = (M_F^T M_F + ridge I)^-1 g_F and 0 elsewhere: the implicit derivative of sparse
coding, Mairal, Bach, Ponce, "Task-driven dictionary learning", arXiv:1009.5358. At a point where some s_k and its slope
are both 0 it is the derivative to one side; the ridge keeps the systems regular everywhere.

The dictionary has no gradient step. It follows from the statistics Q <- forget Q + S^T S and P <- forget P + A^T S of
the batches, by the column updates of `solvers.nmf` (Mairal, Bach, Ponce, Sapiro, arXiv:0908.0050, with HALS columns).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..solvers.active_set import solve_free
from ..solvers.nmf import dead, nmf, refuse_rank, start_dictionary, sweep_dictionary, unit_columns
from ..solvers.nnls import gram_and_cross, rough_then_exact
from ..training import BadInput, stream

DEAD = 1e-3
"""A factor is dead when its Q_kk has fallen below this part of the mean."""
CREDIT = 1e-2
"""Of the mean Q_kk: what a factor that starts again is given; it lasts about ln(10)/(1 - forget) batches."""
FIRST_ROWS = 2048
"""Most rows of the first batch that the dictionary is fitted to."""
FIRST_ITERATIONS = 20


class Sums(NamedTuple):
    """What a batch adds to the statistics. On several ranks: add up `gram` and `cross`, take `worst` of one rank."""

    gram: Tensor
    """S^T S, (r, r)."""
    cross: Tensor
    """A^T S, (d, r)."""
    worst: Tensor
    """max(0, a - M s) of the worst-fitted row, (d,): where a dead factor starts again."""


class NMF(nn.Module):
    """a -> the non-negative code of a on a dictionary of non-negative unit columns.

    Input (n, features) gives codes (n, rank); input (n, features, h, w) gives (n, rank, h, w), a code a position. In
    eval() mode, and wherever `track` is False, the layer is a function of its input alone, one row at a time.

    In train() mode with `track`, the first batch that is not all 0 initialises the dictionary, and each forward pass
    1. applies the sums that the pass before it left behind: statistics and dictionary move;
    2. works out the codes;
    3. leaves the sums of this batch behind, in buffers.
    So one dictionary serves the whole of a step, and the deployed network is the one that the last step saw. A pass
    inside a backward pass (activation checkpointing) moves nothing, and gives the same codes as long as each training
    forward has its backward before the next one. Whoever runs the layer several times for a batch, or has several
    ranks, sets `track` to False and moves the dictionary himself: `initialise(a)` once, then `observe(a, codes)`, or
    `absorb` of `sums(a, codes)` added up over the ranks.

    Everything that a resumed run needs is in buffers. On a CPU, negative and non-finite input is refused; on a device,
    which asking would stop, rows with such entries get codes of NaN and leave no trace in the sums. Only the first
    tracked batch stops a device. No random number is drawn from the global generator.

    features: d; rank: r, from 1 to d; ridge: above 0, in units of the unit columns (it keeps codes unique and their
    derivative bounded); forget: part of the statistics that a batch leaves of what was, in [0, 1]; seed: of the
    dictionary before and at its initialisation. Raises BadInput for settings out of range."""

    dictionary: Tensor
    """M (features, rank)."""
    gram: Tensor
    """Q (rank, rank), the decayed sum of S^T S."""
    cross: Tensor
    """P (features, rank), the decayed sum of A^T S."""
    held_gram: Tensor
    held_cross: Tensor
    held_worst: Tensor
    """The sums that the next training pass applies."""
    held: Tensor
    """Whether there are any, () bool."""
    initialised: Tensor
    """Whether the dictionary has seen a batch, () bool."""

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        ridge: float = 1e-3,
        forget: float = 0.95,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_rank(rank, features)
        if not 0 < ridge < float("inf"):
            raise BadInput(f"nmf: the ridge must be above 0, got {ridge}; 1e-3 is weak and enough")
        if not 0 <= forget <= 1:
            raise BadInput(f"nmf: forget must be in [0, 1], got {forget}; 0.95 remembers about twenty batches")
        self.features, self.rank, self.ridge, self.forget, self.seed = features, rank, ridge, forget, seed
        self.track = True
        kind = torch.get_default_dtype() if dtype is None else dtype
        start = start_dictionary(torch.zeros(0, features, dtype=kind), rank, generator=stream(seed, 0))
        self.register_buffer("dictionary", start.to(device))
        for name, shape in (("gram", (rank, rank)), ("cross", (features, rank)), ("worst", (features,))):
            for prefix in ("held_",) if name == "worst" else ("", "held_"):
                self.register_buffer(prefix + name, torch.zeros(shape, dtype=kind, device=device))
        for name in ("held", "initialised"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=device))
        self._known: tuple[int, int] | None = None

    def forward(self, a: Tensor) -> Tensor:
        rows, bad = self._checked(a)
        moving = self.training and self.track and not _inside_backward()
        if moving:
            self.update_dictionary()
            if not self.is_initialised():
                self.initialise(rows)
        codes: Tensor = _Codes.apply(rows, self.dictionary.clone(), self.ridge)  # type: ignore[no-untyped-call]
        if moving and len(rows):
            self._hold(self.sums(rows, codes))
        return as_images(codes if bad is None else codes.masked_fill(bad[:, None], torch.nan), a)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """S M^T: codes (n, rank) or (n, rank, h, w) as features (n, features) or (n, features, h, w)."""
        return as_images(as_rows(codes) @ self.dictionary.T, codes)

    @torch.no_grad()
    def relative_error(self, a: Tensor) -> Tensor:
        """||A - S M^T|| / ||A|| with the codes of this input, 0-d; 0 where the input is 0. Moves nothing."""
        rows, _ = self._checked(a)
        codes = rough_then_exact(*gram_and_cross(rows, self.dictionary, self.ridge))
        norm = torch.linalg.vector_norm(rows)
        error = torch.linalg.vector_norm(rows - codes @ self.dictionary.T)
        return torch.where(norm > 0, error / norm, 0.0)

    @torch.no_grad()
    def initialise(self, a: Tensor) -> None:
        """Fit the dictionary to a batch, (n, features) or (n, features, h, w), and forget all statistics.

        A batch that is all 0 tells nothing: it leaves the layer as it is. The same on every rank only for the same
        rows: where ranks have their own, broadcast the buffers afterwards."""
        rows, _ = self._checked(a)
        generator = stream(self.seed, 1)
        if len(rows) > FIRST_ROWS:
            chosen = torch.randperm(len(rows), generator=generator)[:FIRST_ROWS]
            rows = rows[chosen.to(rows.device)]
        if not bool(rows.any()):
            return
        seed = int(torch.randint(1 << 62, (), generator=generator))
        found = nmf(rows, self.rank, ridge=self.ridge, seed=seed, max_iterations=FIRST_ITERATIONS)
        self.dictionary.copy_(found.dictionary)
        for buffer in (self.gram, self.cross, self.held_gram, self.held_cross, self.held_worst, self.held):
            buffer.zero_()
        self.initialised.fill_(True)

    @torch.no_grad()
    def sums(self, a: Tensor, codes: Tensor) -> Sums:
        """What a batch and its codes add to the statistics. a: rows or images, of any sign; codes: of the same form."""
        a, codes = as_rows(a.detach()), as_rows(codes.detach())
        missing = (a - codes @ self.dictionary.T).clamp_min(0)
        return Sums(codes.T @ codes, a.T @ codes, missing[missing.square().sum(1).argmax()])

    @torch.no_grad()
    def absorb(self, sums: Sums) -> None:
        """Move the statistics by the sums of a batch, then the dictionary. Never synchronises a device."""
        dictionary, gram, cross = self._moved(sums)
        self.dictionary.copy_(dictionary)
        self.gram.copy_(gram)
        self.cross.copy_(cross)

    def observe(self, a: Tensor, codes: Tensor) -> None:
        """Move the statistics and the dictionary by a batch now: `absorb(sums(a, codes))`. For one rank.

        The codes may be others than `forward` gives, such as those that have seen a label."""
        self.absorb(self.sums(a, codes))

    @torch.no_grad()
    def update_dictionary(self) -> None:
        """Apply the sums that the last training pass left behind, if there are any. Never synchronises a device."""
        moved = self._moved(Sums(self.held_gram, self.held_cross, self.held_worst))
        for buffer, new in zip((self.dictionary, self.gram, self.cross), moved, strict=True):
            buffer.copy_(torch.where(self.held, new, buffer))
        self.held.fill_(False)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.rank}, ridge={self.ridge:g}, forget={self.forget:g}, seed={self.seed}"

    def _moved(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        gram = self.forget * self.gram + sums.gram
        cross = self.forget * self.cross + sums.cross
        dictionary = sweep_dictionary(self.dictionary, gram, cross)
        return _with_one_revived(dictionary, gram, cross, sums.worst)

    def _hold(self, sums: Sums) -> None:
        for buffer, new in zip((self.held_gram, self.held_cross, self.held_worst), sums, strict=True):
            buffer.copy_(new)
        self.held.fill_(True)

    def is_initialised(self) -> bool:
        """Whether the dictionary has seen a batch; a device is asked again only where someone may have written here."""
        here = (id(self.initialised), self.initialised._version)
        if self._known != here:
            self._known = here if bool(self.initialised) else None
        return self._known is not None

    def _checked(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows (m, features) in the dictionary's dtype, and on a device which of them are bad, (m,) bool."""
        if a.dim() not in (2, 4) or a.shape[1] != self.features:
            raise BadInput(
                f"nmf takes (n, {self.features}) or (n, {self.features}, h, w), got {tuple(a.shape)}; "
                "make the layer for as many features as the layer before it gives"
            )
        rows = as_rows(a).to(self.dictionary.dtype)
        if rows.device.type != "cpu":
            bad = ~((rows >= 0) & rows.isfinite()).all(1)
            return rows.masked_fill(bad[:, None], 0), bad
        low, high = (float(end) for end in rows.detach().aminmax()) if rows.numel() else (0.0, 0.0)
        if not (low >= 0 and high < float("inf")):
            found = f"negative entries, down to {low:g}" if low < 0 else "entries that are not finite"
            raise BadInput(f"nmf takes finite input of at least 0, got {found}; put a ReLU in front of the layer")
        return rows, None


class _Codes(torch.autograd.Function):
    """Rows (n, d), dictionary (d, r) -> exact codes (n, r), with the implicit derivative of both.

    The systems are built again in the backward pass: kept, they would take n r^2 numbers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dictionary: Tensor, ridge: float) -> Tensor:
        codes = rough_then_exact(*gram_and_cross(rows, dictionary, ridge))
        ctx.ridge = ridge
        ctx.save_for_backward(dictionary, codes, rows if dictionary.requires_grad else None)
        return codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dictionary, codes, rows = ctx.saved_tensors
        gram = dictionary.T @ dictionary
        gram.diagonal().add_(ctx.ridge)
        u = solve_free(gram, codes > 0, gradient)
        to_rows = u @ dictionary.T
        to_dictionary = None if rows is None else (rows - codes @ dictionary.T).T @ u - to_rows.T @ codes
        return to_rows, to_dictionary, None


def _with_one_revived(dictionary: Tensor, gram: Tensor, cross: Tensor, worst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start the least used factor again at `worst`, if it is dead and `worst` is not 0; nothing is asked of a device.

    One a batch: two would start at the same row. Its past is a credit of codes that reconstruct it alone, so that it is
    not given up again before codes use it."""
    least = gram.diagonal().argmin()
    place = torch.arange(len(gram), device=gram.device) == least
    place = place & dead(gram, part=DEAD) & worst.any()
    column = unit_columns(worst[:, None])[0]
    credit = CREDIT * gram.diagonal().mean()
    gram = torch.where(place[:, None] | place, credit * torch.diag(place).to(gram.dtype), gram)
    cross = torch.where(place, credit * column, cross)
    return torch.where(place, column, dictionary), gram, cross


def as_rows(a: Tensor) -> Tensor:
    """(n, k) as it is, (n, k, h, w) as (n h w, k)."""
    return a if a.dim() == 2 else a.movedim(1, -1).reshape(-1, a.shape[1])


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (n h w, k) in the form of `like`: itself, or (n, k, h, w)."""
    if like.dim() == 2:
        return rows
    return rows.reshape(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1).contiguous()


def _inside_backward() -> bool:
    """Whether this pass is run by a backward pass, as activation checkpointing does to have its tensors again."""
    return torch._C._current_graph_task_id() != -1
