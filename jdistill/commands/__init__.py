"""One command per file: `DESCRIPTION`, `add_arguments(parser)`, `run(args) -> exit code`."""
