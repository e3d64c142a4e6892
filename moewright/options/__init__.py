"""The verbs of the command line: the table, and the parser made of it."""
