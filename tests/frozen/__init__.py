"""What the program does as seen from outside, frozen: flags, texts, exit codes and numbers.

Nothing in here names a module of the package but the command line and the errors, so that the
inside can be rebuilt under it. ``python tests/golden/freeze.py`` writes the golden files anew.
"""
