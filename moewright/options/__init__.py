"""The verbs of the command line: the table, and the parser that is made of it."""
