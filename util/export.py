"""Pass a model on: python -m util.export CHECKPOINT OUT, see models/export.py."""

from util.flags import run


def main(argv=None):
    """Run the command of models/export.py. Nothing imports this file: it is above `models`."""
    from models import export

    export.main(argv)


if __name__ == "__main__":
    run(main)
