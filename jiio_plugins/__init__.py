"""Joint inference and input optimisation (JIIO) for deep equilibrium models."""

import lazy_loader

# what there is, and where, is in __init__.pyi: it is imported when it is asked for
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
