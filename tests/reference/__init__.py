"""What each op must return, as plain NumPy loops written from the definition; one module a family.

They import neither torch nor detops, so that they cannot call what they judge.
"""
