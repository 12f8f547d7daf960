"""The page: one static HTML file of a run or a board. Next: `evidence.py`, then `render.py`."""
