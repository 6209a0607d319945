"""The idea, with torch alone: N state dicts of one architecture, stacked, and one forward of them all."""
