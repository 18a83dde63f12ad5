"""Your own deep equilibrium model: built, trained and attacked in seconds on a CPU.

    python examples/your_own_deq.py

A deep equilibrium model has one layer that is applied until its state stops changing: it finds the
fixed point z = f(z, u) and answers h(z). Write f as an ordinary module, wrap it in `Equilibrium`,
and use that like any other layer. Then anything that optimises the model's input, such as an
adversarial attack, is one call of `optimize_input`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jiio_plugins import Box, Equilibrium, Intersection, L2Ball, optimize_input
from jiio_plugins.data import load_digits


class Cell(nn.Module):
    """f(z, u) = tanh(W z + u). With ‖W‖ < 1 there is one fixed point, and it is found fast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        weight = self.weight / (1 + self.weight.norm())
        return torch.tanh(z @ weight.T + u)


class DEQ(nn.Module):
    def __init__(self, width: int = 50) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, width))
        self.equilibrium = Equilibrium(Cell(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.equilibrium(self.encoder(x))
        return self.head(z)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 15) -> None:
    """Like any other network: the layer's gradient is exact, whatever the solver did inside."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = DEQ()
    train(model, *load_digits("train"))

    # The attack: the largest loss within a distance of 0.8 from the image, pixels in [0, 1].
    images, labels = load_digits("test")
    solution = optimize_input(
        model,
        images,
        objective=lambda logits: -cross_entropy(logits, labels, reduction="none"),  # minimised
        constraint=Intersection(L2Ball(0.8), Box(0, 1)),
    )

    def accuracy(logits: Tensor) -> str:
        return f"{100 * (logits.argmax(1) == labels).double().mean().item():5.1f} %"

    cost = solution.stats.summary()
    print(f"accuracy on {len(images)} test images")
    print(f"  clean        {accuracy(model(images))}")
    print(f"  adversarial  {accuracy(model(solution.x))}  by the model itself")
    print(f"               {accuracy(solution.output)}  by a tighter solve of the fixed point")
    print(f"cost an image: {cost['f_evals']:.1f} evaluations of f, {cost['vjps']:.1f} VJPs")
    print(f"status:        {solution.report()}")


if __name__ == "__main__":
    main()
