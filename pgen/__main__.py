"""``python -m pgen`` is ``pgen``."""

from pgen.cli import main

main()
