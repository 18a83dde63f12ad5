"""``python -m jiio_plugins``: the same as ``jiio``, for torchrun."""

from jiio_plugins.cli.main import main

if __name__ == "__main__":
    main()
