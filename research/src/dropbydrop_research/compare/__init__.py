"""Methods side by side: same model, calibration, text; one table. `dropbydrop compare` calls it.

run.py      the life-cycle: capture, encode, evaluate, put together
folder.py   what is kept in between, so that a run can be interrupted at any time
figures.py  loss over true bits, time and disk (the paper's Figures 6 and 8)
"""
