"""Results and progress for people: self-contained HTML pages, and facts on a terminal."""
