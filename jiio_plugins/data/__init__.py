"""Real images that need no download at run time, and few-shot tasks made of them."""

from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.data.glyphs import load_glyphs
from jiio_plugins.data.images import Images, load_images, read_files, to_unit
from jiio_plugins.data.omniglot import load_omniglot
from jiio_plugins.data.tasks import ClassImages, Sinusoids, Tasks, sample_tasks

__all__ = [
    "ClassImages",
    "Images",
    "Sinusoids",
    "Tasks",
    "load_digits",
    "load_fashion_mnist",
    "load_glyphs",
    "load_images",
    "load_omniglot",
    "read_files",
    "sample_tasks",
    "to_unit",
]
