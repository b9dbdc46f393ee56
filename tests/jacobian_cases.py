"""Small models of odd sizes whose Jacobian is known from torch.func, for the tests of Gauss-Newton's back-ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn import functional

Seeds = Callable[[Tensor], list[Tensor]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module, seed: int = 7) -> nn.Module:
    """The model in float64 with every parameter drawn anew: norms and biases too, so that nothing is 0 or 1."""
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def dense(model: nn.Module, x: Tensor, *, by_autograd: bool = False) -> Tensor:
    """The plain Jacobian (n, k, P) of all outputs, by torch.func.jacrev, or by a loop where that cannot run."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if by_autograd:
        z = model(x).reshape(len(x), -1)
        rows = [
            torch.cat(
                [g.to_dense().reshape(-1) for g in torch.autograd.grad(value, list(wanted.values()), retain_graph=True)]
            )
            for value in z.reshape(-1)
        ]
        return torch.stack(rows).view(*z.shape, -1)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        z: Tensor = functional_call(model, values, (x,))
        return z.reshape(len(x), -1)

    parts = jacrev(outputs)({name: parameter.detach() for name, parameter in wanted.items()})
    return torch.cat([parts[name].flatten(2) for name in wanted], 2)


def roots(z_shape: tuple[int, int], num: int, seed: int = 11) -> tuple[Tensor, Seeds]:
    """A curvature root B (n, k, C) of independent samples, and the seeds that stand for it."""
    root = randn(*z_shape, num, seed=seed)
    return root, lambda z: [root[:, :, c] for c in range(num)]


def rooted(plain: Tensor, root: Tensor) -> Tensor:
    """B^T J as a matrix (n C, P)."""
    return torch.einsum("nkp,nkc->ncp", plain, root).flatten(0, 1)


def relative(found: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - right) / torch.linalg.vector_norm(right))


# -- models ------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called twice; and a weight that two layers share, with biases of their own."""

    def __init__(self, *, tied_bias: bool = False) -> None:
        super().__init__()
        self.first, self.again, self.other, self.last = (nn.Linear(5, 5) for _ in range(4))
        self.other.weight = self.again.weight
        if tied_bias:
            self.other.bias = self.again.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.other(torch.tanh(self.again(x)))))


class Attention(nn.Module):
    """A block over T positions: projections by layers, positions folded into the rows in one of them."""

    def __init__(self, tokens: int = 7, width: int = 5) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(tokens, width, padding_idx=0), nn.LayerNorm(width)
        self.mix, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 3)
        self.end = nn.RMSNorm(width)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).flatten(0, 1)).view_as(x)
        return self.head(self.end(x).mean(1))


class TiedTable(nn.Module):
    """The table of an embedding is also the weight of the last layer: two kinds, so no factors."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.out.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(index).sum(1)))[:, :3]


class Bare(nn.Module):
    """A parameter of its own, a weight used outside its layer as well, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.seen, self.hidden, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.seen(x * self.scale))
        return self.last(torch.tanh(functional.linear(x, self.hidden.weight, self.hidden.bias)) @ self.seen.weight)


class Aside(nn.Module):
    """A layer that is called, and whose output is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.last = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.last(x)  # type: ignore[no-any-return]


class Laplacian(nn.Module):
    """The residual of -laplace u = 1 by torch.func, one a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return self.net(point).squeeze(-1)

        second = vmap(hessian(u))(x)
        return -second.diagonal(dim1=1, dim2=2).sum(1) - 1


class GradientInside(nn.Module):
    """The same residual by torch.autograd.grad, which vmap cannot follow; two rows a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.stack([u[:, 0], second[0] + second[1]], 1)


class TimeFirst(nn.Module):
    """Positions in front of samples: a layer whose factors would belong to the wrong samples."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wide(x.transpose(0, 1))).mean(0))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def convnet(conv: nn.Conv2d, norm: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(
        conv, norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)
    )


@dataclass(frozen=True)
class Case:
    """make: the model; x: its samples; rows: the parameters that take rows; by: how; by_autograd: the reference's."""

    make: Callable[[], nn.Module]
    x: Tensor
    rows: tuple[str, ...] = ()
    by: str = "vmap"
    by_autograd: bool = False


_FLAT, _SEQUENCE, _IMAGES = randn(5, 5, seed=1), randn(5, 3, 5, seed=2), randn(5, 2, 5, 7, seed=3)
_TOKENS = torch.tensor([[1, 2, 2, 0], [3, 1, 6, 6], [5, 5, 5, 0], [4, 1, 2, 3], [0, 0, 6, 1]])
_POINTS = randn(5, 2, seed=4)


def _mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 24, bias=bias), nn.Tanh(), nn.Linear(24, 3, bias=bias), nn.Tanh(), nn.Linear(3, 3, bias=bias)
    )


CASES: dict[str, Case] = {
    "mlp": Case(_mlp, _FLAT),
    "no bias": Case(lambda: _mlp(bias=False), _FLAT),
    "one output without a dimension": Case(lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), _FLAT),
    "positions": Case(lambda: nn.Sequential(_mlp(), nn.Flatten(), nn.Linear(9, 3)), _SEQUENCE),
    "few positions in wide layers": Case(
        lambda: nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Flatten(), nn.Linear(72, 3)), _SEQUENCE
    ),
    "frozen layers": Case(lambda: frozen(_mlp(), "0.weight", "2.bias", "4.weight"), _FLAT),
    "in-place relu": Case(
        lambda: nn.Sequential(
            nn.Linear(5, 24), nn.ReLU(inplace=True), nn.Linear(24, 5), nn.SiLU(inplace=True), nn.Linear(5, 3)
        ),
        _FLAT,
    ),
    "in-place relu over positions": Case(
        lambda: nn.Sequential(nn.Linear(5, 24), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3)), _SEQUENCE
    ),
    "twice and tied": Case(Twice, _FLAT),
    "tied with its bias": Case(lambda: Twice(tied_bias=True), _FLAT),
    "attention": Case(Attention, _TOKENS),
    "torch attention": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 3, 5, 0.0, batch_first=True), nn.Flatten(), nn.Linear(18, 3)
        ),
        randn(5, 3, 6, seed=5),
        rows=(
            "0.self_attn.in_proj_weight",
            "0.self_attn.in_proj_bias",
            "0.self_attn.out_proj.weight",
            "0.self_attn.out_proj.bias",
        ),
        by_autograd=True,
    ),
    "tied table": Case(TiedTable, _TOKENS, rows=("table.weight",)),
    "embedding of one place": Case(
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 3)), _TOKENS[:, 0]
    ),
    "sparse embedding": Case(
        lambda: nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Flatten(), nn.Linear(20, 3)),
        _TOKENS,
        by_autograd=True,
    ),
    "long sequence of few tokens": Case(
        lambda: nn.Sequential(nn.Embedding(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3)),
        torch.arange(25).view(5, 5) ** 2 % 3,
    ),
    "convolution": Case(lambda: convnet(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), 3), _IMAGES),
    "strided, padded, dilated": Case(
        lambda: convnet(
            nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)), nn.BatchNorm2d(3).eval(), 3
        ),
        _IMAGES,
    ),
    "same padding of an even kernel": Case(
        lambda: convnet(nn.Conv2d(2, 3, (2, 4), padding="same", bias=False), nn.InstanceNorm2d(3, affine=True), 3),
        _IMAGES,
    ),
    "grouped convolution": Case(
        lambda: convnet(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), 4), _IMAGES, rows=("0.weight", "0.bias")
    ),
    "bare parameters": Case(Bare, _FLAT, rows=("scale", "seen.weight", "seen.bias", "hidden.weight", "hidden.bias")),
    "laplacian by torch.func": Case(
        Laplacian, _POINTS, rows=tuple(f"net.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias"))
    ),
    "laplacian by autograd": Case(
        GradientInside,
        _POINTS,
        rows=tuple(f"net.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
        by="single",
        by_autograd=True,
    ),
    "a layer for nothing": Case(Aside, _FLAT),
    "positions in front": Case(TimeFirst, _SEQUENCE, rows=("wide.weight", "wide.bias")),
}
