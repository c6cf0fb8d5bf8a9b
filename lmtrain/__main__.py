"""`python -m lmtrain`, the same as `lmtrain`."""

from lmtrain.cli import main

main()
