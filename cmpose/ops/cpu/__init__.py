"""What backend ``cpu`` runs: each op by library calls and vectorised torch, one file an op.

Functions here take the arguments of the registered op before ``backend``, already checked, and
give its results in float32 sums or wider. What is right is defined by the reference beside the op
(``cmpose/ops/<op>.py``), which imports its file here; nothing here imports an op.
"""
