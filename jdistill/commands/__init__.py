"""One file a command: `DESCRIPTION`, `add_arguments(parser)`, `run(args) -> exit code`; the table is `cli.COMMANDS`."""
