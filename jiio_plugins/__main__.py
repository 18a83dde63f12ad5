"""``python -m jiio_plugins``: the same as ``jiio``, for torchrun."""

from jiio_plugins._cli import main

main()
