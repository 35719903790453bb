"""The commands that make what lies in `data/`: `python -m peftlab.experiments.NAME`."""
