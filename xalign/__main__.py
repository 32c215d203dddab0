"""`python -m xalign`: the command line."""

from xalign.cli import main

main()
