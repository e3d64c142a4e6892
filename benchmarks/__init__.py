"""What the layer costs, measured beside its peers: see README.md in this folder."""
