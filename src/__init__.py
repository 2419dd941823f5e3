"""Transfer learning on images with Lightning. Start reading at src/run.py; README.md has the map."""
