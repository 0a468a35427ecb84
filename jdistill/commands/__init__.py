"""One file a command: `DESCRIPTION`, `add_arguments(parser)`, `run(args) -> exit code`. Listed in jdistill.cli.COMMANDS."""
