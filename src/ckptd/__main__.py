"""`python -m ckptd` is `ckptd`."""

from ckptd.cli.main import main

main()
