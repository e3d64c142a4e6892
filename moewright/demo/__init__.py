"""The project's story on a real model that a package carries."""
