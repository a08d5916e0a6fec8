"""Methods side by side: same model, calibration, text; one table. `dropbydrop compare` calls it.

config.py   the settings, from which the options of the command are derived
job.py      a checked request, and the fingerprint of what all methods share
run.py      the life-cycle: capture, encode, evaluate, put together
folder.py   what is kept in between, so that a run can be interrupted at any time
price.py    the price of nesting
figures.py  loss over true bits, time and disk (the paper's Figures 6 and 8)
"""
