"""What a GPU does: `python -m bench.gpu`."""
