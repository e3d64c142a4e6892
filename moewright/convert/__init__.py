"""A folder becomes another: what growing, upcycling and their like share."""
