"""``python -m cmbench`` is ``cmbench``."""

from cmbench.cli.main import main

if __name__ == "__main__":
    main()
