"""The embedded model and the shipped plans."""
