"""Results for people: one self-contained HTML file, and facts on a terminal."""
