"""Generators with optimised latents: train without an encoder, sample, fit new images.

Needs ``pip install 'jiio-plugins[generative]'``.
"""

import lazy_loader

# what there is, and where, is in __init__.pyi: it is imported when it is asked for
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
