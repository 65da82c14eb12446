"""What runs beyond the wall: the launcher, and the two processes that it starts for each program (see `rewards/sandbox.py`).

Only the standard library and these files are loaded there: neither torch nor anything else that could hold a secret.
"""
