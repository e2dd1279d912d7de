"""`python -m fedmerge` is the `fedmerge` command."""

from fedmerge.cli import main

main(prog_name="fedmerge")
