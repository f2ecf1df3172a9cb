"""Checks of the environment and the data before hours are spent on training.

Every check adds findings: errors keep training from starting, warnings deserve a look, notes report
what was seen.
"""
