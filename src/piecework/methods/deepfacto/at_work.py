"""DeepFacto at work: an encoder, the NMF layer, a head and a decoder, on mini-batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...evaluation import device_of
from ...factors import parts
from ...group import Group
from ...losses import Loss, smoothed
from ...nn.nmf import Sums, as_images, as_rows
from ...training import BadInput, Batch, CannotTrain, Metrics, stream
from ..blocks import Block
from ..optimizer_state import entries_of, put_entries
from ..parameters import share_from_rank_0, start_from_rank_0, trainable
from ..schedule import set_rate
from .codes import Pull, density, informed, refuse_head

if TYPE_CHECKING:
    from . import DeepFacto


class FactorsAtWork:
    """One model with an NMF layer. The decoder is not part of the model: it is only trained with."""

    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "mini"
    deterministic = True

    def __init__(self, recipe: DeepFacto, model: nn.Module, loss: Loss, group: Group) -> None:
        trainable(model, "deepfacto", derivative=False)
        try:
            found = parts(model)
        except BadInput as error:
            raise CannotTrain(f"deepfacto: {error}") from None
        self._objective = smoothed(loss, recipe.label_smoothing)
        if recipe.through != "implicit":
            refuse_head(found.head, self._objective, recipe.through)
        self.model, self.group = model, group
        self._recipe, self._loss, self._nmf = recipe, loss, found.nmf
        self._device = device_of(model)
        start_from_rank_0(model, group)
        self._encoder = Block(found.encoder, 0, recipe.factory, recipe.seed, self._device)
        self._head = Block(found.head, 1, recipe.factory, recipe.seed, self._device)
        self._decoder: nn.Linear | None = None
        self._decoding: Block | None = None
        self._variance: Tensor | None = None
        self._step = 0
        self._dead: Tensor | None = None  # whether the last batch had no feature above 0

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Metrics:
        if len(batch) == 0:
            raise BadInput("a mini-batch has no rows; give every rank the same number, at least one")
        if not self.model.training:
            self.model.train()
        lr = self._set_rate()
        x, y = batch.x.to(self._device), batch.y.to(self._device)
        for block in (self._encoder, self._head):
            block.begin(self._step)
        tracked, self._nmf.track = self._nmf.track, False
        try:
            metrics = self._advance(x, y)
        finally:
            self._nmf.track = tracked
        self._step += 1
        return metrics if lr is None else {**metrics, "lr": torch.tensor(lr, dtype=torch.float64)}

    def _advance(self, x: Tensor, y: Tensor) -> Metrics:
        with torch.enable_grad():
            a = self._encoder(x)
        free = self._free_codes(a.detach())
        target = self._decoded(x, free)
        metrics = self._figures(a.detach(), free)
        self._dead = ~a.detach().any()
        through = self._recipe.through
        if through == "implicit":
            metrics |= self._implicit(a, y, target)
        else:
            weight, sparsity = self._decoder_weight(), self._recipe.sparsity
            pull = Pull(self._head.module, self._objective, y, self._decoder, weight, target, free, sparsity)
            if through == "block-admm":
                seen = self._block_admm(x, a, free, pull)
            else:
                seen = self._by_contrast(a, free, pull)
            metrics |= self._readers(y, target, free, seen)
        self._move_dictionary(a.detach(), free)
        return metrics

    def _free_codes(self, a: Tensor) -> Tensor:
        """The codes that do not know the label, in the form that the head takes."""
        if not self._nmf.is_initialised():
            self._nmf.initialise(a)
            share_from_rank_0(self._nmf.buffers(), self.group)
        with torch.no_grad():
            codes: Tensor = self._nmf(a)
        return codes

    def _implicit(self, a: Tensor, y: Tensor, target: Tensor) -> Metrics:
        """Everything by the derivative of the codes."""
        with torch.enable_grad():
            codes = self._nmf(a)
            z = self._head(codes)
            total = self._objective(z, y) + self._decoder_loss(codes, target)
            if self._recipe.sparsity:
                total = total + self._recipe.sparsity * density(codes)
            missing = a - self._nmf.reconstruct(codes.detach())
            total = total + self._recipe.reconstruction / 2 * missing.square().sum() / len(y)
        blocks = self._learning((self._encoder, self._head, self._decoding))
        gradients = torch.autograd.grad(total, [one for block in blocks for one in block.parameters])
        self._move(blocks, gradients)
        return {"loss": self._loss(z.detach(), y), **self._score("free_score", z.detach(), y)}

    def _by_contrast(self, a: Tensor, free: Tensor, pull: Pull) -> Tensor:
        """The encoder by the difference of codes with a label and without; returns the former."""
        recipe, rows = self._recipe, as_rows(a.detach())
        seen = self._informed(pull, rows, as_rows(free))
        m = self._nmf.dictionary.T
        if recipe.through == "envelope":
            g = recipe.coupling * (rows - seen @ m)
        else:
            other, share = as_rows(free), 1.0
            if recipe.two_sided:
                other, share = self._informed(pull, rows, as_rows(free), sign=-1.0), 0.5
            g = recipe.reconstruction * (rows - as_rows(free) @ m) + share * recipe.coupling * ((other - seen) @ m)
        blocks = self._learning((self._encoder,))
        if blocks:
            gradients = torch.autograd.grad(a, self._encoder.parameters, as_images(g, a) / len(a))
            self._move(blocks, gradients)
        return seen

    def _block_admm(self, x: Tensor, a: Tensor, free: Tensor, pull: Pull) -> Tensor:
        """Sweeps over codes, the variable A = f(x) and the encoder's weights; returns the codes."""
        recipe, m = self._recipe, self._nmf.dictionary.T
        f, u, seen = as_rows(a.detach()), torch.zeros_like(as_rows(a)), as_rows(free)
        variable = f
        for sweep in range(recipe.sweeps):
            seen = self._informed(pull, variable, seen)
            variable = (recipe.beta * (f + u) + recipe.coupling * (seen @ m)) / (recipe.beta + recipe.coupling)
            blocks = self._learning((self._encoder,))
            for step in range(recipe.local_steps if blocks else 0):
                seed = as_images(recipe.beta / len(x) * (as_rows(a.detach()) - variable + u), a)
                self._move(blocks, torch.autograd.grad(a, self._encoder.parameters, seed))
                if (sweep, step) != (recipe.sweeps - 1, recipe.local_steps - 1):
                    with torch.enable_grad():
                        a = self._encoder(x)
            f = as_rows(a.detach())
            u = u + recipe.dual_step * (f - variable)
        return seen

    def _readers(self, y: Tensor, target: Tensor, free: Tensor, seen: Tensor) -> Metrics:
        """Train head and decoder on the codes that do not know the label; say what those that do would score."""
        with torch.enable_grad():
            z = self._head(free)
            total = self._objective(z, y) + self._decoder_loss(free, target)
        with torch.no_grad():
            told = self._head(as_images(seen, free))
        blocks = self._learning((self._head, self._decoding))
        if blocks:
            self._move(blocks, torch.autograd.grad(total, [one for block in blocks for one in block.parameters]))
        scores = {**self._score("free_score", z.detach(), y), **self._score("informed_score", told, y)}
        if scores:
            scores["code_gap"] = scores["informed_score"] - scores["free_score"]
        return {"loss": self._loss(z.detach(), y), **scores}

    # -- parts of a step ---------------------------------------------------------------------------------------------

    def _informed(self, pull: Pull, rows: Tensor, start: Tensor, *, sign: float = 1.0) -> Tensor:
        recipe = self._recipe
        return informed(
            pull,
            rows,
            self._nmf.dictionary,
            weight=recipe.coupling,
            ridge=self._nmf.ridge,
            start=start,
            steps=recipe.code_steps,
            sign=sign,
        )

    def _decoded(self, x: Tensor, free: Tensor) -> Tensor:
        """What the decoder is to give, (n, k): the rows as the layers before the first weights leave them."""
        h = x
        with torch.no_grad():
            for layer in self._encoder.module:
                if any(True for _ in layer.parameters()):
                    break
                h = layer(h)
        h = h.flatten(1).to(free.dtype)
        if self._recipe.decoder > 0 and self._decoder is None:
            self._make_decoder(free[0].numel(), h)
        return h

    def _make_decoder(self, width: int, h: Tensor) -> None:
        """A linear decoder that starts at the mean of the first batch, and the variance that it is judged by."""
        self._decoder = nn.Linear(width, h.shape[1], dtype=h.dtype, device="meta").to_empty(device=h.device)
        generator = stream(self._recipe.seed, 2)
        with torch.no_grad():
            start = torch.randn(self._decoder.weight.shape, generator=generator, dtype=torch.float64)
            self._decoder.weight.copy_(start * (0.1 / width**0.5))
            self._decoder.bias.copy_(h.mean(0))
        variance = (h - h.mean(0)).square().sum() / len(h)
        self._variance = variance.clamp_min(torch.finfo(h.dtype).eps)
        share_from_rank_0([*self._decoder.parameters(), self._variance], self.group)
        self._decoding = Block(nn.Sequential(self._decoder), 2, self._recipe.factory, self._recipe.seed, self._device)

    def _decoder_weight(self) -> Tensor | float:
        return 0.0 if self._variance is None else self._recipe.decoder / self._variance

    def _decoder_loss(self, codes: Tensor, target: Tensor) -> Tensor | float:
        if self._decoder is None:
            return 0.0
        missing: Tensor = self._decoder(codes.flatten(1)) - target
        return self._decoder_weight() * missing.square().sum() / len(target)

    def _figures(self, a: Tensor, free: Tensor) -> Metrics:
        missing = torch.linalg.vector_norm(a - self._nmf.reconstruct(free))
        tiny = torch.finfo(a.dtype).tiny
        return {
            "nmf_error": missing / torch.linalg.vector_norm(a).clamp_min(tiny),
            "zeros": (free == 0).double().mean(),
        }

    def _score(self, name: str, z: Tensor, y: Tensor) -> Metrics:
        return {} if y.is_floating_point() else {name: (self._loss.decide(z) == y).double().mean()}

    def _move_dictionary(self, a: Tensor, free: Tensor) -> None:
        sums = self._nmf.sums(a, free)
        if self.group.size > 1:
            self.group.sum_(sums.gram, sums.cross)
            self.group.broadcast_(sums.worst, 0)
        self._nmf.absorb(Sums(*sums))

    def _learning(self, blocks: Iterable[Block | None]) -> list[Block]:
        return [block for block in blocks if block is not None and block.optimizer is not None]

    def _move(self, blocks: Sequence[Block], gradients: Sequence[Tensor]) -> None:
        """One step of each block's optimiser, along gradients that are averaged over the ranks."""
        found = list(gradients)
        if self.group.size > 1:
            found = [one.contiguous() / self.group.size for one in found]
            self.group.sum_(*found)
        for block in blocks:
            block.step(found[: len(block.parameters)])
            found = found[len(block.parameters) :]

    def _set_rate(self) -> float | None:
        if self._recipe.optimizer is not None:
            return None
        blocks = self._learning((self._encoder, self._head, self._decoding))
        return set_rate(self._recipe, self._step, *(one.optimizer for one in blocks if one.optimizer is not None))

    # -- contract ----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Running statistics become rank 0's on every rank; they do not act on the training. Warns of dead features."""
        share_from_rank_0(self.model.buffers(), self.group)
        if self._dead is not None and bool(self._dead):
            warnings.warn(
                "deepfacto: all features in front of the NMF layer are 0, and ReLUs do not come back from that; lower "
                "lr, or reconstruction and coupling (try 0.1 and 10), or centre the input (piecework.nn.Standardise)",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        blocks = {"encoder": self._encoder, "head": self._head, "decoder": self._decoding}
        return {
            "step": self._step,
            "optimizers": {
                name: entries_of(block.optimizer, block.parameters)
                for name, block in blocks.items()
                if block is not None and block.optimizer is not None
            },
            "decoder": None
            if self._decoder is None
            else {name: value.detach().clone() for name, value in self._decoder.state_dict().items()},
            "variance": None if self._variance is None else self._variance.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["decoder"] is not None:
            weight, bias = state["decoder"]["weight"], state["decoder"]["bias"]
            self._make_decoder(
                weight.shape[1], torch.zeros(1, weight.shape[0], dtype=weight.dtype, device=self._device)
            )
            assert self._decoder is not None
            self._decoder.load_state_dict({"weight": weight, "bias": bias})
            self._variance = state["variance"].to(self._device).clone()
        blocks = {"encoder": self._encoder, "head": self._head, "decoder": self._decoding}
        for name, entries in state["optimizers"].items():
            block = blocks[name]
            assert block is not None
            assert block.optimizer is not None
            put_entries(block.optimizer, block.parameters, list(entries))
        self._step = int(state["step"])


__all__ = ["FactorsAtWork"]
