"""The benchmark: our back ends and every peer that is there, side by side in one run, right before fast.

``suites.py`` says what is timed, ``gate.py`` who may be timed, ``clock.py`` how, ``lines.py`` what is kept.
``python -m anystride.bench`` needs torch and Triton alone; ``anystride bench`` adds tables and plots.
"""
