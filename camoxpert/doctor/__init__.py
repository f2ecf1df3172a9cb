"""Checks of the environment and the data, before hours are spent on training.

Every check adds findings: errors mean that training should not start, warnings deserve a look,
notes report what was seen.
"""
