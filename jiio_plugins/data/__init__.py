"""Real images that need no download at run time, the user's own, and few-shot tasks."""

from jiio_plugins.data.classification import load_digits, load_fashion_mnist
from jiio_plugins.data.files import read_files
from jiio_plugins.data.glyphs import load_glyphs
from jiio_plugins.data.images import Images, load_images, to_unit
from jiio_plugins.data.labelled import DATASETS, LabelledImages, load_labelled
from jiio_plugins.data.omniglot import load_omniglot
from jiio_plugins.data.tasks import ClassImages, Sinusoids, Tasks, sample_tasks

__all__ = [
    "DATASETS",
    "ClassImages",
    "Images",
    "LabelledImages",
    "Sinusoids",
    "Tasks",
    "load_digits",
    "load_fashion_mnist",
    "load_glyphs",
    "load_images",
    "load_labelled",
    "load_omniglot",
    "read_files",
    "sample_tasks",
    "to_unit",
]
