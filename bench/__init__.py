"""Measurements: every figure in the documents is printed by a command of this folder.

- ``<op>.py``, one for each op: its workloads, its peers, its bytes and operations.
  ``python -m bench`` races them.
- ``harness/``: what that race needs. Clocks, forced peers, errors, bounds, records.
- ``train_step.py``, ``parity.py``, ``predict.py``, ``input.py``, ``cpu_gain.py``: the whole model.
- ``traffic.py``: what can be counted without a card.
- ``gpu/``: ``make gpu``, everything that needs a card.
- ``report/``: the generated parts of ``docs/performance.md``.
- ``timed/``: the same workloads under pytest.
- ``results/``: what was measured, by card.
"""
