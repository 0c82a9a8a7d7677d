"""The command line: one module a verb; thin: parse, call, report."""
