"""``python -m cmbench``."""

from cmbench.cli.main import main

main()
