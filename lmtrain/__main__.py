"""`python -m lmtrain` does what the command `lmtrain` does."""

from lmtrain.cli import main

main()
