"""Text in, rows of tokens out: config, documents, pack."""
