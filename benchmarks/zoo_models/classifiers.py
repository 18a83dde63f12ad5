"""Classifiers of the digits: convolutional, multiscale, monotone, with attention, on a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torchdeq
from torch import Tensor, nn
from torch.nn import functional as F
from torchdeq.dropout import VariationalDropout2d

from jiio_plugins import Anderson, Equilibrium, Implicit, Picard, jacobian_penalty
from jiio_torchdeq import adapt

from .case import Case, Training, attack_on_digits, classification

if TYPE_CHECKING:
    from collections.abc import Callable


class Classifier(nn.Module):
    """Encoder, equilibrium and head."""

    def __init__(self, encoder: nn.Module, equilibrium: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.equilibrium, self.head = encoder, equilibrium, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.encoder(x)))


# A residual block --------------------------------------------------------------------------------


class ResNetCell(nn.Module):
    """``f(z, u) = GN(relu(z + GN(u + conv GN(relu(conv z)))))``, GN a GroupNorm.

    Source: Kolter, Duvenaud and Johnson, "Deep Implicit Layers" (NeurIPS 2020 tutorial), chapter 4.
    """

    def __init__(self, channels: int, inner: int, groups: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.norm2, self.norm3 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        inner = self.norm1(F.relu(self.conv1(z)))
        return self.norm3(F.relu(z + self.norm2(u + self.conv2(inner))))


def residual(cell: nn.Module, channels: int) -> Classifier:
    """The tutorial's network around a cell of ``channels`` channels."""
    encoder = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
    head = nn.Sequential(
        nn.BatchNorm2d(channels), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(channels * 16, 10)
    )
    solver = Anderson(max_iter=25, tol=1e-2)
    return Classifier(encoder, Equilibrium(cell, solver=solver), head)


def trained(training: Training, penalty: float) -> Classifier:
    """The tutorial's network, trained with Anderson to a residual of 1e-2, as its authors do.

    Args:
        training: how.
        penalty: weight of the Jacobian penalty. The tutorial has none.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        u = model.encoder(images)
        z = model.equilibrium(u)
        value = F.cross_entropy(model.head(z), labels)
        return (
            value + penalty * jacobian_penalty(model.equilibrium.cell, z, u) if penalty else value
        )

    model = residual(ResNetCell(24, 32), 24)
    training.fit("tutorial-penalty" if penalty else "tutorial", model, loss, steps=250)
    return model


def tutorial(samples: int, training: Training) -> Case:
    """The tutorial's network, solved by Anderson to 1e-4."""
    model = trained(training, penalty=0.0)
    model.equilibrium.solver = Anderson(max_iter=50, tol=1e-4)
    return attack_on_digits("tutorial", model, samples, eps=0.6)


class Damped(nn.Module):
    """``g = z + a (f − z)``: the fixed points and gradients of f, and another spectral radius.

    Args:
        cell: f.
        a: below 1 the contraction is slow. Above 1 the fixed point may repel plain iteration.
    """

    def __init__(self, cell: nn.Module, a: float) -> None:
        super().__init__()
        self.cell, self.a = cell, a

    def forward(self, z: Tensor, *u: Tensor) -> Tensor:
        return z + self.a * (self.cell(z, *u) - z)


def damped(which: str, a: float) -> Callable[[int, Training], Case]:
    """The tutorial's network with :class:`Damped` around its cell, for one a.

    Args:
        which: "hard", as it is, or "easy", trained with a Jacobian penalty.
        a: of :class:`Damped`.
    """

    def build(samples: int, training: Training) -> Case:
        model = trained(training, penalty={"hard": 0.0, "easy": 1.0}[which])
        layer = model.equilibrium
        layer.cell, layer.solver = Damped(layer.cell, a), Anderson(max_iter=100, tol=1e-4)
        return attack_on_digits(f"damped-{which}-{a:g}", model, samples, eps=0.6)

    return build


# Two scales, with TorchDEQ -----------------------------------------------------------------------


class Branch(nn.Module):
    """A residual block with the injection in its middle."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(3))
        self.dropout = VariationalDropout2d(dropout, token_first=False)

    def forward(self, z: Tensor, u: Tensor | float) -> Tensor:
        inner = self.dropout(F.relu(self.norms[0](self.conv1(z))))
        return self.norms[2](F.relu(z + self.norms[1](u + self.conv2(inner))))


class MDEQ(nn.Module):
    """A multiscale DEQ: a residual block a scale, then every scale takes from every other.

    The layer is TorchDEQ's. In training it runs 6 plain iterations and differentiates through 3.

    Args:
        channels: of the two scales, 8×8 and 4×4.
        weight_norm: normalise the weights of the cell.
        dropout: share of the inner channels that a pass of training drops.

    Source: Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models" (NeurIPS 2020).
    """

    def __init__(self, channels: int = 16, weight_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.fine, self.coarse = Branch(channels, dropout), Branch(channels, dropout)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.up = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(4))
        self.head = nn.Linear(2 * channels * 16, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        self.deq = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=6, grad=3)
        if weight_norm:
            torchdeq.apply_norm(self, "weight_norm", filter_out=["encoder", "head"])

    def evaluate_by(self, **settings: Any) -> None:
        """Another layer of TorchDEQ from now on, with a joint mode."""
        self.deq = torchdeq.get_deq(**settings)
        adapt(self).eval()
        with torch.no_grad():
            torchdeq.reset_deq(self)  # normalised weights without a graph, which can be copied

    def forward(self, x: Tensor) -> Tensor:
        torchdeq.reset_deq(self)  # makes the normalised weights and the dropout masks anew
        u = self.encoder(x)

        def f(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            fine, coarse = self.fine(fine, u), self.coarse(coarse, 0.0)
            up = F.interpolate(self.norms[0](self.up(coarse)), scale_factor=2)
            down = self.norms[1](self.down(fine))
            return self.norms[2](F.relu(fine + up)), self.norms[3](F.relu(coarse + down))

        start = torch.zeros_like(u), torch.zeros_like(u[..., ::2, ::2])
        (*_, (fine, coarse)), _ = self.deq(f, start)
        both = torch.cat([F.avg_pool2d(fine, 2), coarse], dim=1)
        return self.head(both.flatten(1))


def multiscale(name: str, *, weight_norm: bool, dropout: float) -> Callable[[int, Training], Case]:
    """:class:`MDEQ`, evaluated by Broyden."""

    def build(samples: int, training: Training) -> Case:
        model = MDEQ(weight_norm=weight_norm, dropout=dropout)
        training.fit(name, model, classification, steps=200)
        model.evaluate_by(
            f_solver="broyden", f_max_iter=60, f_tol=1e-3, f_stop_mode="rel", b_tol=1e-4
        )
        return attack_on_digits(name, model, samples, eps=0.6)

    return build


# Monotone operators ------------------------------------------------------------------------------


class MonDEQ(nn.Module):
    """``z = relu(W z + U x + b)`` with ``W = (1 − m) I − AᵀA + B − Bᵀ``, so that ``I − W ≽ m I``.

    There is one fixed point for any W of this form. Plain iteration finds it only where ‖W‖ < 1;
    splitting methods always do. Each has a cell of its own here, and all have the same z:

    - "plain": the equation above.
    - "forward-backward": ``z -> relu((1 − α) z + α (W z + U x + b))``, ``α = m / ‖I − W‖²``.
    - "peaceman-rachford": on a state s with ``z = relu(s)``, by ``V = (I + α (I − W))⁻¹``,
      ``s -> 2 V (2 relu(s) − s + α (U x + b)) − 2 relu(s) + s``.

    Args:
        width: entries of z.
        splitting: one of the three.
        margin: m.

    Source: Winston and Kolter, "Monotone operator equilibrium networks" (NeurIPS 2020).
    """

    def __init__(self, width: int = 80, splitting: str = "plain", margin: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.b = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
        self.head = nn.Linear(width, 10)
        self.margin, self.splitting = margin, splitting
        cell = {"plain": ReluCell, "forward-backward": ForwardBackward}.get(splitting, Reflections)
        self.equilibrium = Equilibrium(cell(), solver=Picard(max_iter=50, tol=1e-5))

    def weight(self) -> Tensor:
        """W, ``(width, width)``."""
        eye = torch.eye(len(self.a), dtype=self.a.dtype, device=self.a.device)
        return (1 - self.margin) * eye - self.a.T @ self.a + self.b - self.b.T

    def forward(self, x: Tensor) -> Tensor:
        u, weight = self.encoder(x), self.weight()
        eye = torch.eye(len(weight), dtype=u.dtype, device=u.device)
        if self.splitting == "plain":
            shared = (weight,)
        elif self.splitting == "forward-backward":
            alpha = self.margin / torch.linalg.matrix_norm(eye - weight, 2).square()
            shared = weight, alpha.reshape(1)
        else:
            alpha = torch.ones_like(u[:1, 0])
            shared = torch.linalg.inv(eye + alpha * (eye - weight)), alpha
        return self.head(F.relu(self.equilibrium(u, *(t[None] for t in shared))))


class ReluCell(nn.Module):
    """The equation itself."""

    def forward(self, z: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        return F.relu(z @ weight[0].T + u)


class ForwardBackward(nn.Module):
    """A step of length α down the affine part, then the proximal step."""

    def forward(self, z: Tensor, u: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        return F.relu(z + alpha[0] * (z @ weight[0].T + u - z))


class Reflections(nn.Module):
    """Peaceman and Rachford's: a reflection at either part."""

    def forward(self, s: Tensor, u: Tensor, resolvent: Tensor, alpha: Tensor) -> Tensor:
        reflected = 2 * F.relu(s) - s
        return 2 * (reflected + alpha[0] * u) @ resolvent[0].T - reflected


def monotone(splitting: str) -> Callable[[int, Training], Case]:
    """:class:`MonDEQ`, trained with Peaceman and Rachford's splitting."""

    def build(samples: int, training: Training) -> Case:
        trained = MonDEQ(splitting="peaceman-rachford")
        training.fit("mondeq", trained, classification, steps=400, lr=1e-2)
        model = MonDEQ(splitting=splitting).eval()
        model.load_state_dict(trained.state_dict())
        model.equilibrium.solver = Anderson(max_iter=300, tol=1e-4)
        return attack_on_digits(f"mondeq-{splitting}", model, samples, eps=0.6)

    return build


# A transformer -----------------------------------------------------------------------------------


class TransformerCell(nn.Module):
    """``z -> LN(a + MLP(a))``, ``a = LN(z + attention(QKV z + u))``: a block with post-norm.

    Args:
        width: features of a token.
        heads: of the attention.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019), section 3.3.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[..., : u.shape[-1] // 3])

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        parts = (self.qkv(z) + u).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        z = self.norm1(z + self.out(mixed))
        return self.norm2(z + self.mlp(z))


class Rows(nn.Module):
    """The rows of an image as tokens ``(rows, 8, 3 width)``, with learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 3 * width), nn.Parameter(torch.randn(8, 3 * width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.squeeze(1)) + self.position


class MeanHead(nn.Module):
    """Logits of the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 10)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z.mean(1))


def transformer(samples: int, training: Training) -> Case:
    """An equilibrium transformer on sequences of 8 tokens, each a row of the image."""
    layer = Equilibrium(TransformerCell(32, 4), solver=Anderson(max_iter=30, tol=1e-3))
    model = Classifier(Rows(32), layer, MeanHead(32))
    training.fit("transformer", model, classification, steps=400, lr=3e-3)
    layer.solver = Anderson(max_iter=60, tol=1e-4)
    return attack_on_digits("transformer", model, samples, eps=0.6)


# A graph -----------------------------------------------------------------------------------------


class GraphCell(nn.Module):
    """``Z -> relu(W Z A + U)`` with A the normalised adjacency and ``‖W‖∞ ≤ κ``.

    Args:
        features: of a node.
        adjacency: A, ``(nodes, nodes)``, of spectral norm 1.
        kappa: κ, which :meth:`project` sees to.

    Source: Gu et al., "Implicit Graph Neural Networks" (NeurIPS 2020).
    """

    def __init__(self, features: int, adjacency: Tensor, kappa: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features) / features**0.5)
        self.kappa = kappa
        self.register_buffer("adjacency", adjacency)
        self.project()

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return F.relu(self.weight @ z @ self.adjacency + u)

    @torch.no_grad()
    def project(self) -> None:
        """Each row of W onto the l1 ball of radius κ."""
        sizes, _ = self.weight.abs().sort(dim=1, descending=True)
        count = torch.arange(1, sizes.shape[1] + 1)
        thresholds = (sizes.cumsum(1) - self.kappa) / count
        kept = (sizes > thresholds).sum(1, keepdim=True)
        threshold = thresholds.gather(1, kept - 1).clamp(min=0)
        self.weight.copy_(self.weight.sign() * (self.weight.abs() - threshold).clamp(min=0))


class Nodes(nn.Module):
    """The pixels of an image as nodes ``(rows, features, 64)``: brightness and position."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(5, features)
        axis = torch.linspace(-1, 1, 8)
        row, column = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("position", torch.stack([row, column]).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        pixels, position = x.flatten(2), self.position.expand(len(x), -1, -1)
        nodes = torch.cat([pixels, position, pixels * position], dim=1)
        return self.mix(nodes.transpose(1, 2)).transpose(1, 2)


def grid_adjacency(side: int) -> Tensor:
    """``D^-½ (adjacency + I) D^-½`` of the grid whose nodes touch their four neighbours."""
    path = torch.diag(torch.ones(side - 1), 1)
    path, eye = path + path.T, torch.eye(side)
    grid = torch.kron(path, eye) + torch.kron(eye, path) + torch.eye(side * side)
    scale = grid.sum(1).rsqrt()
    return scale[:, None] * grid * scale


def graph(samples: int, training: Training) -> Case:
    """An implicit graph network on the grid of pixels."""
    cell = GraphCell(16, grid_adjacency(8), kappa=0.95)
    solver = Picard(max_iter=300, tol=1e-4)
    layer = Equilibrium(cell, solver=solver, adjoint=Implicit(solver=solver))
    model = Classifier(Nodes(16), layer, nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 10)))
    training.fit("graph", model, classification, steps=300, lr=5e-3, after_step=cell.project)
    return attack_on_digits("graph", model, samples, eps=0.6)
