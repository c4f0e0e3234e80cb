"""Figures, tables, and the page of a comparison."""

import os

# A notebook exports its own backend to programs that it starts, and their environment may lack it;
# Matplotlib would refuse to load. Figures are only saved here, so that no backend is needed.
if named := os.environ.pop("MPLBACKEND", ""):
    import matplotlib

    try:
        matplotlib.rcParams["backend"] = named  # what Matplotlib itself does with the variable
        os.environ["MPLBACKEND"] = named
    except ValueError:
        pass
