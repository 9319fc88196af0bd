"""The command line, `querydet`: one file per command, `main` to choose, `process` to end."""
