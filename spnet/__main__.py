"""``python -m spnet`` is the ``spnet`` command; ``torchrun -m spnet train`` starts it on several ranks."""

from spnet.cli import main

if __name__ == "__main__":
    main(prog_name="spnet")
