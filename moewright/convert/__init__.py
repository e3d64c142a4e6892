"""A model becomes another model: the part that growing, upcycling and their like share."""
