"""`python -m kvpool.cli.kvctl`."""

from kvpool.cli.kvctl import main

main()
