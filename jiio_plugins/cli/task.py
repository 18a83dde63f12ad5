"""What a command works on: a model, and images that fit it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jiio_plugins.cli.commands import OnClassifier, OnImages
from jiio_plugins.data import DATASETS, LabelledImages, load_labelled
from jiio_plugins.losses import logits_of, too_few_classes
from jiio_plugins.models import (
    CLASSIFIERS,
    LogitsOf,
    Normalized,
    available_weights,
    load_pretrained,
)
from jiio_plugins.models.pretrained import GENERATORS
from jiio_plugins.utils.device import check_device
from jiio_plugins.utils.factory import build_network


@dataclass(frozen=True)
class Task:
    """A model with images and labels.

    Attributes:
        model: in eval mode.
        name: of the model, for titles.
        weights: what it carries: a shipped name or a file. None: what its factory gave it.
        dataset: as it was named.
        x: images ``(images, c, h, w)`` in [0, 1].
        y: labels ``(images,)``.
        names: of the classes, where the data tell.
        classes: how many the model tells apart. 0 where it has not been tried.
    """

    model: nn.Module
    name: str
    weights: str | None
    dataset: str
    x: Tensor
    y: Tensor
    names: tuple[str, ...] | None = None
    classes: int = 0


def load_task(settings: OnClassifier) -> Task:
    """The model and its test images, which it has been tried on.

    Args:
        settings: of the command.

    Raises:
        ValueError: see :func:`load_pair`, or images or labels that do not fit the model.
    """
    found = load_pair(settings)
    images = LabelledImages(found.x, found.y, found.names)
    model, classes = _tried(found.model, images, found.name, found.dataset)
    return replace(found, model=model, classes=classes)


def load_pair(settings: OnImages) -> Task:
    """The model and its test images, nothing of which has been tried.

    Args:
        settings: of the command.

    Raises:
        ValueError: no images asked for, no such device, or it is not known what goes with what. See
            :func:`load_model` and :func:`jiio_plugins.data.load_labelled`.
    """
    if settings.images < 1:
        raise ValueError(f"images must be at least 1, got {settings.images}")
    device = check_device(settings.device)
    weights, factory, dataset = settings.weights, settings.model, settings.dataset
    if weights is None and factory is None:
        if dataset not in (None, *CLASSIFIERS):
            raise ValueError(
                f"say what to attack on {dataset}: --model module:function, or --weights "
                f"{', '.join(CLASSIFIERS)} or a .safetensors file"
            )
        weights = dataset or "digits"
    model, trained_on = load_model(weights, factory)
    dataset = dataset or trained_on
    if dataset is None:
        raise ValueError(
            f"say what to attack the model on: --dataset {', '.join(DATASETS)}, a folder with a "
            "subfolder for each class, an .npz file with x and y, or module:function"
        )
    images = load_labelled(
        dataset, "test", settings.folder, resize=settings.resize, limit=settings.images
    )
    if settings.normalize:
        half = len(settings.normalize) // 2
        model = Normalized(model, settings.normalize[:half], settings.normalize[half:])
    if settings.output is not None:
        model = LogitsOf(model, settings.output)
    model, name = model.eval().to(device), factory or str(weights)
    x, y = images.x.to(device), images.y.to(device)
    return Task(model, name, weights, dataset, x, y, images.classes)


@torch.no_grad()
def _tried(
    model: nn.Module, images: LabelledImages, name: str, dataset: str
) -> tuple[nn.Module, int]:
    """The model, which returns logits, and how many classes, once images and labels fit it."""
    x, y, names = images
    given = f"images of {dataset}, which are {tuple(x.shape[1:])}"
    try:
        logits = model(x[:2])
        if not isinstance(logits, Tensor):
            model = LogitsOf(model)
            logits = logits_of(logits)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name} cannot be called on {given} in [0, 1]: {error}. Give images of the size and "
            "the channels that it takes (files: --resize N), or another model"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x[:2]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name} must return logits (images, classes) of {given}; it returns {got}. Where they "
            "are a part of that, --output says which"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"{name}: {too_few_classes('cross-entropy', classes)}")
    if int(y.max()) >= classes:
        raise ValueError(
            f"labels out of range: {dataset} has label {int(y.max())}, {name} tells {classes} "
            f"classes apart, 0 to {classes - 1}"
        )
    if names is not None and len(names) != classes:
        raise ValueError(
            f"classes are missing: {dataset} has {len(names)} ({', '.join(names[:3])}, ...), "
            f"{name} tells {classes} apart. Labels are counted over the classes that are there, "
            "so the others would be taken for the wrong ones. Add them, or give labels of your own "
            "in an .npz file"
        )
    return model, classes


def load_model(weights: str | None, factory: str | None) -> tuple[nn.Module, str | None]:
    """The model, and the data set its architecture is made for, if that is known.

    Args:
        weights: a shipped name or a file. None: those that the factory gave it.
        factory: ``module:function`` that builds it. None: a shipped architecture.

    Raises:
        ValueError: an unknown name, a factory that makes no module, weights of another model.
        FileNotFoundError: no such file.
        ImportError: the factory's module cannot be imported.
    """
    if factory is not None:
        network = build_network(factory, "--model")
        if weights is not None:
            _load_into(network, _read(weights), weights, factory)
        return network, None
    weights = weights or "digits"
    if weights in CLASSIFIERS:
        return load_pretrained(weights), weights
    tensors = _read(weights)
    for name, build in CLASSIFIERS.items():
        network = build()
        own = network.state_dict()
        if {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in tensors.items()}:
            network.load_state_dict(tensors)
            return network, name
    raise ValueError(
        f"{weights} holds the weights of none of the shipped architectures "
        f"({', '.join(CLASSIFIERS)}): say how to build the model with --model module:function"
    )


def _read(weights: str) -> dict[str, Tensor]:
    if weights in CLASSIFIERS:
        return load_pretrained(weights).state_dict()
    path = Path(weights)
    if path.suffix != ".safetensors":
        other = ", which is no classifier" if weights in available_weights() else ""
        if weights in GENERATORS:
            other += ": jiio sample and jiio fit take it"
        raise ValueError(
            f"--weights must be {', '.join(CLASSIFIERS)} or a .safetensors file, got "
            f"{weights!r}{other}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises a class of its own, not exported to Python
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _load_into(network: nn.Module, tensors: dict[str, Tensor], weights: str, factory: str) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit the model of {factory}: {error}") from error
