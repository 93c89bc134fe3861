"""The command line: one small module per verb: parse, call, print."""
